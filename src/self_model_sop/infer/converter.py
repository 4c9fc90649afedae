"""Runs llama.cpp's own converter: `python -m self_model_sop.infer.converter LLAMA_CPP BASE_TOKENIZER ARGUMENTS...` (BASE_TOKENIZER may be empty).

Two things are different from running its script. The converter finds a byte-level BPE's pre-tokenizer by hashing the ids of a test text, which an expanded vocabulary
changes; it is shown the tokenizer without the appended tokens, whose pre-tokenizer is the same one. And tokenizers are loaded without remote code.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Entry point of the child process."""
    folder, base, *arguments = sys.argv[1:]
    sys.path[:0] = [folder, str(Path(folder) / "gguf-py")]
    import transformers

    load = transformers.AutoTokenizer.from_pretrained

    def safely(source: object, *args: object, **options: object) -> object:
        return load(source, *args, **{**options, "trust_remote_code": False})

    transformers.AutoTokenizer.from_pretrained = safely
    if base:
        from conversion import base as conversion  # type: ignore[import-not-found]

        recognise = conversion.TextModel.get_vocab_base_pre
        conversion.TextModel.get_vocab_base_pre = lambda self, tokenizer: recognise(self, safely(base))
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    runpy.run_path(str(Path(folder) / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()
