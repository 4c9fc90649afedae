"""Door to `sop train dpo`: src/self_model_sop/train/dpo.py"""

from self_model_sop.train.dpo import main

if __name__ == "__main__":
    raise SystemExit(main())
