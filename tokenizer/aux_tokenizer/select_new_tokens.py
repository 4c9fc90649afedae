"""Door to src/self_model_sop/tokenizer/select.py."""

from self_model_sop.tokenizer.select import main

if __name__ == "__main__":
    raise SystemExit(main())
