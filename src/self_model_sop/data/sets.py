"""Which input files make up which set: by their folder, by `--subdir`, or by what their rows are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ..errors import DATA, SopError
from .encodings import WHOLE, Span, is_packed
from .formats import detect
from .records import Source, files_of, is_data_file, source

SETS = ("pretrain", "finetune", "reward")
_SET_OF = {"text": "pretrain", "preference": "reward", "alpaca": "finetune", "sharegpt": "finetune", "messages": "finetune", "io": "finetune"}
_LEFT = {"choice": "multiple choice: evaluation data", "rl": "prompts for RL: sop data preference reads them"}
_LOOKED_AT = 50  # readable rows that decide what a file is


class InputFile(NamedTuple):
    """A file of a set: how it is read, and its name in `_source`."""

    source: Source
    name: str


class Sets(NamedTuple):
    """The files of each set, and what was left alone with the reason."""

    files: dict[str, list[InputFile]]
    left_alone: list[str]


def find(paths: Sequence[Path], subdir: str | None, encoding: str, *, text_fields: Sequence[str] = (), columns: dict[str, str] | None = None, max_line_bytes: int) -> Sets:
    """Sort the input files into sets.

    Args:
        paths: files and folders.
        subdir: everything goes to this one set (of a folder that has a subfolder of that name, only what is in it).
        encoding: `auto` or a codec.
        text_fields: with these, a file whose rows are of no known format is pretraining text.
        columns: renamed fields, applied before a format is looked for.
        max_line_bytes: limit of a line.

    Raises:
        SopError: no data files, or a file whose rows are of no known format.
    """
    found: dict[str, list[Path]] = {}
    unsorted: list[Path] = []
    left: list[str] = []
    for path in paths:
        below = {name: path / name for name in SETS if (path / name).is_dir()} if path.is_dir() else {}
        if subdir is not None:
            found.setdefault(subdir, []).extend(files_of(path / subdir if (path / subdir).is_dir() else path))
        elif below:
            for name, folder in below.items():
                found.setdefault(name, []).extend(files_of(folder))
            left += sorted(f"{p.name} (no set of this stage)" for p in path.iterdir() if p.name not in below and (p.is_dir() or is_data_file(Path(p.name))) and p.name[0] != ".")
        else:
            unsorted += files_of(path)
    sources = {name: [source(p, encoding, max_line_bytes) for p in files] for name, files in found.items()}
    for item in (source(p, encoding, max_line_bytes) for p in unsorted):
        kind = _set_of(item, text_fields, columns or {})
        if kind in _LEFT:
            left.append(f"{item.path.name} ({_LEFT[kind]})")
        else:
            sources.setdefault(kind, []).append(item)
    if not any(sources.values()):
        raise SopError("no data files", where=", ".join(map(str, paths)), fix="give files or folders with .jsonl, .json, .parquet, .csv, .tsv or .txt")
    names = _names([s.path for files in sources.values() for s in files])
    order = [*(n for n in SETS if n in sources), *sorted(set(sources) - set(SETS))]
    return Sets({name: [InputFile(s, names[s.path]) for s in sources[name]] for name in order}, left)


def _set_of(item: Source, text_fields: Sequence[str], columns: dict[str, str]) -> str:
    """The set of a file by the format most of its first rows have (that format where it belongs to none); a file without readable rows is pretraining text."""
    rows = islice((r.row for r in item if r.row is not None), _LOOKED_AT)
    seen = Counter(detect({columns.get(k, k): v for k, v in row.items()}) for row in rows)
    if not seen or text_fields:
        return "pretrain"
    kind = seen.most_common(1)[0][0]
    if kind is None:
        keys = next(_keys(item))
        raise SopError(
            f"no known format: the rows have {keys}", where=str(item.path), code=DATA,
            fix="name the text with --text_fields, or rename fields in YAML (columns: {theirs: ours}); "
            "known: text | instruction, output | conversations | messages | prompt, chosen, rejected",
        )  # fmt: skip
    return _SET_OF.get(kind, kind)


def _keys(item: Source) -> Iterator[str]:
    yield from (", ".join(map(str, list(r.row)[:8])) or "no fields" for r in item if r.row is not None)


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """File names, with as much of the folder as it takes to tell files of one name apart."""
    twice = {name for name, n in Counter(p.name for p in paths).items() if n > 1}
    if not twice:
        return {p: p.name for p in paths}
    common = Path(os.path.commonpath([p.parent for p in paths]))
    return {p: str(p.relative_to(common)) if p.name in twice else p.name for p in paths}


# --- parts of the input -------------------------------------------------------------------------------------------------------------------


def part_of(members: Sequence[InputFile], part: int, of: int) -> list[tuple[int, Span]]:
    """The `part`-th (from 1) of `of` parts of a set: (file number, span) in order.

    The bytes of all files, one file after the other, are cut into equal ranges. Plain JSONL and text files are cut at lines; any other file belongs whole to the part in which
    it begins.
    """
    sizes = [m.source.path.stat().st_size for m in members]
    low, high = sum(sizes) * (part - 1) // of, sum(sizes) * part // of
    out, begin = [], 0
    for number, (member, size) in enumerate(zip(members, sizes, strict=True)):
        end = begin + size
        if _divisible(member.source):
            if begin < high and end > low:
                out.append((number, Span(max(0, low - begin), None if end <= high else high - begin)))
        elif low <= begin < high:
            out.append((number, WHOLE))
        begin = end
    return out


def _divisible(source: Source) -> bool:
    return source.kind in ("jsonl", "txt") and not is_packed(source.path) and not source.encoding.startswith(("utf-16", "utf-32"))
