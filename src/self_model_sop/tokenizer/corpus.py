"""`sop tokenizer corpus`: training and held-out text for the tokenizer, out of processed data."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from .. import console
from ..data.formats import RowError, to_text
from ..data.records import files_of, read
from ..errors import DATA, SopError
from ..stage import Artifact, Run, stage_main
from .earlier import TokenizerStage
from .settings import CorpusConfig, TokenizerConfig

TRAIN = "train.jsonl"
HELD_OUT = "heldout.jsonl"
_SHARED_NAMES = ("train", "validation", "valid", "dev", "test", "data")


class Document(NamedTuple):
    """One text of the corpus."""

    text: str
    source: str
    weight: float


def documents(path: Path, every: int | None = None) -> Iterator[Document]:
    """The documents of a corpus file; with `every` = n at most n of them, evenly spread."""
    rows = every and sum(1 for _ in path.open("rb"))
    with path.open(encoding="utf-8") as f:
        for number, line in enumerate(f):
            if not every or not rows or rows <= every or (number * every) // rows != ((number - 1) * every) // rows:
                row = json.loads(line)
                yield Document(row["text"], row["source"], row["weight"])


# --- reading ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Every row read is kept, dropped with a reason, or quarantined (unreadable)."""

    total: int = 0
    kept: int = 0
    quarantined: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def stats(self) -> dict[str, Any]:
        if self.total != self.kept + self.quarantined + sum(self.dropped.values()):
            raise AssertionError("rows do not add up")
        return {"total": self.total, "kept": self.kept, "dropped": dict(sorted(self.dropped.items())), "quarantined": self.quarantined}


def _files(settings: CorpusConfig) -> list[tuple[Path, str]]:
    """Data files with their source name. A file beside a JSONL of the same stem is the same data again."""
    found = [p for root in settings.inputs for p in files_of(root)]
    stems = {p.with_suffix("") for p in found if p.suffix == ".jsonl"}
    return [(p, source_of(p)) for p in found if p.suffix == ".jsonl" or p.with_suffix("") not in stems]


def source_of(path: Path) -> str:
    """The file's stem; for `train`, `validation` and the like the name of the set's folder."""
    stem = path.name.split(".")[0]
    return path.parent.name if stem.startswith(_SHARED_NAMES) else stem


def is_validation(path: Path) -> bool:
    """True for files that only measuring may see."""
    return path.name.startswith(("validation", "valid.", "dev.", "test"))


def _texts(settings: CorpusConfig, tally: Tally, *, validation: bool) -> Iterator[Document]:
    for path, source in _files(settings):
        if is_validation(path) != validation:
            continue
        weight = settings.weights.get(source, settings.weights.get(path.name, settings.weights.get(path.stem, 1.0)))
        for record in read(path):
            tally.total += 1
            if record.row is None:
                tally.quarantined += 1
                continue
            try:
                text = to_text(record.row, settings.text_fields).strip()
            except RowError as error:
                tally.dropped[error.reason] += 1
                continue
            if text and weight > 0:
                yield Document(text, source, weight)
            else:
                tally.dropped["empty" if not text else "weight_zero"] += 1


class _Hashed(NamedTuple):
    key: bytes
    sample: float  # in [0, 1): kept where below the sampling rate
    split: float  # in [0, 1): held out where below the share


def _hashed(text: str) -> _Hashed:
    digest = hashlib.sha256(text.encode()).digest()
    return _Hashed(digest[16:], int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:16], "big") / 2**64)


def _rate(settings: CorpusConfig) -> float:
    """Share of documents that keeps the corpus below `max_chars`."""
    files = [p for p, _ in _files(settings)]
    plain = all(p.suffix not in (".gz", ".zst", ".parquet") for p in files)
    if plain and sum(p.stat().st_size for p in files) <= settings.max_chars:
        return 1.0
    chars = sum(len(d.text) for v in (True, False) for d in _texts(settings, Tally(), validation=v))
    return min(1.0, settings.max_chars / max(1, chars))


# --- writing ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Out:
    """One of the two files, with counts by source."""

    file: TextIO
    rows: Counter[str] = field(default_factory=Counter)
    chars: Counter[str] = field(default_factory=Counter)

    def write(self, document: Document) -> None:
        self.file.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
        self.rows[document.source] += 1
        self.chars[document.source] += len(document.text)


