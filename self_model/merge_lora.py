"""Door to `sop train merge`: src/self_model_sop/train/merge.py"""

from self_model_sop.train.merge import main

if __name__ == "__main__":
    raise SystemExit(main())
