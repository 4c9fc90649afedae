"""One set from records to files: blocks through the rules, exact and near-duplicates, contamination, split, writing."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .. import console
from ..errors import BUG, SopError
from .encodings import text_lines
from .records import dumps, read
from .rows import Item, Judge, Outcome, Rules, Tally, start_worker, work
from .sets import InputFile
from .split import position, validation_groups

if TYPE_CHECKING:
    from .process import ProcessConfig

_BLOCK_ROWS = 1000
_BLOCK_CHARS = 1 << 20


@dataclass
class SetRun:
    """The work on one set; `run` does it, then `stats`, `files`, `pii` and `undecodable` tell what happened."""

    name: str
    members: Sequence[InputFile]
    rules: Rules
    config: ProcessConfig
    folder: Path
    stem: str = ""
    workers: int = 1
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    pii: Counter[str] = field(default_factory=Counter)
    formats: Counter[tuple[int, str]] = field(default_factory=Counter)
    undecodable: dict[int, tuple[int, int]] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    def run(self) -> SetRun:
        """Read, judge, deduplicate, split and write the set."""
        self._rows: Counter[int] = Counter()
        self._first_bad: dict[int, str] = {}
        self._changed = self._characters = self._pieces = 0
        self._keys: list[bytes] = []
        self._texts: list[str] = []
        self._sources: list[tuple[int, int, int]] = []
        spool = (self.folder / ".kept").open("w", encoding="utf-8", newline="\n")
        with spool, _Report(self._named("dropped.jsonl")) as self._dropped_file, _Report(self._named("rejected.jsonl")) as self._rejected_file:
            self._judge_all(spool)
            gone, groups = self._near_and_contaminated()
        self._write(gone, self._split(gone, groups))
        self._finish(gone)
        return self

    def _named(self, part: str) -> Path:
        """`train.jsonl` in a set's folder, `<stem>.jsonl` where one file was asked for."""
        if self.stem:
            return self.folder / (f"{self.stem}.jsonl" if part == "train.jsonl" else f"{self.stem}.{part}")
        return self.folder / ("train.rejected.jsonl" if part == "rejected.jsonl" else part)

    def source(self, outcome: tuple[int, int, int]) -> str:
        """`<file>:<line>[#<piece>]`."""
        return self.rules.source(Item(outcome[0], outcome[1], None, None, ""), outcome[2])

    # reading and judging

    def _judge_all(self, kept: IO[str]) -> None:
        first: dict[bytes, int] = {}
        for outcomes, tally in _judged(self.rules, self._blocks(), self.workers):
            self.pii += tally.pii
            self.formats += tally.formats
            self._changed += tally.changed
            self._characters += tally.characters
            for outcome in outcomes:
                self._take(outcome, first, kept)

    def _blocks(self) -> Iterator[list[Item]]:
        block: list[Item] = []
        size = 0
        total = sum(f.source.path.stat().st_size for f in self.members)
        with console.progress(f"{self.name}: reading", total) as advance:
            for i in range(len(self.members)):
                for item in _items(i, self.members[i]):
                    block.append(item)
                    length = len(item.content) if isinstance(item.content, str) else 500
                    size += length
                    if len(block) == _BLOCK_ROWS or size >= _BLOCK_CHARS:
                        advance(size)
                        yield block
                        block, size = [], 0
            if block:
                yield block

    def _take(self, outcome: Outcome, first: dict[bytes, int], kept: IO[str]) -> None:
        """Count one outcome and put it where it belongs."""
        file, line, piece = outcome.file, outcome.line, outcome.piece
        if piece:
            self._pieces += 1
        else:
            self._rows[file] += 1
        if outcome.fault:
            self._quarantine(outcome)
        elif outcome.reason:
            self._drop((file, line, piece), outcome.reason, outcome.text)
        elif self.config.dedup and outcome.key in first:
            self._drop((file, line, piece), "duplicates", outcome.text or outcome.row, of=first[outcome.key])
        else:
            first.setdefault(outcome.key, len(self._keys))
            self._keys.append(outcome.key)
            self._sources.append((file, line, piece))
            self._texts.append(outcome.text)
            kept.write(outcome.row + "\n")

    def _quarantine(self, outcome: Outcome) -> None:
        reason, file = str(outcome.reason), outcome.file
        self.quarantined[reason] += 1
        self._first_bad.setdefault(file, f"{self.members[file].name}:{outcome.line} {reason}")
        if reason == "undecodable":
            self.undecodable[file] = (self.undecodable.get(file, (0, 0))[0] + 1, 0)
        self._rejected_file.write({"file": self.members[file].name, "line": outcome.line, "reason": reason, "text": outcome.text})

    def _drop(self, at: tuple[int, int, int], reason: str, text: str, of: int | None = None) -> None:
        self.dropped[reason] += 1
        other = {} if of is None else {"of": self.source(self._sources[of])}
        self._dropped_file.write({"_source": self.source(at), "reason": reason, **other, "text": text[:200]})

    # decisions that need all rows

    def _near_and_contaminated(self) -> tuple[set[int], list[int]]:
        """Rows to drop, and for every row the earlier row whose side of the split it shares (itself where there is none)."""
        gone: set[int] = set()
        groups = list(range(len(self._keys)))
        if len(groups) > 1 and (self.config.near_dedup or self.config.validation_ratio > 0):
            from .dedup import near_duplicates

            for i, keeper in enumerate(near_duplicates(self._texts, threshold=self.config.jaccard_threshold).tolist()):
                if keeper < 0:
                    continue
                groups[i] = keeper
                if self.config.near_dedup:
                    gone.add(i)
                    self._drop(self._sources[i], "near_duplicates", self._texts[i], of=keeper)
        if self.config.decontaminate:
            self._decontaminate(gone)
        return gone, groups

    def _decontaminate(self, gone: set[int]) -> None:
        from .decontaminate import item_of, overlaps

        items = [item_of(r.row) for r in read(self.config.decontaminate) if r.row is not None]
        left = [i for i in range(len(self._texts)) if i not in gone]
        for i, hit in zip(left, overlaps([self._texts[i] for i in left], items), strict=True):
            if hit is not None:
                gone.add(i)
                self._drop(self._sources[i], "contaminated", self._texts[i])

    def _split(self, gone: set[int], groups: list[int]) -> set[int]:
        """Indices of validation rows; rows that resemble each other, or come from one document, stay together."""
        if self.stem or self.config.validation_ratio <= 0:
            return set()
        document: dict[tuple[int, int], int] = {}
        same: dict[bytes, int] = {}
        for i, (file, line, _) in enumerate(self._sources):
            _join(groups, i, document.setdefault((file, line), i))
            _join(groups, i, same.setdefault(self._keys[i], i))
        members: dict[int, list[int]] = {}
        for i in range(len(groups)):
            if i not in gone:
                members.setdefault(_root(groups, i), []).append(i)
        roots = list(members)
        chosen = validation_groups([position(self._keys[r]) for r in roots], self.config.validation_ratio, self.config.validation_min)
        return {i for c in chosen for i in members[roots[c]]}

    # writing

    def _write(self, gone: set[int], validation: set[int]) -> None:
        spool = self.folder / ".kept"
        self._counts = Counter[str]()
        with _Report(self._named("train.jsonl"), always=True) as train, _Report(self._named("validation.jsonl")) as held, spool.open(encoding="utf-8", newline="\n") as f:
            for i, line in enumerate(f):
                if i not in gone:
                    part = "validation" if i in validation else "train"
                    self._counts[part] += 1
                    (held if part == "validation" else train).write_line(line)
        spool.unlink()
        if self.config.to_parquet:
            from .tables import jsonl_to_parquet

            for part in ("train.jsonl", "validation.jsonl"):
                path = self._named(part)
                if path.exists():
                    jsonl_to_parquet(path, path.with_suffix(".parquet"))

    def _finish(self, gone: set[int]) -> None:
        total, kept = sum(self._rows.values()), len(self._keys) - len(gone)
        self.undecodable = {i: (bad, self._rows[i]) for i, (bad, _) in self.undecodable.items()}
        self.stats = {
            "total": total, "added_by_split": self._pieces, "kept": kept, "train": self._counts["train"], "validation": self._counts["validation"],
            "dropped": dict(sorted(self.dropped.items())), "quarantined": dict(sorted(self.quarantined.items())), "texts_changed": self._changed, "characters": self._characters,
        }  # fmt: skip
        if total + self._pieces != kept + self.dropped.total() + self.quarantined.total() or kept != self._counts.total():
            raise SopError(f"the rows of set {self.name} do not add up: {self.stats}", code=BUG)
        for i, member in enumerate(self.members):
            found = {kind: n for (file, kind), n in self.formats.items() if file == i}
            names = "+".join(heapq.nlargest(3, found, key=lambda kind: found[kind])) or "empty"
            self.files.append(
                {"name": member.name, "set": self.name, "format": names, "encoding": member.source.encoding, "rows": self._rows[i], "first_bad": self._first_bad.get(i, "")}
            )


