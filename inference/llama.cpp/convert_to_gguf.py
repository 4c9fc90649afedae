"""Door to `sop infer gguf`: src/self_model_sop/infer/gguf.py"""

from self_model_sop.infer.gguf import main

if __name__ == "__main__":
    raise SystemExit(main())
