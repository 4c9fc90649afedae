"""Door to src/self_model_sop/tokenizer/extend.py."""

from self_model_sop.tokenizer.extend import main

if __name__ == "__main__":
    raise SystemExit(main())