def build(run: Run[TokenizerConfig]) -> dict[str, Any]:
    """Validation files first (held out whole), then everything else by content hash; each text once."""
    settings, tally = run.config.corpus, Tally()
    rate, seen = _rate(settings), set[bytes]()
    weights: dict[str, float] = {}
    nearest: tuple[float, Document] | None = None
    with (run.work / TRAIN).open("w", encoding="utf-8", newline="\n") as a, (run.work / HELD_OUT).open("w", encoding="utf-8", newline="\n") as b:
        train, held = _Out(a), _Out(b)
        for validation in (True, False):
            for document in console.track(_texts(settings, tally, validation=validation), "read held-out" if validation else "read"):
                mark = _hashed(document.text)
                if mark.key in seen or mark.sample >= rate:
                    tally.dropped["duplicate" if mark.key in seen else "sampled_out"] += 1
                    continue
                seen.add(mark.key)
                tally.kept += 1
                weights[document.source] = document.weight
                if not validation and (nearest is None or mark.split < nearest[0]):
                    nearest = (mark.split, document)
                (held if validation or mark.split < settings.held_out else train).write(document)
    if not held.rows and nearest and tally.kept > 1:
        _hold_out(run.work, nearest[1], train, held)
    return _stats(tally, train, held, weights, settings)


def _hold_out(folder: Path, document: Document, train: _Out, held: _Out) -> None:
    """Move one document to the empty held-out file of a very small corpus."""
    line = json.dumps(document._asdict(), ensure_ascii=False) + "\n"
    lines = (folder / TRAIN).read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold U+2028
    (folder / TRAIN).write_text("\n".join(x for x in lines if x != line.rstrip("\n")), encoding="utf-8", newline="\n")
    (folder / HELD_OUT).write_text(line, encoding="utf-8")
    for out, change in ((train, -1), (held, 1)):
        out.rows[document.source] += change
        out.chars[document.source] += change * len(document.text)


def _stats(tally: Tally, train: _Out, held: _Out, weights: Mapping[str, float], settings: CorpusConfig) -> dict[str, Any]:
    if not sum(train.rows.values()) or not sum(held.rows.values()):
        what = f"no text for the tokenizer: {tally.stats()}"
        where = ", ".join(map(str, settings.inputs))
        raise SopError(what, where=where, fix="process data first (sop data process ...), or name files with corpus.inputs; two documents at the least", code=DATA)
    sources = {
        name: {"weight": weights[name], "train_rows": train.rows[name], "train_chars": train.chars[name], "heldout_rows": held.rows[name], "heldout_chars": held.chars[name]}
        for name in sorted(weights)
    }
    return {"rows": tally.stats(), "sources": sources, "train_chars": sum(train.chars.values()), "heldout_chars": sum(held.chars.values())}


# --- the stage ----------------------------------------------------------------------------------------------------------------------------


def inputs(config: TokenizerConfig) -> Mapping[str, Path]:
    """The processed data."""
    for path in config.corpus.inputs:
        if not path.exists():
            raise SopError("no such file or folder", where=str(path), fix="process data first (sop data process ...), or name files with corpus.inputs")
    return {f"input {n}": path for n, path in enumerate(config.corpus.inputs)}


def summary(done: Artifact) -> list[str]:
    """What was read, by source."""
    s, rows = done.stats, done.stats["rows"]
    dropped = ", ".join(f"{k} {v}" for k, v in rows["dropped"].items()) or "none"
    lines = [f"{name}: {v['train_chars']:,} characters to learn from, {v['heldout_chars']:,} held out, weight {v['weight']}" for name, v in s["sources"].items()]
    return [*lines, f"rows: {rows['total']} read, {rows['kept']} kept, {rows['quarantined']} unreadable, dropped: {dropped}"]


STAGE = TokenizerStage(
    name="tokenizer.corpus", version=2, config=TokenizerConfig, output=lambda c: c.below("corpus"), build=build, inputs=inputs, uses=("corpus",),
    plan=lambda c: [f"read {', '.join(map(str, c.corpus.inputs))}"], summary=summary, next=lambda c: "sop tokenizer train",
)  # fmt: skip


def run(config: TokenizerConfig) -> Artifact:
    """Collect the corpus."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop tokenizer corpus`."""
    return stage_main(STAGE, argv)