# --- pieces -------------------------------------------------------------------------------------------------------------------------------


class _Report:
    """A JSONL file that exists only where something was written (or `always`)."""

    def __init__(self, path: Path, *, always: bool = False) -> None:
        self._path, self._file = path, (path.open("w", encoding="utf-8", newline="\n") if always else None)

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        self.write_line(dumps(dict(row)) + "\n")

    def write_line(self, line: str) -> None:
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8", newline="\n")
        self._file.write(line)


def _root(groups: list[int], i: int) -> int:
    while groups[i] != i:
        groups[i] = groups[groups[i]]
        i = groups[i]
    return i


def _join(groups: list[int], a: int, b: int) -> None:
    """Put two rows into one group, named by its earliest row."""
    a, b = sorted((_root(groups, a), _root(groups, b)))
    groups[b] = a


def _items(number: int, member: InputFile) -> Iterator[Item]:
    """The records of a file; JSON lines still as text, so that parsing happens in the workers."""
    if member.source.kind == "jsonl":
        for line, text, error in text_lines(member.source.path, member.source.encoding, member.source.max_line_bytes):
            if error or text.strip(" \t\r"):
                yield Item(number, line, None if error else text, error, text[:1000])
        return
    for record in member.source:
        yield Item(number, record.line, record.row, record.error, record.raw)


def _judged(rules: Rules, blocks: Iterator[list[Item]], workers: int) -> Iterator[tuple[list[Outcome], Tally]]:
    """The outcomes of every block in order, from this process or from `workers` others."""
    if workers == 1:
        judge = Judge(rules)
        yield from map(judge.block, blocks)
        return
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # fork is unsafe once a library has started threads
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(rules,)) as pool:
        waiting: deque[Future[tuple[list[Outcome], Tally]]] = deque()
        try:
            for block in blocks:
                waiting.append(pool.submit(work, block))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise SopError("a worker process died (killed, or out of memory?)", fix="run again, with fewer workers if memory is short: --workers 1", code=BUG) from None
            raise
