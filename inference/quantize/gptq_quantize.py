"""Door to `sop infer gptq`: src/self_model_sop/infer/gptq.py"""

from self_model_sop.infer.gptq import main

if __name__ == "__main__":
    raise SystemExit(main())
