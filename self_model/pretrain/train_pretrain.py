"""Door to `sop train pretrain`: src/self_model_sop/train/pretrain.py"""

from self_model_sop.train.pretrain import main

if __name__ == "__main__":
    raise SystemExit(main())
