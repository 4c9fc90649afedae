"""Rows out of files: JSONL, JSON, Parquet, CSV, TSV and text, plain or compressed, in the encodings that Chinese data arrives in.

A record that cannot be read is a record with an `error`, never an exception and never silently skipped; blank lines are no records.
Lines end at `\\n` only, so U+2028 inside a text stays. Memory is bounded by `max_line_bytes`, not by the file.
"""

from __future__ import annotations

import codecs
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DATA, SopError
from .encodings import FREE_BYTES, MAX_LINE_BYTES, MAX_RATIO, WHOLE, Span, detect_encoding, has_surrogate, open_bytes, text_lines

__all__ = ["COMPRESSED", "FREE_BYTES", "MAX_LINE_BYTES", "MAX_RATIO", "Record", "Source", "files_of", "kind_of", "parse_object", "read", "source", "write_jsonl"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt")
COMPRESSED = (".gz", ".zst")
MAX_DEPTH = 100


class Record(NamedTuple):
    """One row as read. `row` is None exactly where `error` (a short code) is set; `line` counts from 1; `raw` is the line's start, for reports."""

    row: dict[str, Any] | None
    file: str
    line: int
    error: str | None
    raw: str


class Source(NamedTuple):
    """One input file: how it is read, and in which encoding (empty for Parquet)."""

    path: Path
    kind: str
    encoding: str
    max_line_bytes: int = MAX_LINE_BYTES

    def __iter__(self) -> Iterator[Record]:  # type: ignore[override]
        return _READERS[self.kind](self)


def read(paths: Path | str | Iterable[Path | str], encoding: str = "auto") -> Iterator[Record]:
    """Every record of the files (folders are entered), in order.

    Raises:
        SopError: for a path that is missing, no regular file, unreadable, of an unknown kind, or a decompression bomb.
    """
    for path in files_of(paths):
        yield from iter(source(path, encoding))


def files_of(paths: Path | str | Iterable[Path | str]) -> list[Path]:
    """The data files that `paths` name; a folder stands for the data files directly or deeper inside it, sorted."""
    out: list[Path] = []
    for path in [Path(paths)] if isinstance(paths, (str, Path)) else map(Path, paths):
        if path.is_dir():
            out += sorted(p for p in path.rglob("*") if p.is_file() and is_data_file(p.relative_to(path)))
        else:
            out.append(path)
    return out


def is_data_file(path: Path) -> bool:
    """True for names this module reads; hidden files, manifests and what processing set aside are none."""
    if any(part.startswith(".") for part in path.parts) or path.name.endswith(("manifest.json", ".rejected.jsonl")) or path.name in ("dropped.jsonl", "clusters.jsonl"):
        return False
    return kind_of(path) is not None


def kind_of(path: Path) -> str | None:
    """jsonl, json, parquet, csv, tsv or txt by the name, below a compression suffix; else None."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    found = next((s for s in SUFFIXES if name.endswith(s)), None)
    return found[1:].replace("ndjson", "jsonl") if found else None


def source(path: Path, encoding: str = "auto", max_line_bytes: int = MAX_LINE_BYTES) -> Source:
    """Look at a file before reading it: kind, and encoding where it is not given."""
    _check_readable(path)
    kind = kind_of(path)
    if kind is None:
        raise SopError(f"cannot tell what {path.suffix or 'a file without suffix'} is", where=str(path), fix="known: " + " ".join(SUFFIXES) + ", also with .gz or .zst")
    if kind == "parquet":
        return Source(path, kind, "", max_line_bytes)
    found = detect_encoding(path) if encoding == "auto" else codecs.lookup("gb18030" if encoding in ("gbk", "gb2312") else encoding).name
    if kind == "json" and not _is_document(path, found):
        kind = "jsonl"
    return Source(path, kind, found, max_line_bytes)


def _check_readable(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise SopError("no such file", where=str(path)) from None
    if not stat.S_ISREG(mode):
        raise SopError("not a regular file", where=str(path), fix="give a data file or a folder of data files")
    try:
        path.open("rb").close()
    except PermissionError:
        raise SopError("no permission to read", where=str(path), fix="check the file's owner and mode") from None


# --- JSON ---------------------------------------------------------------------------------------------------------------------------------

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.S)
_BRACKET = re.compile(r"[\[{]|[\]}]")


class _NotFinite(ValueError):
    pass


def _refuse_constant(name: str) -> Any:
    raise _NotFinite(name)


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _NotFinite(text)
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def parse_object(text: str) -> tuple[dict[str, Any] | None, str | None]:
    """(row, None) or (None, error code): bad_json, not_an_object, not_finite, too_deep, lone_surrogate, nul."""
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        return None, "too_deep"
    try:
        value = _DECODER.decode(text)
    except _NotFinite:
        return None, "not_finite"
    except (ValueError, RecursionError):
        return None, "bad_json"
    return check_object(value, text)


def check_object(value: Any, text: str) -> tuple[dict[str, Any] | None, str | None]:
    """What valid JSON may still be: no object, or strings that no UTF-8 file can hold."""
    if not isinstance(value, dict):
        return None, "not_an_object"
    if "\\u" in text:
        if "\\u0000" in text and any("\0" in s for s in strings(value)):
            return None, "nul"
        if ("\\ud" in text or "\\uD" in text) and any(map(has_surrogate, strings(value))):
            return None, "lone_surrogate"
    return value, None


def strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield k
            yield from strings(v)
    elif isinstance(value, list):
        for v in value:
            yield from strings(v)


def _depth(text: str) -> int:
    deepest = depth = 0
    for m in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if m[0] in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _read_jsonl(src: Source) -> Iterator[Record]:
    name = str(src.path)
    for number, text, error in text_lines(src.path, src.encoding, src.max_line_bytes):
        if error is None and not text.strip(" \t\r"):
            continue
        row, wrong = (None, error) if error else parse_object(text)
        yield Record(row, name, number, wrong, text if wrong is None else text[:1000])


def _is_document(path: Path, encoding: str) -> bool:
    """True for a JSON document (an array, or an object over several lines), False for JSON lines."""
    with open_bytes(path) as f:
        head = f.read(1 << 16).decode(encoding, "ignore").lstrip("\ufeff \t\r\n")
    if head.startswith("["):
        return True
    # JSON lines under the name .json: one of the first lines is an object by itself
    lines = [line for line in head.split("\n")[:5] if line.strip()]
    return bool(lines) and not any(parse_object(line)[0] is not None for line in lines) and "\n" in head


def _read_json(src: Source) -> Iterator[Record]:
    """A JSON document: an array of objects, one object, or one object that holds one list of objects (data, rows, ...)."""
    name, limit = str(src.path), max(FREE_BYTES * 8, MAX_LINE_BYTES)
    with open_bytes(src.path) as f:
        data = f.read(limit + 1)
    if len(data) > limit:
        raise SopError(f"a JSON document of more than {limit >> 20} MiB", where=name, fix="store it as JSONL (one object per line), which is read in a stream", code=DATA)
    try:
        text = data.decode(src.encoding).removeprefix("\ufeff")
    except UnicodeDecodeError:
        yield Record(None, name, 1, "undecodable", data[:1000].decode(src.encoding, "replace"))
        return
    start = _skip(text, 0)
    if text[start : start + 1] == "{":
        row, wrong = parse_object(text[start:])
        inner = [v for v in row.values() if isinstance(v, list)] if row else []
        if row and len(inner) == 1 and inner[0] and all(isinstance(v, dict) for v in inner[0]) and not _known(row):
            for i, item in enumerate(inner[0], 1):
                yield Record(item, name, i, None, "")
            return
        yield Record(row, name, 1, wrong, text[:1000])
        return
    yield from _elements(text, start + 1, name)


def _known(row: dict[str, Any]) -> bool:
    from .formats import detect

    return detect(row) is not None


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at


def _elements(text: str, at: int, name: str) -> Iterator[Record]:
    """The elements of an array; after a damaged one reading goes on at the next line that begins an object."""
    line, counted = 1, 0
    while (at := _skip(text, at)) < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            following = re.compile(r"\n[ \t]*(?=\{)").search(text, at)
            end = following.end() if following else len(text)
            yield Record(None, name, line, "not_finite" if isinstance(error, _NotFinite) else "bad_json", text[at : min(end, at + 1000)])
            at = end
            continue
        raw = text[at:end]
        row, wrong = (None, "too_deep") if raw.count("[") + raw.count("{") > MAX_DEPTH and _depth(raw) > MAX_DEPTH else check_object(value, raw)
        yield Record(row, name, line, wrong, raw if wrong is None else raw[:1000])
        at = end


def _read_txt(src: Source) -> Iterator[Record]:
    yield from text_records(src)


def text_records(src: Source, span: Span = WHOLE) -> Iterator[Record]:
    """The lines of a text file (or of a span of it) as records."""
    name = str(src.path)
    for number, text, error in text_lines(src.path, src.encoding, src.max_line_bytes, span):
        if error is None and not text.strip():
            continue
        if error is None and "\0" in text:
            error = "nul"
        yield Record({"text": text} if error is None else None, name, number, error, text[:1000])


def _table(src: Source) -> Iterator[Record]:
    from .tables import read_csv, read_parquet  # pyarrow is heavy

    yield from read_parquet(src) if src.kind == "parquet" else read_csv(src)


_READERS: dict[str, Callable[[Source], Iterator[Record]]] = {
    "jsonl": _read_jsonl, "json": _read_json, "txt": _read_txt, "parquet": _table, "csv": _table, "tsv": _table,
}  # fmt: skip


# --- writing ------------------------------------------------------------------------------------------------------------------------------


def jsonable(value: Any) -> Any:
    """Dates and times of tables as ISO text; anything else has no JSON form."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(type(value).__name__)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=jsonable)


def dumps(row: dict[str, Any]) -> str:
    """A row as one line of JSON, without the newline; key order kept, no escapes but those that JSON needs."""
    return _ENCODER.encode(row)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows, one JSON object per line, UTF-8, `\\n`; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as f:
        for row in rows:
            f.write(dumps(row) + "\n")
            count += 1
    return count
