"""The decisions that need all rows of a set: exact and near-duplicates, split; then the files. Nothing here depends on how many processes or parts brought the rows."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BUG, SopError
from .parts import Parts, Totals
from .perplexity import LEVELS
from .records import dumps
from .rows import SHOWN
from .sets import InputFile
from .split import positions, validation_groups

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .ngrams import Bits, Ints
    from .process import ProcessConfig


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a set: the counts of the funnel, a line about each file, and rows that could not be decoded per file (bad, all)."""

    stats: dict[str, Any]
    files: list[dict[str, Any]]
    pii: dict[str, int]
    undecodable: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Decisions:
    """About every row that passed the rules.

    Attributes:
        equal: the row whose text it repeats, or -1, [rows].
        near: the kept row that it resembles, or -1, [rows].
        gone: dropped for one of these, [rows].
        held: goes to validation, [rows].
    """

    equal: Ints
    near: Ints
    gone: Bits
    held: Bits

    def keeper(self, i: int) -> int:
        """The kept row in whose favour row i was dropped."""
        while self.gone[i]:
            i = int(self.equal[i] if self.equal[i] >= 0 else self.near[i])
        return i


def finish(name: str, members: Sequence[InputFile], config: ProcessConfig, parts: Parts, folder: Path, *, stem: str = "", memory: int) -> Result:
    """Decide about the rows of the parts and write the set into `folder` (`<stem>.jsonl` instead of `train.jsonl` where a stem is given)."""
    made = decide(parts, config, whole=bool(stem), memory=memory)
    files = _Files(folder, stem)
    train, held = _write_rows(parts, made, files)
    _write_reports(parts, made, files)
    if config.to_parquet:
        from .tables import jsonl_to_parquet

        for path in (files("train.jsonl"), files("validation.jsonl")):
            if path.exists():
                jsonl_to_parquet(path, path.with_suffix(".parquet"))
    return _result(name, members, parts.totals, made, train, held)


# --- decisions ----------------------------------------------------------------------------------------------------------------------------


