"""Door to `sop train sft`: src/self_model_sop/train/sft.py"""

from self_model_sop.train.sft import main

if __name__ == "__main__":
    raise SystemExit(main())
