"""Door to `sop infer awq`: src/self_model_sop/infer/awq.py"""

from self_model_sop.infer.awq import main

if __name__ == "__main__":
    raise SystemExit(main())
