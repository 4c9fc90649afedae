"""`sop data inspect`: what `data.process` did, on one page: the funnel by reason, histograms, examples of everything that went, clusters of duplicates, before and after.

Everything is read from the artifact (manifest, kept rows, dropped.jsonl, clusters.jsonl); the raw input is looked at for before and after only, where it is still there.
"""

from __future__ import annotations

import heapq
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from .. import artifact, console, errors
from ..config import option
from ..errors import SopError
from ..redact import redact
from ..stage import Verb, guarded, load_for, parse_arguments
from . import inspect_page, pii
from .formats import RowError, to_text
from .records import files_of, source
from .sets import SETS

LENGTHS = (0, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)  # lower ends of the bars, characters
_BLOCK = 500
_RAW = 20_000  # rows of an input file among which before and after are looked for
_LABEL = re.compile("|".join(re.escape(rule.label) for rule in pii.RULES.values()))
_CLUSTERS, _MEMBERS = 10, 5


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is shown, and where the page goes."""

    input: Path = option(Path("data_process/final_data"), "an artifact of data.process or data.preference: its folder, or the one file it wrote", path="input", flag="--input")
    html: Path | None = option(None, "where the page goes; none: <input>.inspect.html", path="output", flag="--html")
    samples: int = option(20, "examples of each kind; 0: no text of the data", flag="--samples")
    max_rows: int = option(200_000, "rows of a set that the histograms look at, evenly spread", flag="--max_rows")


@dataclass
class SetView:
    """What the page says about one set."""

    name: str
    stats: dict[str, Any]
    lengths: list[int] = field(default_factory=lambda: [0] * len(LENGTHS))
    han: list[int] = field(default_factory=lambda: [0] * 10)
    looked_at: int = 0
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # reason -> (where, text)
    quarantined: list[tuple[str, str, str]] = field(default_factory=list)  # where, reason, text
    clusters: list[tuple[int, list[tuple[str, str, str]]]] = field(default_factory=list)  # size, (what, where, text) of the kept row and some others
    personal: list[tuple[str, str]] = field(default_factory=list)  # where, context of a label
    changed: list[tuple[str, str, str]] = field(default_factory=list)  # where, before, after


@dataclass(frozen=True)
class _Place:
    """The files of one set."""

    folder: Path
    stem: str

    def file(self, part: str) -> Path:
        if self.stem:
            return self.folder / (f"{self.stem}.jsonl" if part == "train.jsonl" else f"{self.stem}.{part}")
        return self.folder / ("train.rejected.jsonl" if part == "rejected.jsonl" else part)

    def rows(self, *parts: str) -> Iterator[dict[str, Any]]:
        for part in parts:
            if self.file(part).exists():
                with self.file(part).open(encoding="utf-8", newline="\n") as f:
                    yield from map(json.loads, f)


def inspect(config: Config) -> tuple[dict[str, Any], list[SetView]]:
    """The manifest, and a view of each set.

    Raises:
        SopError: where `input` is no complete artifact of these stages.
    """
    target = artifact.Target(config.input) if config.input.is_dir() else artifact.Target(config.input.parent, config.input.name.removesuffix(".jsonl"))
    manifest = artifact.read_manifest(target.manifest)
    if manifest is None or manifest["stage"] not in ("data.process", "data.preference") or "sets" not in manifest["stats"]:
        raise SopError("no finished artifact of sop data process or sop data preference", where=str(config.input), fix="give its output folder, or the file written with --output")
    views = []
    for name, stats in sorted(manifest["stats"]["sets"].items(), key=lambda x: SETS.index(x[0]) if x[0] in SETS else len(SETS)):
        folder = target.folder if target.group or manifest["config"].get("subdir") else target.folder / name
        views.append(_view(name, stats, _Place(folder, target.group or ""), manifest, config))
    return manifest, views


def _view(name: str, stats: dict[str, Any], place: _Place, manifest: Mapping[str, Any], config: Config) -> SetView:
    view = SetView(name, stats)
    chosen = heapq.nlargest(_CLUSTERS, place.rows("clusters.jsonl"), key=_members) if config.samples else []
    wanted = {where for cluster in chosen for where in [cluster["_source"], *_some(cluster, "duplicates"), *_some(cluster, "near_duplicates")]}
    texts = _dropped(view, place, wanted, config.samples)
    kept = _kept(view, place, wanted, texts, manifest, config)
    for cluster in chosen:
        lines = [("kept", cluster["_source"])] + [(kind, where) for kind in ("duplicates", "near_duplicates") for where in _some(cluster, kind)]
        view.clusters.append((1 + _members(cluster), [(what, where, texts.get(where, "")) for what, where in lines]))
    if config.samples:
        view.quarantined = [(f"{r['file']}:{r['line']}", r["reason"], _safe(r["text"])) for r in islice(place.rows("rejected.jsonl"), config.samples)]
        view.changed = list(islice(_before_and_after(manifest, kept), config.samples))
    return view


def _members(cluster: Mapping[str, Any]) -> int:
    return len(cluster.get("duplicates", ())) + len(cluster.get("near_duplicates", ()))


def _some(cluster: Mapping[str, Any], kind: str) -> list[str]:
    return list(cluster.get(kind, ()))[:_MEMBERS]


def _safe(text: str) -> str:
    """A text for the page: short, without personal data and credentials, whatever the run's own setting was."""
    return redact(pii.mask(text[: inspect_page.WINDOW], tuple(pii.RULES))[0])


