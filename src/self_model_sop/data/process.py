"""`data.process`: clean, filter, deduplicate, split. Structure goes in and comes out; every row is accounted for.

total + pieces of split documents = kept + dropped by reason + quarantined, checked before anything is published.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .. import console
from ..artifact import Target
from ..config import option
from ..errors import DATA, SopError
from ..stage import Artifact, Run, Stage, stage_main
from . import dedup_key, perplexity
from .clean import CleanConfig, cleaner
from .decontaminate import Choice
from .dedup_key import DedupKeyConfig
from .encodings import MAX_LINE_BYTES, likely_encoding
from .filters import FilterConfig
from .pii import DEFAULT_RULES, RULES
from .records import read
from .rows import Rules
from .sets import InputFile, Sets, find

_MIN_CHARS = {"pretrain": 10}  # an answer may be one character, a document may not
_CODECS = ("utf-8", "gb18030", "utf-16", "big5")
ALWAYS_SHOWN = ("duplicates", "near_duplicates", "too_short", "too_long")


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """`process:` the documented settings."""

    min_chars: int | None = option(None, "rows with fewer characters are dropped (too_short); none: 10 for pretraining text, 2 for other rows", flag="--min_chars")
    max_chars: int = option(100_000, "longer dialogues are dropped (too_long), longer pretraining documents split", flag="--max_chars")
    split_long: bool = option(True, "split pretraining documents longer than max_chars at paragraph borders; off: drop them", flag="--split_long")
    max_turns: int | None = option(None, "dialogues with more user turns are dropped; none: any number", flag="--max_turns")
    dedup: bool = option(True, "drop rows whose text repeats an earlier one (width, case, traditional/simplified and whitespace folded)", flag="--dedup")
    near_dedup: bool = option(True, "drop rows whose character 5-grams are nearly those of an earlier one", flag="--near_dedup")
    jaccard_threshold: float = option(0.8, "how similar: Jaccard of the 5-gram sets, exact", flag="--jaccard_threshold")
    dedup_key: DedupKeyConfig = option(factory=DedupKeyConfig)
    sentiment_filter: bool = option(False, "drop abuse and angry spam by a small lexicon (data/filters.py says the rule)", flag="--sentiment_filter")
    to_parquet: bool = option(False, "write Parquet beside JSONL", flag="--to_parquet")
    validation_ratio: float = option(0.05, "share of rows for validation, by content hash; 0: none", flag="--validation_ratio")
    validation_min: int = option(8, "small sets get so many validation rows, but never more than a fifth")
    decontaminate: tuple[Path, ...] = option((), "evaluation files; rows that share 13 letters in a row with an item are dropped", path="input", flag="--decontaminate")
    pii: Literal["mask", "drop", "keep"] = option("mask", "personal data: replaced by a label, or the row dropped, or left", flag="--pii")
    pii_rules: tuple[str, ...] = option(DEFAULT_RULES, f"which kinds; known: {', '.join(RULES)}")
    max_bad_ratio: float = option(0.01, "more unreadable rows than this share (and more than 10) stop the run with exit code 3", flag="--max_bad_ratio")


@dataclass(frozen=True, kw_only=True)
class Config:
    """config/data_config/process.yaml."""

    input: tuple[Path, ...] | Path = option((Path("data_process/fetch_data"),), "a file, several files, or a folder", path="input", flag="--input")
    output_dir: Path = option(Path("data_process/final_data"), "sets go to <output_dir>/<set>/", path="output", flag="--output_dir")
    subdir: str | None = option(None, "put everything into this one set: pretrain, finetune, reward; none: by subfolder, else by the rows' format", flag="--subdir")
    output: Path | None = option(None, "write the kept rows to this one file instead, without a validation part", path="output", flag="--output")
    encoding: Literal["auto", "utf-8", "gb18030", "gbk", "utf-16", "big5"] = option("auto", "auto: per file, UTF-8 else GB18030, or by byte order mark", flag="--encoding")
    text_fields: tuple[str, ...] = option((), "fields that make up the text of pretraining rows; empty: by the format", flag="--text_fields")
    columns: dict[str, str] = option(help="their field name -> ours (question: instruction)", factory=dict)
    max_line_bytes: int = option(MAX_LINE_BYTES, "longer lines are quarantined")
    process: ProcessConfig = option(factory=ProcessConfig)
    clean: CleanConfig = option(factory=CleanConfig)
    filters: FilterConfig = option(factory=FilterConfig)
    workers: int = option(1, "processes; the result is the same for any number", cosmetic=True, flag="--workers")
    memory: float = option(2.0, "GiB that looking for duplicates may take; what does not fit is read from disk or computed again", cosmetic=True, flag="--memory")
    shard: str | None = option(None, "i/n: work only on the i-th of n parts of the input, for a later --merge n", flag="--shard")
    merge: int | None = option(None, "put n parts made with --shard together; the result is that of one run", cosmetic=True, flag="--merge")

    def inputs(self) -> list[Path]:
        """The input paths as a list."""
        return [self.input] if isinstance(self.input, Path) else list(self.input)

    def _evaluation_items(self) -> tuple[str | Choice, ...]:
        from .decontaminate import item_of

        return tuple(item_of(r.row) for r in read(self.process.decontaminate) if r.row is not None)

    def _perplexity_filter(self, name: str) -> perplexity.PerplexityFilter | None:
        """The trained filter of a set that may hold pretraining text."""
        config = self.filters.perplexity
        return perplexity.train(config, cleaner(self.clean, pretrain=True)) if config.sample and name not in ("finetune", "reward") else None

    def rules(self, name: str, members: Sequence[InputFile]) -> Rules:
        """The rules for the rows of one set."""
        p = self.process
        least = p.min_chars if p.min_chars is not None else _MIN_CHARS.get(name, 2)
        return Rules(
            set_name=name, min_chars=least, max_chars=p.max_chars, max_turns=p.max_turns, split_long=p.split_long, sentiment=p.sentiment_filter, text_fields=self.text_fields,
            columns=self.columns, clean=self.clean, filters=self.filters, pii=p.pii, pii_rules=p.pii_rules, names=tuple(f.name for f in members),
            want_text=p.near_dedup or p.validation_ratio > 0, items=self._evaluation_items(), dedup_key=p.dedup_key, perplexity=self._perplexity_filter(name),
        )  # fmt: skip


# --- the stage's answers ------------------------------------------------------------------------------------------------------------------


def output(config: Config) -> Target:
    """One set: its own folder (or the one file); several: the output folder; a part: a folder beside that."""
    if config.shard is not None:
        return Target(shard_folder(config, *parse_shard(config.shard)))
    if config.output is not None:
        return Target(config.output.parent, config.output.name.removesuffix(".jsonl"))
    return Target(config.output_dir / config.subdir if config.subdir else config.output_dir)


def parse_shard(text: str) -> tuple[int, int]:
    """`2/4` as (2, 4)."""
    i, _, n = text.partition("/")
    part, of = int(i), int(n)
    if not 1 <= part <= of:
        raise ValueError(text)
    return part, of


def shard_folder(config: Config, part: int, of: int) -> Path:
    """Where a part lies: `<output>.shards/<i>-of-<n>`, beside the output."""
    whole = config.output or (config.output_dir / config.subdir if config.subdir else config.output_dir)
    return whole.with_name(f"{whole.name}.shards") / f"{part}-of-{of}"


def inputs(config: Config) -> dict[str, Path | None]:
    """Inputs under names that hold the file names, because `_source` does."""
    named: dict[str, Path | None] = {f"input {i}: {p.name}": p for i, p in enumerate(config.inputs())}
    named |= {f"decontaminate {i}: {p.name}": p for i, p in enumerate(config.process.decontaminate)}
    return named | {f"perplexity sample {i}: {p.name}": p for i, p in enumerate(config.filters.perplexity.sample)}


def preflight(config: Config) -> list[tuple[str, str, str]]:
    """What cannot work, before anything is read."""
    p, problems = config.process, []
    if config.subdir is not None and not re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,63}", config.subdir):
        problems.append(("subdir", "must be the plain name of one folder", "for example: pretrain"))
    if not config.inputs():
        problems.append(("input", "nothing to read", "give a file or a folder"))
    if p.min_chars is not None and not 0 <= p.min_chars <= p.max_chars:
        problems.append(("process.min_chars", f"must lie between 0 and max_chars ({p.max_chars})", ""))
    if p.max_chars < 100:
        problems.append(("process.max_chars", "must be at least 100", ""))
    if not 0 < p.jaccard_threshold <= 1:
        problems.append(("process.jaccard_threshold", "must lie above 0 and be at most 1", "0.8"))
    if not 0 <= p.validation_ratio <= 0.5:
        problems.append(("process.validation_ratio", "must lie between 0 and 0.5", "0.05"))
    problems += [("process.pii_rules", f"unknown rule {name!r}", "known: " + ", ".join(RULES)) for name in p.pii_rules if name not in RULES]
    problems += [(f"process.dedup_key.{key}", what, fix) for key, what, fix in dedup_key.problems(p.dedup_key)]
    problems += [(f"filters.perplexity.{key}", what, fix) for key, what, fix in perplexity.problems(config.filters.perplexity)]
    if config.workers < 1:
        problems.append(("workers", "must be at least 1", ""))
    if not config.memory >= 0.25:
        problems.append(("memory", "must be at least 0.25 (GiB)", "2"))
    problems += _shard_problems(config)
    if any("\0" in str(x) for x in (config.output_dir, config.output, *config.inputs())):
        problems.append(("", "a path holds a NUL character", ""))
    if problems:
        return problems
    into = output(config).folder.resolve()
    if config.output is not None and any(config.output.resolve() == p.resolve() for p in config.inputs()):
        problems.append(("output", "is an input file", "choose another name"))
    for path in config.inputs():
        if path.is_dir() and into.is_relative_to(path.resolve()):
            problems.append(("output_dir", f"lies inside the input folder {path}: a later run would read its own output", "choose another folder"))
    return problems


def _shard_problems(config: Config) -> list[tuple[str, str, str]]:
    if config.shard is None:
        return [("merge", "must be at least 1", "")] if config.merge is not None and config.merge < 1 else []
    try:
        parse_shard(config.shard)
    except ValueError:
        return [("shard", f"{config.shard!r} is not of the form i/n", "2/4 is the second of four parts")]
    return [("merge", "a part is made or parts are merged, not both", "leave one out")] if config.merge is not None else []


def plan(config: Config) -> list[str]:
    """What would be read, for --dry-run."""
    sets = _find(config)
    lines = [f"{name}: {f.source.path} ({f.source.kind}{', ' + f.source.encoding if f.source.encoding else ''})" for name, files in sets.files.items() for f in files]
    return [*lines, *(f"left alone: {item}" for item in sets.left_alone)]


def _find(config: Config) -> Sets:
    return find(config.inputs(), config.subdir, config.encoding, text_fields=config.text_fields, columns=config.columns, max_line_bytes=config.max_line_bytes)


def summary(done: Artifact) -> list[str]:
    """The table of the run: files with format and encoding, then the funnel of each set."""
    stats = done.stats
    if "part" in stats:
        return [f"  part {stats['part']}: " + ", ".join(f"{name} {n:,} rows" for name, n in stats["rows"].items())]
    lines = [f"  {f['name']}: {f['format']}, {f['encoding'] or 'binary'}, {f['rows']:,} rows -> {f['set']}" for f in stats["files"]]
    lines += [f"  left alone: {item}" for item in stats["left_alone"]]
    if stats["pii"]:
        lines.append("  personal data: " + ", ".join(f"{k} {v}" for k, v in stats["pii"].items()))
    return [*lines, *funnel(stats["sets"])]


def funnel(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The reconciling table: one column per set."""
    columns = [_column(s) for s in sets.values()]
    reasons = sorted({r for c in columns for r in c if c[r]} - set(ALWAYS_SHOWN) - {"total", "added by splitting", "kept", "train", "validation", "quarantined"})
    rows = ["total", *(["added by splitting"] if any(c["added by splitting"] for c in columns) else []), "kept", "train", "validation", *ALWAYS_SHOWN, *reasons, "quarantined"]
    width = max(map(len, rows)) + 4
    table = [f"{'':<{width}}" + "".join(f"{name:>14}" for name in sets)]
    for row in rows:
        label = f"  {row}" if row in ("train", "validation") else row
        table.append(f"{label:<{width}}" + "".join(f"{c.get(row, 0):>14,}" for c in columns))
    return table


