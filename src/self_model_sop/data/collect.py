"""Every row of a set (or of one part of its input) through the rules, in this process or in others, in the order of the input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .. import console
from ..workers import ordered
from .encodings import WHOLE, Span, text_lines
from .parts import PartWriter
from .records import text_records
from .rows import Item, Judge, Outcome, Rules, Tally
from .sets import InputFile, part_of

_BLOCK_ROWS = 1000
_BLOCK_CHARS = 1 << 20


def collect(name: str, members: Sequence[InputFile], rules: Rules, folder: Path, *, workers: int = 1, part: tuple[int, int] | None = None, memory: int = 1 << 31) -> None:
    """Judge the rows and leave a part in `folder`.

    With `part` = (i, n) only the i-th of n parts of the input, with a table of its n-grams for the merge (a quarter of `memory` bytes at most).
    """
    spans = part_of(members, *part) if part else [(i, WHOLE) for i in range(len(members))]
    with PartWriter(folder, rules.names, _table_bits(members, memory) if part and rules.want_text else 0) as out:
        out.totals.model = rules.perplexity.about if rules.perplexity else {}
        for outcomes, tally in ordered(functools.partial(_judging, rules), _blocks(name, members, spans), workers, key="--workers 1"):
            out.totals.tally(tally)
            for outcome in outcomes:
                out.take(outcome)


def _table_bits(members: Sequence[InputFile], memory: int) -> int:
    """About two entries for a character of the whole input, a GiB at most."""
    from .ngram_index import table_bits

    return min(30, table_bits(2 * sum(m.source.path.stat().st_size for m in members) // 3, memory))


def _blocks(name: str, members: Sequence[InputFile], spans: Sequence[tuple[int, Span]]) -> Iterator[list[Item]]:
    block: list[Item] = []
    size = 0
    total = sum(members[i].source.path.stat().st_size if span.end is None else span.end - span.start for i, span in spans)
    with console.progress(f"{name}: reading", total) as advance:
        for i, span in spans:
            for item in _items(i, members[i], span):
                block.append(item)
                size += len(item.content) if isinstance(item.content, str) else 500
                if len(block) == _BLOCK_ROWS or size >= _BLOCK_CHARS:
                    advance(size)
                    yield block
                    block, size = [], 0
        if block:
            yield block


def _items(number: int, member: InputFile, span: Span) -> Iterator[Item]:
    """The records of a file; JSON lines still as text, so that parsing happens in the workers."""
    source = member.source
    if source.kind == "jsonl":
        for line, text, error in text_lines(source.path, source.encoding, source.max_line_bytes, span):
            if error or text.strip(" \t\r"):
                yield Item(number, line, None, error, text[:1000]) if error else Item(number, line, text, None, "")
        return
    for record in text_records(source, span) if source.kind == "txt" else source:
        yield Item(number, record.line, record.row, record.error, record.raw)


def _judging(rules: Rules) -> Callable[[list[Item]], tuple[list[Outcome], Tally]]:
    return Judge(rules).block
