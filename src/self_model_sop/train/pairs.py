"""Preference rows -> pairs of token ids: one prompt, a chosen and a rejected answer, each closed by its end marker. Every row is counted: kept, or dropped with a reason."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from .. import errors
from ..artifact import write_atomic
from ..console import note, progress, warn
from ..data import records
from ..data.formats import RowError, to_preference, tools_of
from ..errors import SopError
from ..workers import ordered
from . import cache, proof
from .cache import Cache
from .corpus import blocks, some, source_of, workers_for
from .settings import Overlong

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # as TRL's collators name them
_FILE, _META = "pairs.arrow", "meta.json"


class Pair(NamedTuple):
    """Token ids of what both texts begin with, and of the two answers up to and with their end markers; `cut`: an answer lost its end at max_length."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    cut: bool = False


@dataclass(frozen=True)
class PairSet:
    """Pairs on disk.

    Args:
        folder: an Arrow stream with `COLUMNS` (lists of int32) and `example`, the number of the pair; the source of each pair in `sources.txt`.
        meta: counts and the reasons of what was dropped.
    """

    folder: Path
    meta: dict[str, Any]

    def __len__(self) -> int:
        return int(self.meta["examples"])

    @functools.cached_property
    def dataset(self) -> Any:
        """The pairs as a memory-mapped `datasets.Dataset`, which is what TRL's trainers take."""
        import datasets

        datasets.disable_caching()  # what a trainer derives from the pairs is not written beside them: other runs share that folder
        return datasets.Dataset.from_file(str(self.folder / _FILE))

    def digests(self) -> Iterator[bytes]:
        """A hash of the tokens of each pair."""
        return (_key(*(row[name] for name in COLUMNS)) for row in self.dataset)

    def names(self, indices: Sequence[int]) -> list[str]:
        """Where pairs came from; read from disk, since it is asked for in errors only."""
        lines = (self.folder / "sources.txt").read_text(encoding="utf-8").split("\n")
        return [lines[i] for i in indices]


@dataclass(frozen=True)
class Limits:
    """How pairs are made.

    Args:
        max_length: tokens of the prompt with one answer.
        overlong: cut longer answers, or drop the pair.
        whole: answers are judged as a whole: they may hold several turns, and are never cut.
    """

    max_length: int
    overlong: Overlong = "truncate"
    whole: bool = False


def render(renderer: Any, row: dict[str, Any], limits: Limits) -> Pair:
    """The pair of a row. `renderer` marks the last assistant turn (`train_on: last`).

    Raises:
        RowError: identical_answers, empty_chosen, empty_rejected, several_turns, prompt_too_long, too_long, equal_before_the_cut, or what reading the row raises.
    """
    prompt, chosen, rejected = to_preference(row)
    for part, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[-1]["role"] != "assistant" or (not str(answer[-1].get("content") or "").strip() and not answer[-1].get("tool_calls")):
            raise RowError(f"empty_{part}")
        if len(answer) > 1 and not limits.whole:
            raise RowError("several_turns")
    if chosen == rejected:
        raise RowError("identical_answers")
    tools = tools_of(row)
    first, second = (_closed(renderer.render([*prompt, *answer], tools=tools)) for answer in (chosen, rejected))
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first[0], second[0], strict=False)))
    start = min(first[1], second[1], same)
    return _fitted(Pair(first[0][:start], first[0][start:], second[0][start:]), limits)


def _closed(rendered: Any) -> tuple[list[int], int]:
    """(Ids up to and with the last answer's end marker, where that answer begins)."""
    learned = [i for i, on in enumerate(rendered.supervised) if on]
    if not learned:
        raise RowError("template_refuses")
    return rendered.ids[: learned[-1] + 1], learned[0]


def _fitted(pair: Pair, limits: Limits) -> Pair:
    if pair.chosen == pair.rejected:
        raise RowError("identical_answers")
    room = limits.max_length - len(pair.prompt)
    if max(len(pair.chosen), len(pair.rejected)) <= room:
        return pair
    if limits.whole or limits.overlong == "drop":
        raise RowError("too_long")
    if room < 1:
        raise RowError("prompt_too_long")
    if pair.chosen[:room] == pair.rejected[:room]:
        raise RowError("equal_before_the_cut")
    return Pair(pair.prompt, pair.chosen[:room], pair.rejected[:room], cut=True)


def prove(renderer: Any, files: Sequence[Path], *, rows: int = proof.PREFLIGHT_ROWS) -> proof.LintReport:
    """Check the first pairs of a run's data as fine-tuning checks its rows: decoded again, what is learned must be the answers and their end markers.

    Raises:
        SopError: where it is not (exit 3).
    """
    report = proof.check(renderer, conversations(files, rows))
    for remark in report.notes:
        note(f"first {report.total:,} answers: {remark}")
    return report.require() if report.unproven else report


def conversations(files: Sequence[Path], rows: int | None = None) -> Iterator[dict[str, Any]]:
    """Both conversations of each pair of the first `rows` rows; rows that are no pairs are counted when they are rendered."""
    for record in islice(records.read(files), rows):
        try:
            prompt, *answers = to_preference(record.row or {})
        except RowError:
            continue
        for part, answer in zip(("chosen", "rejected"), answers, strict=True):
            yield {"messages": [*prompt, *answer], "tools": tools_of(record.row or {}), "_source": f"{source_of(record)} ({part})"}


# --- files ---------------------------------------------------------------------------------------------------------------------------------


