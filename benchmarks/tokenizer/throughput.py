"""CPU and wall seconds, and peak memory, of choosing 10,000 tokens from 100 MB of text.

python benchmarks/tokenizer/throughput.py --shared ../shared --base FOLDER [--megabytes 100] [--tokens 10000]
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from reductions import documents

from self_model_sop.tokenizer import select
from self_model_sop.tokenizer.base import gather, open_base
from self_model_sop.tokenizer.methods import Corpus
from self_model_sop.tokenizer.settings import SelectionConfig


def text(shared: Path, size: int) -> Iterator[str]:
    """Medical and general text, all statutes, and beyond that statutes with their sentences drawn anew, until `size` bytes."""
    done = 0
    for document in documents(shared):
        done += len(document.encode())
        yield document
    draw, sentences = random.Random(0), list[str]()
    with gzip.open(shared / "data/laws/laws_zh.jsonl.gz", "rt", encoding="utf-8") as f:
        for line in f:
            document = json.loads(line)["text"]
            sentences += re.split(r"(?<=[。；])", document)
            done += len(document.encode())
            if done > size:
                return
            yield document
    while done < size:
        document = "".join(draw.choices(sentences, k=200))
        done += len(document.encode())
        yield document


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=10_000)
    args = parser.parse_args()
    texts = list(text(args.shared, args.megabytes * 1_000_000))
    held, train = texts[::200], [t for n, t in enumerate(texts) if n % 200]
    with tempfile.TemporaryDirectory() as copy:
        gather(args.base, Path(copy))
        base = open_base(Path(copy))
        wall, cpu = time.perf_counter(), time.process_time()
        rows, measured = select.choose(base, Corpus(lambda: ((t, 1.0) for t in train)), Corpus(lambda: ((t, 1.0) for t in held)), SelectionConfig(new_tokens=args.tokens))
        seconds = {"wall_s": round(time.perf_counter() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    mb = sum(len(t.encode()) for t in train) / 1e6
    print({"base": args.base.name, "mb": round(mb, 1), "tokens": len(rows), **seconds, "peak_mb": round(peak), "reduction": measured["curve"][-1]["reduction"]})


if __name__ == "__main__":
    main()
