"""Rows per CPU second: our rendering (text, ids and exact mask) beside `apply_chat_template` (ids alone), on one core.

    python benchmarks/training/rendering.py ../shared/tokenizers/qwen3 ../shared/data/medical/medical_sft_1k.sharegpt.jsonl
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"


def rate(work: Callable[[Any], Any], rows: list[Any], repeats: int = 3) -> float:
    """Rows per second of processor time, the best of `repeats`."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        for row in rows:
            work(row)
        best = min(best, time.process_time() - start)
    return len(rows) / best


def main(tokenizer_folder: str, data: str) -> None:
    from transformers import AutoTokenizer

    from self_model_sop.data.formats import to_messages
    from self_model_sop.train.template import renderer_for

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    renderer = renderer_for(tokenizer)
    rows = [to_messages(json.loads(line)) for line in Path(data).read_text(encoding="utf-8").split("\n") if line]
    tokens = sum(len(renderer.render(row).ids) for row in rows)
    ours = rate(renderer.render, rows)
    text = rate(renderer.text, rows)
    library = rate(lambda row: tokenizer.apply_chat_template(row, tokenize=True, return_dict=False), rows)
    print(json.dumps({"rows": len(rows), "tokens_per_row": round(tokens / len(rows)), "render": round(ours), "text_only": round(text), "apply_chat_template": round(library)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
