"""Door to self_model_sop.data.process."""

from self_model_sop.data.process import main

if __name__ == "__main__":
    raise SystemExit(main())
