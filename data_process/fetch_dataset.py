"""Door to src/self_model_sop/data/fetch.py."""

from self_model_sop.data.fetch import main

if __name__ == "__main__":
    raise SystemExit(main())
