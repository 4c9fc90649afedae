"""The same held-out text through the base and the extended tokenizer, every token a coloured box."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ..tokenizer.report import Span, spans
from .gather import Story
from .words import Text, both

_CHARS = 96  # of a sample


class Sample(NamedTuple):
    """A piece of held-out text before and after."""

    source: str
    before: list[Span]
    after: list[Span]

    def count(self, line: Sequence[Span]) -> int:
        return sum(len(s.ids) for s in line)


def samples(story: Story, number: int) -> tuple[list[Sample], int]:
    """A few held-out texts, one after the other from each source, and the first new id; nothing where the run extended no tokenizer."""
    baseline, extended, corpus = (story.last(f"tokenizer.{name}") for name in ("baseline", "extend", "corpus"))
    if not (number and baseline and extended and corpus):
        return [], 0
    old, new = (_load(p) for p in (baseline.folder / "tokenizer" / "tokenizer.json", extended.folder / "tokenizer.json"))
    if old is None or new is None:
        return [], 0
    chosen = list(_texts(corpus.folder / "heldout.jsonl", number))
    first_new = int(extended.stats["new_ids"][0])
    return [Sample(source, *(spans(side.encode(text, add_special_tokens=False), text) for side in (old, new))) for source, text in chosen], first_new


def _load(path: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path)) if path.is_file() else None


def _texts(path: Path, number: int) -> Iterator[tuple[str, str]]:
    """Beginnings of texts, taken in turn from each source."""
    groups: dict[str, list[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        row = json.loads(line)
        text = " ".join(str(row.get("text", "")).split())
        if len(text) >= 24:
            groups.setdefault(str(row.get("set") or row.get("source") or ""), []).append(text[:_CHARS])
    taken = 0
    for turn in range(number):
        for source, texts in groups.items():
            if turn < len(texts) and taken < number:
                taken += 1
                yield source, texts[turn * len(texts) // number]


def picture(sample: Sample, first_new: int) -> str:
    """Both lines of a sample as HTML."""
    before, after = sample.count(sample.before), sample.count(sample.after)
    less = f"−{1 - after / before:.0%}" if before else ""
    rows = []
    for name, line, count, mark in ((Text("before", "之前"), sample.before, before, ""), (Text("after", "之后"), sample.after, after, less)):
        boxes = "".join(_box(n, s, first_new) for n, s in enumerate(line))
        rows.append(f'<div class="tokens"><div class="tally"><b>{count}</b> {both(Text("tokens", "词元"))} <em>{both(name)}</em> <strong>{mark}</strong></div><p>{boxes}</p></div>')
    return f'<div class="sample">{"".join(rows)}</div>'


def _box(n: int, span: Span, first_new: int) -> str:
    """One token; several that share a character are one box that says how many."""
    new = any(i >= first_new for i in span.ids)
    several = f"<sub>{len(span.ids)}</sub>" if len(span.ids) > 1 else ""
    tip = f"{'new ' if new else ''}{'ids' if len(span.ids) > 1 else 'id'} {', '.join(map(str, span.ids))}"
    return f'<span class="k{n % 5}{" new" if new else ""}" data-tip="{tip}">{escape(span.text)}{several}</span>'
