"""Door to `sop train ppo`: src/self_model_sop/train/ppo.py"""

from self_model_sop.train.ppo import main

if __name__ == "__main__":
    raise SystemExit(main())
