"""Tokens saved by N new tokens, and what it costs: ours beside the usual ways, on real tokenizers and real text.

    python benchmarks/tokenizer/reductions.py --shared ../shared [--smollm2 FOLDER] [--bases qwen3 ...] [--tokens 1000 4000 10000]

Writes results.json and results.md beside this file after each row; rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rivals

from self_model_sop.tokenizer import methods, regression, select
from self_model_sop.tokenizer.base import Base, bare, gather, open_base
from self_model_sop.tokenizer.counts import tally
from self_model_sop.tokenizer.methods import Corpus
from self_model_sop.tokenizer.settings import SelectionConfig

HERE = Path(__file__).parent
BASES = ("smollm2", "qwen3", "llama3", "deepseek_v3", "llama2", "bert_base_chinese")
LAWS_BYTES = 1_800_000
WAYS = {"usual script": rivals.usual, "usual, done right": rivals.usual_done_right, "independent merges": rivals.independent, "ours": None}


def documents(shared: Path) -> Iterator[str]:
    """Medical textbook and dialogues, general dialogues, and as many statutes (by content hash) as make 1.8 MB."""
    yield from (shared / "data/medical/infectious_disease.txt").read_text(encoding="utf-8").split("\n")
    for name in ("medical/medical_sft_1k.sharegpt.jsonl", "dialogue/sharegpt_zh_1k.jsonl"):
        for line in (shared / "data" / name).read_text(encoding="utf-8").split("\n"):
            if line:
                yield "\n".join(turn["value"] for turn in json.loads(line)["conversations"])
    with gzip.open(shared / "data/laws/laws_zh.jsonl.gz", "rt", encoding="utf-8") as f:
        laws = sorted((json.loads(line)["text"] for line in f), key=lambda t: hashlib.sha256(t.encode()).digest())
    size = 0
    for text in laws:
        size += len(text.encode())
        yield text
        if size > LAWS_BYTES:
            return


def split(texts: Iterator[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents (one in eight, by content hash)."""
    unique = dict.fromkeys(t for t in texts if t.strip())
    held = {t for t in unique if hashlib.sha256(b"split" + t.encode()).digest()[0] % 8 == 0}
    return [t for t in unique if t not in held], [t for t in unique if t in held]


def other_lines() -> list[str]:
    """English and Python: the regression set and 4,000 lines of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    lines = [line for name in ("argparse", "typing", "datetime", "zipfile", "tarfile") for line in (folder / f"{name}.py").read_text(encoding="utf-8").split("\n") if line.strip()]
    return [*regression.lines("english"), *regression.lines("code"), *lines[:4000]]


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def speed(old: Any, new: Any, texts: Sequence[str]) -> float:
    """Encoding throughput of the extension as a share of the base's, in CPU time (other work on the machine does not count), best of three rounds each."""
    best = [float("inf"), float("inf")]
    for _ in range(3):
        for n, tokenizer in enumerate((old, new)):
            start = time.process_time()
            tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            best[n] = min(best[n], time.process_time() - start)
    return best[0] / best[1]


def measure(base: Base, tokenizer: Any, train: Sequence[str], held: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """Reduction, changed English and code lines, and what is unreachable, shadowed or unused among the new tokens."""
    old = base.tokenizer
    first, size = base.next_id, max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    before = sum(map(len, encoded(old, held)))
    after = tally(tokenizer, ((t, 1.0) for t in held), size)
    uses = tally(tokenizer, ((t, 1.0) for t in train), size)
    new = range(first, size)
    texts = {i: tokenizer.decode([i], skip_special_tokens=False).removeprefix("##") for i in new}
    whole = {i: t for i, t in texts.items() if t and "\ufffd" not in t}
    alone = dict(zip(whole, encoded(tokenizer, list(whole.values())), strict=True))
    shadow = dict(zip(whole, encoded(old, list(whole.values())), strict=True))
    by_bytes = {i for i in new if base.kind == "byte_bpe" and [t.id for t in tokenizer.model.tokenize(tokenizer.id_to_token(i))] == [i]}
    return {
        "tokens": len(new), "reduction": round(1 - float(after.sum()) / before, 4),
        "changed_lines": sum(a != b for a, b in zip(encoded(old, others), encoded(tokenizer, others), strict=True)),
        "unreachable": sum(i not in alone.get(i, ()) and i not in by_bytes for i in new), "shadowed": sum(len(ids) == 1 for ids in shadow.values()),
        "unused_on_training": int(np.sum(uses[first:] == 0)), "unused_on_heldout": int(np.sum(after[first:] == 0)), "encode_ratio": round(speed(old, tokenizer, held), 3),
    }  # fmt: skip


def ours(base: Base, train: Corpus, held: Corpus, n: int) -> Any:
    """Our extension."""
    return bare(methods.appended(base, select.choose(base, train, held, SelectionConfig(new_tokens=n))[0]))


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    names = ["base", "N", "way", "held-out reduction", "changed English/code lines", "unreachable", "shadowing", "unused on training", "unused on held-out", "encode x base"]
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
    rows = []
    for r in results:
        n, bold = r["tokens"] or 1, "**" if r["way"] == "ours" else ""
        cells = [r["base"], f"{r['n']:,}", f"{bold}{r['way']}{bold}", f"{bold}{r['reduction']:.1%}{bold}", r["changed_lines"], r["unreachable"], r["shadowed"]]
        rows.append("| " + " | ".join(map(str, [*cells, f"{r['unused_on_training'] / n:.1%}", f"{r['unused_on_heldout'] / n:.1%}", r["encode_ratio"]])) + " |")
    return head + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--smollm2", type=Path, help="a folder with SmolLM2's tokenizer (sop data model)")
    parser.add_argument("--bases", nargs="+", default=BASES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1000, 4000, 10_000])
    args = parser.parse_args()
    train, held = split(documents(args.shared))
    lines = [line for t in train for line in t.split("\n") if line.strip()]
    others = other_lines()
    aux = rivals.auxiliary(lines, rivals.AUX_VOCABULARY)
    path = HERE / "results.json"
    results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    print(f"{sum(len(t.encode()) for t in train) / 1e6:.2f} MB to learn from, {sum(len(t.encode()) for t in held) / 1e6:.2f} MB held out, {len(others)} other lines", flush=True)
    for name in args.bases:
        with tempfile.TemporaryDirectory() as copy:
            gather(args.smollm2 if name == "smollm2" else args.shared / "tokenizers" / name, Path(copy))
            base = open_base(Path(copy))
            training, held_out = Corpus(lambda: ((t, 1.0) for t in train)), Corpus(lambda: ((t, 1.0) for t in held))
            for n, (way, make) in ((n, w) for n in args.tokens for w in WAYS.items()):
                if any((r["base"], r["n"], r["way"]) == (name, n, way) for r in results):
                    continue
                start = time.process_time()
                tokenizer = make(base, lines, aux, n) if make else ours(base, training, held_out, n)
                seconds = round(time.process_time() - start, 1)
                if tokenizer is None:
                    continue
                results.append({"base": name, "n": n, "way": way, "cpu_s": seconds, **measure(base, tokenizer, train, held, others)})
                print(results[-1], flush=True)
                results.sort(key=lambda r: (BASES.index(r["base"]), r["n"], list(WAYS).index(r["way"])))
                path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                (HERE / "results.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
