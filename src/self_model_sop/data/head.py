"""The first rows of a stream, as a small valid file of the same kind; nothing behind them is read."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import DATA, SopError, missing_extra
from .encodings import FREE_BYTES, MAX_LINE_BYTES, MAX_RATIO
from .records import COMPRESSED, kind_of, parse_object

_PEEK = 1 << 16
_CHUNK = 1 << 16
_MAX_DOCUMENT = 512 << 20
_MAX_LINE = 64 << 20
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.S)
_WIDE = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def plain_name(name: str) -> str:
    """A file name without its compression suffix."""
    for suffix in COMPRESSED:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def head(stream: IO[bytes] | io.RawIOBase, name: str, limit: int, folder: Path) -> Path:
    """Write the first `limit` rows of `stream` into `folder`, unpacked, under the plain name of `name`; returns the file.

    Raises:
        SopError: where the stream is no file of the kind that its name says.
    """
    out = folder / plain_name(Path(name).name)
    folder.mkdir(parents=True, exist_ok=True)
    kind = kind_of(Path(name))
    if kind == "parquet":
        _parquet(stream, limit, out, name)
        return out
    try:
        plain = _unpacked(stream)
        start = plain.peek(_PEEK)[:_PEEK]
        if kind == "json":
            kind = _kind_of_json(start)
        parts = _elements(plain, limit) if kind == "array" else _table(plain, limit, kind) if kind in ("csv", "tsv") else plain_lines(plain, limit if kind != "document" else None)
        with out.open("wb") as f:
            for part in parts:
                f.write(part)
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise SopError(f"cannot be read: {error}", where=name, fix="the file is damaged or its suffix is wrong", code=DATA) from error
    return out


def _unpacked(stream: Any) -> Any:
    raw: Any = stream if hasattr(stream, "peek") else io.BufferedReader(stream, _PEEK)
    magic = raw.peek(4)[:4]
    if magic[:2] == b"\x1f\x8b":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _PEEK)
    if magic == b"\x28\xb5\x2f\xfd":
        try:
            import zstandard
        except ImportError:
            raise missing_extra("zstandard", "zstd") from None
        return io.BufferedReader(zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(raw), _PEEK)
    return raw


def _kind_of_json(start: bytes) -> str:
    """array, document (one object over several lines), or jsonl (one object a line, whatever the suffix says)."""
    text = start.decode(_encoding(start), "ignore").lstrip("\ufeff \t\r\n")
    if text.startswith("["):
        return "array"
    first = text.split("\n", 1)[0]
    return "document" if first.startswith("{") and len(first) < 1000 and parse_object(first)[1] == "bad_json" else "jsonl"


def _encoding(start: bytes) -> str:
    for bom, name in _WIDE:
        if start.startswith(bom):
            return name
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return "gb18030"
    return "utf-8"


def plain_lines(stream: io.BufferedReader, limit: int | None) -> Iterator[bytes]:
    """The bytes up to the end of the row number `limit`; blank lines are no rows."""
    wide = next((name for bom, name in _WIDE if stream.peek(4).startswith(bom)), None)
    if wide:
        yield from _wide_lines(stream, wide, limit)
        return
    rows = open_bytes = 0
    while (limit is None or rows < limit) and (line := stream.readline(MAX_LINE_BYTES)):
        ended = line.endswith(b"\n")
        rows += ended and bool(line.strip())
        open_bytes = 0 if ended else open_bytes + len(line)
        if open_bytes > _MAX_LINE:
            raise SopError(f"a line of more than {_MAX_LINE >> 20} MiB", where="text file", fix="this looks like a decompression bomb, or like binary data", code=DATA)
        yield line


def _wide_lines(stream: io.BufferedReader, encoding: str, limit: int | None) -> Iterator[bytes]:
    rows, encoder = 0, codecs.getincrementalencoder(encoding)()
    for line in io.TextIOWrapper(stream, encoding, newline="\n"):
        yield encoder.encode(line)
        rows += bool(line.strip())
        if limit is not None and rows >= limit:
            return


def _elements(stream: io.BufferedReader, limit: int) -> Iterator[bytes]:
    """A JSON array cut behind its element number `limit`; brackets are counted, nothing is parsed."""
    encoding = _encoding(stream.peek(_PEEK)[:_PEEK])
    decoder, text = codecs.getincrementaldecoder(encoding)(), ""
    at = depth = count = 0
    while chunk := stream.read(_CHUNK):
        text += decoder.decode(chunk)
        while (m := _TOKEN.search(text, at)) and m[0] != '"':  # a lone quote opens a string that ends in a later chunk
            at = m.end()
            depth += (m[0] in "[{") - (m[0] in "]}")
            count += m[0] in "]}" and depth == 1
            if count == limit or (depth == 0 and m[0] == "]"):
                yield (text[:at] + ("" if depth == 0 else "]")).encode(encoding)
                return
        if len(text) > _MAX_DOCUMENT:
            raise SopError(f"no {limit} elements within {_MAX_DOCUMENT >> 20} MiB", where="JSON array", fix="lower the limit, or store it as JSONL", code=DATA)
    yield (text + decoder.decode(b"", final=True)).encode(encoding)


def _table(stream: io.BufferedReader, limit: int, kind: str) -> Iterator[bytes]:
    """The header and `limit` records of a CSV or TSV file; a quoted cell may hold newlines."""
    taken: list[bytes] = []

    def lines() -> Iterator[str]:
        while line := stream.readline(MAX_LINE_BYTES):
            taken.append(line)
            yield line.decode("latin-1").replace("\0", " ")  # only quotes and separators matter here, and those are ASCII

    csv.field_size_limit(MAX_LINE_BYTES)
    reader, rows = csv.reader(lines(), delimiter="\t" if kind == "tsv" else ","), 0
    while rows <= limit:
        try:
            cells = next(reader, None)
        except csv.Error:
            cells = ["?"]
        yield from taken
        taken.clear()
        if cells is None:
            return
        rows += bool(cells)


def _parquet(stream: Any, limit: int, out: Path, name: str) -> None:
    """The first rows of a Parquet file; only the footer and the pages that hold them are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    left = limit
    try:
        source = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        _refuse_bomb(source.metadata, stream.seek(0, io.SEEK_END), name)
        with pq.ParquetWriter(out, source.schema_arrow) as writer:
            for batch in source.iter_batches(batch_size=min(limit, 1024), use_threads=False):
                writer.write_batch(batch.slice(0, left))
                left -= min(left, batch.num_rows)
                if left == 0:
                    break
    except pa.ArrowException as error:
        raise SopError(f"cannot read this Parquet file: {str(error).splitlines()[0]}", where=name, fix="the file is damaged or its suffix is wrong", code=DATA) from None


def _refuse_bomb(meta: Any, size: int, name: str) -> None:
    allowed = max(FREE_BYTES, size * MAX_RATIO)
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    if sum(g.total_byte_size for g in groups) > allowed or meta.num_rows > allowed:
        raise SopError(f"declares more than {MAX_RATIO} times its size", where=name, fix="this looks like a decompression bomb; look at it yourself if it is wanted", code=DATA)