def _dropped(view: SetView, place: _Place, wanted: set[str], samples: int) -> dict[str, str]:
    """Fill in examples by reason (a seeded sample); returns the texts of the wanted sources."""
    texts: dict[str, str] = {}
    draw, seen = random.Random(0), dict.fromkeys(view.stats["dropped"], 0)
    for row in place.rows("dropped.jsonl"):
        where, reason = row["_source"], row["reason"]
        if where in wanted:
            texts[where] = _safe(row["text"])
        if not samples:
            continue
        seen[reason] = seen.get(reason, 0) + 1
        examples = view.examples.setdefault(reason, [])
        at = len(examples) if len(examples) < samples else draw.randrange(seen[reason])
        if at < samples:
            examples[at : at + 1] = [(f"{where} = {row['of']}" if "of" in row else where, _safe(row["text"]))]
    return texts


def _kept(view: SetView, place: _Place, wanted: set[str], texts: dict[str, str], manifest: Mapping[str, Any], config: Config) -> dict[str, str]:
    """Fill in the histograms and contexts of masked personal data, and the texts of the wanted sources; returns some kept texts by source."""
    from .batch import Batch
    from .characters import HAN, HANGUL, KANA, LETTER
    from .filters import counts_of

    fields = tuple(manifest["config"].get("text_fields") or ())
    every = max(1, view.stats["kept"] // config.max_rows)
    kept: dict[str, str] = {}
    block: list[str] = []

    def count() -> None:
        for text, found in zip(block, counts_of(Batch(block)), strict=True):
            letters = found[HAN] + found[LETTER] + found[KANA] + found[HANGUL]
            view.lengths[max(i for i, low in enumerate(LENGTHS) if len(text) >= low)] += 1
            view.han[min(9, 10 * found[HAN] // max(1, letters))] += 1
        view.looked_at += len(block)
        block.clear()

    for i, row in enumerate(place.rows("train.jsonl", "validation.jsonl")):
        where = str(row["_source"])
        if i % every and where not in wanted:
            continue
        text = to_text(row, ("text",) if fields else ())
        if where in wanted:
            texts[where] = _safe(text)
        if i % every:
            continue
        if len(view.personal) < config.samples and (label := _LABEL.search(text)):
            view.personal.append((where, _safe(text[max(0, label.start() - 40) : label.end() + 40])))
        if len(kept) < _RAW:
            kept[where] = text
        block.append(text)
        if len(block) == _BLOCK:
            count()
    if block:
        count()
    return kept


def _before_and_after(manifest: Mapping[str, Any], kept: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(where, before, after) of kept rows that cleaning or masking changed, where the input is still there."""
    columns, fields = manifest["config"].get("columns") or {}, tuple(manifest["config"].get("text_fields") or ())
    encodings = {f["name"]: f["encoding"] for f in manifest["stats"]["files"]}
    for path in _inputs(manifest):
        name = next((n for n in encodings if str(path).endswith(n)), None)
        if name is None:
            continue
        for record in islice(iter(source(path, encodings[name] or "auto")), _RAW):
            after = kept.get(f"{name}:{record.line}")
            if after is None or record.row is None:
                continue
            try:
                before = to_text({columns.get(k, k): v for k, v in record.row.items()}, fields)
            except RowError:
                continue
            if before != after:
                at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
                begin = max(0, at - 40)
                shown = _safe(before[begin:]), _safe(after[begin:])
                if shown[0] != shown[1]:  # else only personal data was masked, which has a place of its own
                    yield f"{name}:{record.line}", *shown


def _inputs(manifest: Mapping[str, Any]) -> list[Path]:
    paths = [Path(entry["path"]) for name, entry in manifest["inputs"].items() if name.startswith("input ")]
    return files_of(p for p in paths if p.exists())


VERB = Verb(name="data.inspect", config=Config)


def page_of(config: Config) -> Path:
    """Where the page goes: beside the artifact, so that it is no part of it."""
    return config.html or config.input.with_name(f"{config.input.name}.inspect.html")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sop data inspect`."""

    def work() -> int:
        args, settings = parse_arguments(VERB, list(sys.argv[1:] if argv is None else argv))
        config = load_for(VERB, args.config, settings).config
        manifest, views = inspect(config)
        page = page_of(config)
        page.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_atomic(page, inspect_page.render(manifest, views))
        console.say(f"page: {page}")
        return errors.OK

    return guarded(work)


