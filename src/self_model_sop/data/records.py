"""Rows out of files: JSONL, JSON, Parquet, CSV, TSV and text, plain or compressed, in the encodings that Chinese data arrives in.

A record that cannot be read is a record with an `error`, never an exception and never silently skipped; blank lines are no records.
Lines end at `\\n` only, so U+2028 inside a text stays. Memory is bounded by `max_line_bytes`, not by the file.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import DATA, ENVIRONMENT, SopError, missing_extra

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt")
COMPRESSED = (".gz", ".zst")
MAX_LINE_BYTES = 10_000_000
MAX_DEPTH = 100
MAX_RATIO = 200  # unpacked bytes per stored byte; text reaches about 20
FREE_BYTES = 64 << 20  # so much is unpacked before the ratio is looked at
_CHUNK = 1 << 20
_DAMAGED = "the file is damaged or its suffix is wrong; fetch it again"
_BOMB = "this looks like a decompression bomb; unpack it yourself if it is wanted"


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
    if kind == "json" and not _is_array(path, found):
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


# --- bytes --------------------------------------------------------------------------------------------------------------------------------


class _Bounded(io.RawIOBase):
    """An unpacked stream that stops where it unpacks to more than MAX_RATIO times its file."""

    def __init__(self, inner: Any, path: Path) -> None:
        self._inner, self._path, self._count = inner, path, 0
        self._limit = max(FREE_BYTES, path.stat().st_size * MAX_RATIO)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inner.read(len(buffer))
        except Exception as error:  # OSError, EOFError, zlib.error, and zstandard's own class, which is imported only where needed
            raise SopError(f"cannot unpack: {error}", where=str(self._path), fix=_DAMAGED, code=DATA) from None
        self._count += len(data)
        if self._count > self._limit:
            raise SopError(f"unpacks to more than {MAX_RATIO} times its size", where=str(self._path), fix=_BOMB, code=DATA)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._inner.close()
        super().close()


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked while reading where its suffix or its first bytes say so."""
    with path.open("rb") as f:
        magic = f.read(4)
    if path.suffix == ".gz" or magic[:2] == b"\x1f\x8b":
        return io.BufferedReader(_Bounded(gzip.open(path, "rb"), path), _CHUNK)
    if path.suffix == ".zst" or magic == b"\x28\xb5\x2f\xfd":
        try:
            import zstandard
        except ImportError:
            raise missing_extra("zstandard", "zstd") from None
        return io.BufferedReader(_Bounded(zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(path.open("rb")), path), _CHUNK)
    return path.open("rb", buffering=_CHUNK)