def _column(s: Mapping[str, Any]) -> dict[str, int]:
    return {
        "total": s["total"], "added by splitting": s["added_by_split"], "kept": s["kept"], "train": s["train"], "validation": s["validation"], **s["dropped"],
        "quarantined": sum(s["quarantined"].values()),
    }  # fmt: skip


# --- build --------------------------------------------------------------------------------------------------------------------------------


def build(run: Run[Config]) -> dict[str, Any]:
    """The work of the stage."""
    return write_sets(run.config, run.work)


def write_sets(config: Config, work: Path) -> dict[str, Any]:
    """Every set in turn into `work`; then the checks that concern all of them. Returns the stats."""
    from .collect import collect
    from .funnel import finish
    from .parts import Parts

    sets = _find(config)
    if config.output is not None and len(sets.files) > 1:
        raise SopError(f"--output is one file, the input holds several sets: {', '.join(sets.files)}", fix="use --output_dir, or choose one with --subdir")
    if config.shard is not None:
        return _write_part(config, sets, work)
    shards = _shards(config) if config.merge else []
    totals: dict[str, dict[str, Any]] = {}
    files: list[dict[str, Any]] = []
    pii: Counter[str] = Counter()
    for name, members in sets.files.items():
        folder = work if config.subdir or config.output else work / name
        folder.mkdir(exist_ok=True)
        spool = folder / ".part"
        if not shards:
            spool.mkdir()
            collect(name, members, config.rules(name, members), spool, workers=config.workers)
        stem = config.output.name.removesuffix(".jsonl") if config.output else ""
        with Parts([shard / name for shard in shards] or [spool], [m.name for m in members]) as parts:
            done = finish(name, members, config.process, parts, folder, stem=stem, memory=int(config.memory * 2**30))
        if not shards:
            shutil.rmtree(spool)
        _check_encoding(members, done.undecodable)
        totals[name] = done.stats
        files += done.files
        pii.update(done.pii)
    _check_bad(totals, config.process.max_bad_ratio, files)
    for name, s in totals.items():
        if s["kept"] == 0:
            console.warn(f"set {name}: no rows " + ("were kept" if s["total"] else "in the input"))
    return {"sets": totals, "files": files, "left_alone": sets.left_alone, "pii": dict(sorted(pii.items()))}


