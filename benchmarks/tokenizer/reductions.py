"""Tokens saved by N new tokens, and what it costs: ours beside the usual ways, on real tokenizers and real text.

    TOKENIZERS_PARALLELISM=false python benchmarks/tokenizer/reductions.py --shared ../shared [--smollm2 FOLDER] [--bases qwen3 ...] [--tokens 1000 4000 10000]

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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import rivals

from self_model_sop.tokenizer import evaluate, methods, regression, select
from self_model_sop.tokenizer.base import Base, bare, gather, open_base
from self_model_sop.tokenizer.counts import tally
from self_model_sop.tokenizer.methods import Corpus
from self_model_sop.tokenizer.settings import SelectionConfig

HERE = Path(__file__).parent
BASES = ("smollm2", "qwen3", "llama3", "deepseek_v3", "llama2", "bert_base_chinese")
LAWS_BYTES = 1_800_000
WAYS = ("usual script", "usual, done right", "independent merges", "ours")


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


@dataclass(frozen=True)
class Texts:
    """What every base is measured on; what does not depend on the base is made once."""

    train: list[str]
    held: list[str]
    others: list[str]

    @cached_property
    def lines(self) -> list[str]:
        """The training text as the usual script reads it."""
        return [line for t in self.train for line in t.split("\n") if line.strip()]

    @cached_property
    def aux(self) -> Any:
        """The auxiliary tokenizer."""
        return rivals.auxiliary(self.lines)

    @cached_property
    def pieces(self) -> Counter[str]:
        """Uses of its pieces."""
        return rivals.counted(self.aux, self.lines)


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


class Bench:
    """One base: the ways to extend it, and their measurement.

    Args:
        base: the base tokenizer.
        texts: the text.
        most: the largest N.
    """

    def __init__(self, base: Base, texts: Texts, most: int) -> None:
        self.base, self.texts, self.most = base, texts, most
        self.before, self.others_before = sum(map(len, encoded(base.tokenizer, texts.held))), encoded(base.tokenizer, texts.others)
        self.training, self.held_out = (Corpus(lambda part=part: ((t, 1.0) for t in part)) for part in (texts.train, texts.held))  # type: ignore[misc]

    @cached_property
    def merges(self) -> list[Any] | None:
        """What a BPE of its own learns; its beginnings serve the smaller N."""
        return rivals.independent(self.base, self.texts.lines, self.texts.aux, self.most)

    def make(self, way: str, n: int) -> Any:
        """The extended tokenizer, or None where the base does not allow the way."""
        by_way: dict[str, Callable[[], Any]] = {
            "usual script": lambda: rivals.usual(self.base, self.texts.pieces, n),
            "usual, done right": lambda: rivals.usual_done_right(self.base, self.texts.pieces, n),
            "independent merges": lambda: None if self.merges is None else rivals.appended(self.base, self.merges[:n]),
            "ours": lambda: bare(methods.appended(self.base, select.choose(self.base, self.training, self.held_out, SelectionConfig(new_tokens=n))[0])),
        }
        return by_way[way]()

    def measure(self, tokenizer: Any) -> dict[str, Any]:
        """Reduction, changed English and code lines, speed, and what is unreachable, shadowed or unused among the new tokens."""
        first, size = self.base.next_id, max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        after, uses = (tally(tokenizer, ((t, 1.0) for t in part), size) for part in (self.texts.held, self.texts.train))
        new = range(first, size)
        texts = {i: tokenizer.decode([i], skip_special_tokens=False).removeprefix("##") for i in new}
        whole = {i: t for i, t in texts.items() if t and "\ufffd" not in t}
        alone, shadow = (dict(zip(whole, encoded(t, list(whole.values())), strict=True)) for t in (tokenizer, self.base.tokenizer))
        by_bytes = {i for i in new if self.base.kind == "byte_bpe" and [t.id for t in tokenizer.model.tokenize(tokenizer.id_to_token(i))] == [i]}
        old, now = evaluate.fastest([self.base.tokenizer, tokenizer], self.texts.held)
        return {
            "tokens": len(new), "reduction": round(1 - float(after.sum()) / self.before, 4),
            "changed_lines": sum(a != b for a, b in zip(self.others_before, encoded(tokenizer, self.texts.others), strict=True)),
            "unreachable": sum(i not in alone.get(i, ()) and i not in by_bytes for i in new), "shadowed": sum(len(ids) == 1 for ids in shadow.values()),
            "unused_on_training": int(np.sum(uses[first:] == 0)), "unused_on_heldout": int(np.sum(after[first:] == 0)), "encode_ratio": round(old / now, 3),
        }  # fmt: skip


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
    texts = Texts(*split(documents(args.shared)), other_lines())
    path = HERE / "results.json"
    results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    sizes = [sum(len(t.encode()) for t in part) / 1e6 for part in (texts.train, texts.held)]
    print(f"{sizes[0]:.2f} MB to learn from, {sizes[1]:.2f} MB held out, {len(texts.others)} other lines", flush=True)
    for name in args.bases:
        with tempfile.TemporaryDirectory() as copy:
            gather(args.smollm2 if name == "smollm2" else args.shared / "tokenizers" / name, Path(copy))
            bench = Bench(open_base(Path(copy)), texts, max(args.tokens))
            for n, way in ((n, w) for n in args.tokens for w in WAYS):
                if any((r["base"], r["n"], r["way"]) == (name, n, way) for r in results):
                    continue
                start = time.process_time()
                tokenizer = bench.make(way, n)
                seconds = round(time.process_time() - start, 1)
                if tokenizer is None:
                    continue
                results.append({"base": name, "n": n, "way": way, "cpu_s": seconds, **bench.measure(tokenizer)})
                print(results[-1], flush=True)
                results.sort(key=lambda r: (BASES.index(r["base"]), r["n"], WAYS.index(r["way"])))
                path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                (HERE / "results.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
