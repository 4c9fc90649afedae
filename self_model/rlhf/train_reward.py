"""Door to `sop train reward`: src/self_model_sop/train/reward.py"""

from self_model_sop.train.reward import main

if __name__ == "__main__":
    raise SystemExit(main())
