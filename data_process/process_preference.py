"""Door to self_model_sop.data.preference."""

from self_model_sop.data.preference import main

if __name__ == "__main__":
    raise SystemExit(main())
