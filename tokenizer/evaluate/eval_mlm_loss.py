"""Door to src/self_model_sop/tokenizer/mlm_loss.py."""

from self_model_sop.tokenizer.mlm_loss import main

if __name__ == "__main__":
    raise SystemExit(main())
