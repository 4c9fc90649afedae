"""Door to `sop train grpo`: src/self_model_sop/train/grpo.py"""

from self_model_sop.train.grpo import main

if __name__ == "__main__":
    raise SystemExit(main())