def read(files: Sequence[Path], store: Cache, renderer: Any, limits: Limits, *, max_samples: int | None = None, workers: int | None = 1) -> PairSet:
    """The pairs of every row of `files`, rendered in `workers` processes (None: by the size of the files), or found in `store`. Collective.

    Raises:
        SopError: where no pair is left to train on (exit 3).
    """

    def write(folder: Path) -> None:
        meta = _nothing()
        with progress(f"tokenise {files[0].name}", unit="rows") as advance:
            prepare = functools.partial(_rendering, renderer=renderer, limits=limits)
            rendered = ordered(prepare, blocks(some(files, max_samples)), workers or workers_for(files), key="data.workers=1")
            _write(folder, _counted(chain.from_iterable(rendered), meta, advance))
        write_atomic(folder / _META, json.dumps(meta, ensure_ascii=False))

    asked = cache.key(files, renderer.tokenizer, kind="pairs", **renderer.identity, **dataclasses.asdict(limits), max_samples=max_samples)
    folder, _ = store.folder(asked, write)
    return _checked(PairSet(folder, json.loads((folder / _META).read_text(encoding="utf-8"))), files)


def count(files: Sequence[Path], renderer: Any, limits: Limits, rows: int | None = None) -> dict[str, Any]:
    """What `read` would find in the first `rows` rows, without writing it."""
    meta = _nothing()
    found = ((_one(record, renderer, limits), source_of(record)) for record in islice(records.read(files), rows))
    for _ in _counted(found, meta, lambda: None):
        pass
    return meta


def _nothing() -> dict[str, Any]:
    return {"total": 0, "truncated": 0, "dropped": Counter[str](), "tokens": 0, "examples": 0, "chosen_longer": 0, "repeated": 0, "contradicting": 0}


Found = tuple[str | Pair, str]  # a pair or the reason of its absence, and where it came from


def _rendering(renderer: Any, limits: Limits) -> Callable[[list[records.Record]], list[Found]]:
    return lambda block: [(_one(record, renderer, limits), source_of(record)) for record in block]


def _one(record: records.Record, renderer: Any, limits: Limits) -> str | Pair:
    if record.row is None:
        return record.error or "malformed"
    try:
        return render(renderer, record.row, limits)
    except RowError as error:
        return error.reason
    except SopError:
        return "template_refuses"


def _counted(rows: Iterator[Found], meta: dict[str, Any], advance: Any) -> Iterator[tuple[Pair, str]]:
    """The pairs; what is dropped is counted, and so are pairs that stand there twice, or once more with the answers exchanged."""
    seen: set[bytes] = set()
    for found, source in rows:
        meta["total"] += 1
        advance()
        if isinstance(found, str):
            meta["dropped"][found] += 1
            continue
        meta["truncated"] += found.cut
        meta["tokens"] += 2 * len(found.prompt) + len(found.chosen) + len(found.rejected)
        meta["examples"] += 1
        meta["chosen_longer"] += len(found.chosen) > len(found.rejected)
        meta["repeated"] += _key(found.prompt, found.chosen, found.rejected) in seen
        meta["contradicting"] += _key(found.prompt, found.rejected, found.chosen) in seen
        seen.add(_key(found.prompt, found.chosen, found.rejected))
        yield found, source


def _key(*parts: list[int]) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=12).digest()


def _write(folder: Path, pairs: Iterator[tuple[Pair, str]]) -> None:
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    schema = pa.schema([*((name, ids) for name in COLUMNS), ("example", pa.int64())])
    with (folder / "sources.txt").open("w", encoding="utf-8") as sources, pa.OSFile(str(folder / _FILE), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
        block: list[tuple[Pair, str]] = []
        written = 0

        def flush() -> None:
            nonlocal written
            columns = [pa.array([pair[i] for pair, _ in block], ids) for i in range(3)]
            out.write_batch(pa.record_batch([*columns, pa.array(range(written, written + len(block)), pa.int64())], schema=schema))
            sources.writelines(source.replace("\n", " ") + "\n" for _, source in block)
            written += len(block)
            block.clear()

        for item in pairs:
            block.append(item)
            if len(block) == 1000:
                flush()
        if block:
            flush()


def told(meta: dict[str, Any]) -> list[str]:
    """The counts in words, and what is worth knowing of the pairs."""
    dropped = ", ".join(f"{reason} {n:,}" for reason, n in sorted(meta["dropped"].items()))
    out = [f"{meta['total']:,} rows, {meta['examples']:,} pairs, {meta['tokens']:,} tokens" + (f"; dropped: {dropped}" if dropped else "")]
    if meta["truncated"]:
        out.append(f"{meta['truncated']:,} pairs have an answer that is cut at max_length")
    if sum(meta["dropped"].values()) > meta["total"] / 2:
        out.append("more than half of the rows were dropped")
    if meta["contradicting"]:
        out.append(f"{meta['contradicting']:,} pairs stand there with their answers exchanged too: nothing can be learned from those")
    if meta["repeated"]:
        out.append(f"{meta['repeated']:,} pairs are repeated")
    longer = meta["chosen_longer"] / max(meta["examples"], 1)
    if meta["examples"] >= 50 and not 0.2 <= longer <= 0.8:
        out.append(f"the chosen answer is the longer one in {longer:.0%} of the pairs: length alone would tell them apart")
    return out


def _checked(made: PairSet, files: Sequence[Path]) -> PairSet:
    """Say what was found.

    Raises:
        SopError: where nothing is left (exit 3).
    """
    first, *more = told(made.meta)
    note(f"{', '.join(p.name for p in files)}: {first}")
    if not len(made):
        fix = "rows need a prompt, a chosen and a rejected answer that differ (sop data preference makes them); or look at data.max_length"
        reasons = ", ".join(f"{k} {v:,}" for k, v in sorted(made.meta["dropped"].items()))
        raise SopError(f"no pair is left to learn from: {reasons or 'the file has no rows'}", where=", ".join(map(str, files)), fix=fix, code=errors.DATA)
    for text in more:
        warn(text)
    return made
