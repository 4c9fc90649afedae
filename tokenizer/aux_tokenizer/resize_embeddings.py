"""Door to src/self_model_sop/tokenizer/resize.py."""

from self_model_sop.tokenizer.resize import main

if __name__ == "__main__":
    raise SystemExit(main())
