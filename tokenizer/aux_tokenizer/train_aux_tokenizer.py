"""Door to src/self_model_sop/tokenizer/train.py."""

from self_model_sop.tokenizer.train import main

if __name__ == "__main__":
    raise SystemExit(main())