def _write_part(config: Config, sets: Sets, work: Path) -> dict[str, Any]:
    """The rows of one part of every set, judged; nothing is decided that needs the other parts."""
    from .collect import collect
    from .parts import Totals

    rows: dict[str, int] = {}
    for name, members in sets.files.items():
        (work / name).mkdir()
        collect(name, members, config.rules(name, members), work / name, workers=config.workers, part=parse_shard(str(config.shard)), memory=int(config.memory * 2**30))
        rows[name] = Totals.load(work / name / "part.json").rows.total()
    return {"part": config.shard, "rows": rows}


def _shards(config: Config) -> list[Path]:
    """The folders of all parts, which must be complete, untouched, and made from the same input with the same settings."""
    of = int(config.merge or 0)
    folders = []
    for part in range(1, of + 1):
        one = replace(config, shard=f"{part}/{of}", merge=None)
        wrong = _stage_of(config).why(one)
        if wrong:
            raise SopError(f"part {part} of {of} cannot be merged: {wrong}", where=str(output(one)), fix=f"run the same command with --shard {part}/{of} instead of --merge {of}")
        folders.append(output(one).folder)
    return folders


def _stage_of(config: Config) -> Stage[Any]:
    """The stage that a config belongs to: this one, or data.preference."""
    from importlib import import_module

    stage: Stage[Any] = import_module(type(config).__module__).STAGE
    return stage