def decide(parts: Parts, config: ProcessConfig, *, whole: bool, memory: int) -> Decisions:
    """Which rows go and which are held out; `whole`: no validation."""
    import numpy as np

    number = len(parts.columns)
    same = _equal(parts.columns)
    equal = same if config.dedup else np.full(number, -1, np.int64)
    near = np.full(number, -1, np.int64)
    left = np.flatnonzero(equal < 0)
    splitting = not whole and config.validation_ratio > 0
    if len(left) > 1 and (config.near_dedup or splitting):
        from .dedup import near_duplicates

        table = parts.table(memory // 4)
        keeper = near_duplicates(parts.texts.pick(left, memory // 4), threshold=config.jaccard_threshold, memory=memory, table=table)
        near[left[keeper >= 0]] = left[keeper[keeper >= 0]]
    gone = equal >= 0
    if config.near_dedup:
        gone = gone | (near >= 0)
    held = _held_out(parts.columns, left, gone, near, same, config) if splitting else np.zeros(number, bool)
    return Decisions(equal, near, gone, held)


def _equal(columns: NDArray[Any]) -> Ints:
    """For each row the first one with its key, or -1 where that is itself."""
    import numpy as np

    high, low = columns["high"], columns["low"]
    order = np.lexsort((low, high))  # stable: within a run the first row comes first
    high, low = high[order], low[order]
    again = np.zeros(len(order), bool)
    again[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    first = order[np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))] if len(order) else order
    out = np.full(len(columns), -1, np.int64)
    out[order[again]] = first[again]
    return out


def _held_out(columns: NDArray[Any], left: Ints, gone: Bits, near: Ints, same: Ints, config: ProcessConfig) -> Bits:
    """Rows for validation; those that resemble or equal each other, or come from one document, stay together. `left`: rows that are no exact duplicates."""
    import numpy as np

    group = np.arange(len(columns))
    file, line = columns["file"][left], columns["line"][left]
    piece = np.flatnonzero((file[1:] == file[:-1]) & (line[1:] == line[:-1])) + 1
    edges = [*zip(left[piece - 1].tolist(), left[piece].tolist(), strict=True)]
    for other in (near, same):
        linked = left[other[left] >= 0]
        edges += zip(other[linked].tolist(), linked.tolist(), strict=True)
    roots: dict[int, int] = {}
    for a, b in edges:
        first, second = sorted((_root(roots, a), _root(roots, b)))
        if first != second:
            roots[second] = first
    for i in list(roots):
        group[i] = _root(roots, i)
    kept = left[~gone[left]]
    owners = np.unique(group[kept])
    keys = np.stack([columns["high"][owners], columns["low"][owners]], axis=1)
    chosen = validation_groups(positions(keys), config.validation_ratio, config.validation_min)
    held = np.zeros(len(columns), bool)
    held[kept] = np.isin(group[kept], owners[chosen])
    return held


def _root(roots: dict[int, int], i: int) -> int:
    while (up := roots.get(i, i)) != i:
        roots[i] = roots.get(up, up)
        i = up
    return i


# --- files --------------------------------------------------------------------------------------------------------------------------------


class _Files:
    """Paths of a set: `train.jsonl` in its folder, or `<stem>.jsonl` where one file was asked for."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem = folder, stem

    def __call__(self, part: str) -> Path:
        if self._stem:
            return self._folder / (f"{self._stem}.jsonl" if part == "train.jsonl" else f"{self._stem}.{part}")
        return self._folder / ("train.rejected.jsonl" if part == "rejected.jsonl" else part)


def _write_rows(parts: Parts, made: Decisions, files: _Files) -> tuple[int, int]:
    """The kept rows, in order; returns how many for training and for validation."""
    import numpy as np

    where = np.where(made.gone, 0, np.where(made.held, 2, 1)).astype(np.uint8)
    with ExitStack() as opened:
        train = opened.enter_context(files("train.jsonl").open("wb"))
        held = opened.enter_context(files("validation.jsonl").open("wb")) if made.held.any() else train
        for side, row in zip(where.tobytes(), parts.rows(), strict=True):
            if side:
                (train if side == 1 else held).write(row)
    return int((where == 1).sum()), int((where == 2).sum())


def _write_reports(parts: Parts, made: Decisions, files: _Files) -> None:
    """Dropped rows in the order of the input, quarantined rows, and clusters of duplicates; a file exists only where it has a line."""
    _write_lines(files("dropped.jsonl"), (line for _, line in heapq.merge(parts.dropped(), _duplicates(parts, made), key=lambda x: x[0])))
    _write_lines(files("rejected.jsonl"), parts.rejected())
    _write_lines(files("clusters.jsonl"), _clusters(parts, made))


def _write_lines(path: Path, lines: Iterator[bytes]) -> None:
    first = next(lines, None)
    if first is not None:
        with path.open("wb") as f:
            f.write(first)
            f.writelines(lines)


def _duplicates(parts: Parts, made: Decisions) -> Iterator[tuple[tuple[int, int, int], bytes]]:
    import numpy as np

    rows = enumerate(parts.rows())
    for i in np.flatnonzero(made.gone).tolist():
        reason, of = ("duplicates", made.equal[i]) if made.equal[i] >= 0 else ("near_duplicates", made.near[i])
        text = parts.texts[i][:SHOWN] or next(row for at, row in rows if at == i).decode()[:SHOWN]
        yield parts.at(i), dumps({"_source": parts.source(i), "reason": reason, "of": parts.source(int(of)), "text": text}).encode() + b"\n"


def _clusters(parts: Parts, made: Decisions) -> Iterator[bytes]:
    """One line for each kept row that stands for others."""
    import numpy as np

    found: dict[int, dict[str, list[int]]] = {}
    for i in np.flatnonzero(made.gone).tolist():
        kind = "duplicates" if made.equal[i] >= 0 else "near_duplicates"
        found.setdefault(made.keeper(i), {}).setdefault(kind, []).append(i)
    for keeper in sorted(found):
        yield dumps({"_source": parts.source(keeper), **{kind: list(map(parts.source, rows)) for kind, rows in sorted(found[keeper].items())}}).encode() + b"\n"


# --- accounts -----------------------------------------------------------------------------------------------------------------------------


def _result(name: str, members: Sequence[InputFile], totals: Totals, made: Decisions, train: int, held: int) -> Result:
    dropped = totals.dropped.copy()
    dropped["duplicates"] += int((made.equal >= 0).sum())
    dropped["near_duplicates"] += int((made.gone & (made.equal < 0)).sum())
    total, kept = totals.rows.total(), int((~made.gone).sum())
    stats = {
        "total": total, "added_by_split": totals.pieces, "kept": kept, "train": train, "validation": held,
        "dropped": {k: n for k, n in sorted(dropped.items()) if n}, "quarantined": dict(sorted(totals.quarantined.items())),
        "texts_changed": totals.changed, "characters": totals.characters,
    }  # fmt: skip
    if totals.model:
        stats["perplexity"] = {**totals.model, "texts": {low: totals.perplexity[low] for low in map(str, LEVELS) if totals.perplexity[low]}}
    if total + totals.pieces != kept + dropped.total() + totals.quarantined.total() or kept != train + held:
        raise SopError(f"the rows of set {name} do not add up: {stats}", code=BUG)
    return Result(
        stats=stats, files=list(_about_files(name, members, totals)), pii=dict(totals.pii),
        undecodable={int(i): (bad, totals.rows[i]) for i, bad in totals.undecodable.items() if bad},
    )  # fmt: skip


def _about_files(name: str, members: Sequence[InputFile], totals: Totals) -> Iterator[dict[str, Any]]:
    for i, member in enumerate(members):
        found = {key.partition(":")[2]: n for key, n in totals.formats.items() if key.partition(":")[0] == str(i)}
        names = "+".join(heapq.nlargest(3, found, key=lambda kind: found[kind])) or "empty"
        first_bad = totals.first_bad.get(str(i), "")
        yield {"name": member.name, "set": name, "format": names, "encoding": member.source.encoding, "rows": totals.rows[str(i)], "first_bad": first_bad}
