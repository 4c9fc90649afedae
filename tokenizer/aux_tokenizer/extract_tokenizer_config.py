"""Door to src/self_model_sop/tokenizer/baseline.py."""

from self_model_sop.tokenizer.baseline import main

if __name__ == "__main__":
    raise SystemExit(main())