def _check_encoding(members: Sequence[InputFile], undecodable: Mapping[int, tuple[int, int]]) -> None:
    """A file most of which cannot be decoded was read in the wrong encoding: say which one fits."""
    for i, (bad, rows) in undecodable.items():
        if bad * 2 > rows:
            path, used = members[i].source.path, members[i].source.encoding
            likely = likely_encoding(path)
            fix = f"--encoding {likely}" if likely in _CODECS else "convert the file to UTF-8"
            raise SopError(f"{bad} of {rows} lines are not valid {used}; the file is probably {likely}", where=str(path), fix=fix, code=DATA)


def _check_bad(totals: Mapping[str, Mapping[str, Any]], most: float, files: Sequence[Mapping[str, Any]]) -> None:
    total, bad = sum(s["total"] for s in totals.values()), Counter[str]()
    for s in totals.values():
        bad.update(s["quarantined"])
    if bad.total() > max(10, most * total):
        reasons = ", ".join(f"{k} {v}" for k, v in bad.most_common(5))
        first = next((f["first_bad"] for f in files if f["first_bad"]), "")
        raise SopError(
            f"{bad.total()} of {total} rows cannot be read ({reasons}); first: {first}", code=DATA,
            fix="look at the rows; if they may go, raise process.max_bad_ratio (--max_bad_ratio 1.0 accepts any number)",
        )  # fmt: skip


def following(config: Config) -> str:
    """The next command."""
    if config.shard is not None:
        return f"the other parts, then the same command with --merge {parse_shard(config.shard)[1]}"
    return {"finetune": "sop train sft", "reward": ""}.get(config.subdir or "", "sop tokenizer baseline")


def disk(config: Config) -> int:
    """Kept and dropped rows, hashes and spilled tables: measured up to 3.2 times the input (docs/results.md); compressed input is reckoned at 5 times its size."""
    sizes = ((p, p.stat().st_size) for given in config.inputs() for p in (given.rglob("*") if given.is_dir() else [given]) if p.is_file())
    return sum(round(3.2 * size * (5 if p.suffix in (".gz", ".zst", ".parquet") else 1)) for p, size in sizes)


STAGE = Stage(
    name="data.process", version=3, config=Config, output=output, build=build, disk=disk, inputs=inputs, preflight=preflight, plan=plan, summary=summary, next=following,
)  # fmt: skip


def run(config: Config) -> Artifact:
    """Process data; the artifact's folder holds the sets."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return stage_main(STAGE, argv)