def _byte_lines(path: Path, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """(line number, line without its end, complete?) for every line; of a line longer than `limit` only the start."""
    with open_bytes(path) as f:
        number = 0
        while line := f.readline(limit + 2):
            number += 1
            complete = len(line.rstrip(b"\r\n")) <= limit
            if not complete:
                tail = line
                while tail and not tail.endswith(b"\n"):
                    tail = f.readline(_CHUNK)
                line = line[:1000]
            yield number, line.removesuffix(b"\n").removesuffix(b"\r"), complete


# --- encodings ----------------------------------------------------------------------------------------------------------------------------

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def detect_encoding(path: Path) -> str:
    """utf-8, gb18030, or (by its byte order mark) utf-16/utf-32: the one in which most lines of the whole file can be decoded; utf-8 where equal."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_bytes(path) as f:
        head = f.read(4)
        marked = next((name for bom, name in _BOMS if head.startswith(bom)), None)
        if marked:
            return marked
        try:
            chunk = head
            while chunk:
                decoder.decode(chunk)
                chunk = f.read(_CHUNK)
            decoder.decode(b"", final=True)
            return "utf-8"
        except UnicodeDecodeError:
            pass
    good = {"utf-8": 0, "gb18030": 0}
    for _, line, complete in _byte_lines(path, MAX_LINE_BYTES):
        if complete and not line.isascii():
            for name in good:
                good[name] += decodable(line, name)
    return "gb18030" if good["gb18030"] > good["utf-8"] else "utf-8"


def decodable(line: bytes, encoding: str) -> bool:
    """True if the bytes are valid in the encoding."""
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def likely_encoding(path: Path) -> str:
    """A guess for a file that could not be decoded: the encoding in which most of its first lines are valid."""
    with open_bytes(path) as f:
        sample = f.read(1 << 16)
    if sample.count(0) > len(sample) // 4:
        return "utf-16"
    lines = [x for x in sample.split(b"\n")[:-1] or [sample] if not x.isascii()]
    scores = {name: sum(decodable(x, name) for x in lines) for name in ("utf-8", "gb18030", "big5", "euc_jp", "shift_jis")}
    best = max(scores, key=lambda n: scores[n])
    return best if scores[best] else "unknown (binary data?)"


def text_lines(src: Source) -> Iterator[tuple[int, str, str | None]]:
    """(line number, text, error) for every line of a text file; error is line_too_long or undecodable."""
    if src.encoding.startswith(("utf-16", "utf-32")):
        yield from _wide_lines(src)
        return
    for number, line, complete in _byte_lines(src.path, src.max_line_bytes):
        if number == 1 and src.encoding == "utf-8":
            line = line.removeprefix(codecs.BOM_UTF8)
        if not complete:
            yield number, line.decode(src.encoding, "replace"), "line_too_long"
            continue
        try:
            yield number, line.decode(src.encoding), None
        except UnicodeDecodeError:
            yield number, line.decode(src.encoding, "replace"), "undecodable"


def _wide_lines(src: Source) -> Iterator[tuple[int, str, str | None]]:
    """Lines of UTF-16/32, where a newline is no single byte; `surrogatepass` keeps the damage inside its line."""
    decoder = codecs.getincrementaldecoder(src.encoding)("surrogatepass" if src.encoding.startswith("utf-16") else "replace")
    number, rest, skipping = 0, "", False
    with open_bytes(src.path) as f:
        while True:
            chunk = f.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError:
                text = "\udc00"  # a cut last character
            *whole, rest = (rest + text).split("\n")
            for line in whole if chunk else [*whole, *([rest] if rest else [])]:
                if skipping:
                    skipping = False
                    continue
                number += 1
                bad = _has_surrogate(line)
                yield number, line.removesuffix("\r").encode("utf-8", "replace").decode() if bad else line.removesuffix("\r"), "undecodable" if bad else None
            if not chunk:
                return
            if len(rest) > src.max_line_bytes:
                if not skipping:
                    number += 1
                    yield number, rest[:1000], "line_too_long"
                rest, skipping = "", True


def _has_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


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
        if ("\\ud" in text or "\\uD" in text) and any(map(_has_surrogate, strings(value))):
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
    for number, text, error in text_lines(src):
        if error is None and not text.strip(" \t\r"):
            continue
        row, wrong = (None, error) if error else parse_object(text)
        yield Record(row, name, number, wrong, text if wrong is None else text[:1000])


def _is_array(path: Path, encoding: str) -> bool:
    with open_bytes(path) as f:
        head = f.read(1 << 16).decode(encoding, "ignore").lstrip("\ufeff \t\r\n")
    if head.startswith("["):
        return True
    # one object over several lines is a document too: its first line alone is no JSON
    first = head.split("\n", 1)[0]
    return bool(first) and parse_object(first)[1] == "bad_json" and first.lstrip().startswith("{") and len(first) < 1000


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


# --- tables and text ----------------------------------------------------------------------------------------------------------------------


def _read_txt(src: Source) -> Iterator[Record]:
    name = str(src.path)
    for number, text, error in text_lines(src):
        if error is None and not text.strip():
            continue
        if error is None and "\0" in text:
            error = "nul"
        yield Record({"text": text} if error is None else None, name, number, error, text[:1000])


def _read_csv(src: Source) -> Iterator[Record]:
    name, delimiter = str(src.path), "\t" if src.kind == "tsv" else ","
    csv.field_size_limit(src.max_line_bytes)
    broken: dict[int, str] = {}

    def lines() -> Iterator[str]:
        for number, text, error in text_lines(src):
            if error or "\0" in text:
                broken[number] = error or "nul"
                text = text.replace("\0", "\ufffd").replace('"', "")
            yield text + "\n"

    reader = csv.reader(lines(), delimiter=delimiter, strict=False)
    header: list[str] | None = None
    at = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:
            yield Record(None, name, at, "bad_csv", "")
            at = reader.line_num + 1
            continue
        if cells is None:
            return
        number, at = at, reader.line_num + 1
        wrong = next((broken[n] for n in range(number, at) if n in broken), None)
        if not cells:
            continue
        if header is None:
            header = [c.strip() for c in cells]
            continue
        if wrong is None and len(cells) != len(header):
            wrong = "column_count"
        raw = delimiter.join(cells)[:1000]
        yield Record(dict(zip(header, cells, strict=True)) if wrong is None else None, name, number, wrong, raw)


def _read_parquet(src: Source) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, size = str(src.path), src.path.stat().st_size
    limit = max(FREE_BYTES, size * MAX_RATIO)
    bomb = SopError(f"declares more than {MAX_RATIO} times its size", where=name, fix=_BOMB, code=DATA)
    try:
        file = pq.ParquetFile(src.path)
        meta = file.metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        declared = sum(g.total_byte_size for g in groups)
        values = sum(g.column(c).num_values for g in groups for c in range(g.num_columns))
        if declared > limit or values > limit:
            raise bomb
        strings_ = [f.name for f in file.schema_arrow if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        file = pq.ParquetFile(src.path, read_dictionary=strings_)
        number = total = 0
        for batch in file.iter_batches(batch_size=256):
            total += _decoded_bytes(batch)
            if total > limit:
                raise bomb
            for row in batch.to_pylist():
                number += 1
                wrong = _table_row_fault(row)
                yield Record(row if wrong is None else None, name, number, wrong, "" if wrong is None else str(row)[:1000])
    except (pa.ArrowException, OSError) as error:
        raise SopError(f"cannot read this Parquet file: {str(error).splitlines()[0]}", where=name, fix=_DAMAGED, code=DATA) from None
    except MemoryError:
        raise SopError("too little memory to read this Parquet file", where=name, code=ENVIRONMENT) from None


def _decoded_bytes(batch: Any) -> int:
    """Bytes of a record batch once every dictionary value is written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    total = 0
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            lengths = pc.binary_length(column.dictionary)
            total += pc.sum(pc.take(lengths, column.indices).cast(pa.int64())).as_py() or 0
        else:
            total += column.nbytes
    return total


def _table_row_fault(row: dict[str, Any]) -> str | None:
    try:
        json.dumps(row, allow_nan=False, default=_jsonable)
    except ValueError:
        return "not_finite"
    except TypeError:
        return "not_json"
    return "nul" if any("\0" in s for s in strings(row)) else None


def _jsonable(value: Any) -> Any:
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(type(value).__name__)


_READERS: dict[str, Callable[[Source], Iterator[Record]]] = {
    "jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet, "csv": _read_csv, "tsv": _read_csv, "txt": _read_txt,
}  # fmt: skip


# --- writing ------------------------------------------------------------------------------------------------------------------------------


def dumps(row: dict[str, Any]) -> str:
    """A row as one line of JSON, without the newline; key order kept, no escapes but those that JSON needs."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_jsonable)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows, one JSON object per line, UTF-8, `\\n`; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as f:
        for row in rows:
            f.write(dumps(row) + "\n")
            count += 1
    return count


