"""Door to src/self_model_sop/tokenizer/evaluate.py."""

from self_model_sop.tokenizer.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
