"""Rows of several files into one JSONL file, each row as it is."""

from __future__ import annotations

import base64
import codecs
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .. import console
from . import records
from .encodings import open_bytes, text_lines

_CHUNK = 1 << 20
_WHITESPACE = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|\s+', re.S)


class Writer:
    """Rows of several files into `<stem>.jsonl`, UTF-8; what is no row goes to `<stem>.rejected.jsonl` with file, line and reason."""

    def __init__(self, folder: Path, stem: str, limit: int | None) -> None:
        self._out, self._rejected = folder / f"{stem}.jsonl", folder / f"{stem}.rejected.jsonl"
        self._limit, self.kept, self.quarantined = limit, 0, 0

    def __enter__(self) -> Writer:
        self._f: IO[bytes] = self._out.open("wb", buffering=_CHUNK)
        return self

    def __exit__(self, *error: object) -> None:
        self._f.close()

    @property
    def left(self) -> int | None:
        """Rows up to the limit; None without one."""
        return None if self._limit is None else self._limit - self.kept

    @property
    def full(self) -> bool:
        """True once the limit is reached."""
        return self.left == 0

    def add(self, path: Path, notes: list[str]) -> None:
        """Append the rows of a file, up to the limit."""
        source = records.source(path)
        if source.encoding not in ("utf-8", ""):
            notes.append(f"{path.name}: read as {source.encoding}, written as UTF-8")
            console.note(notes[-1])
        for line in _lines(source) if source.kind == "jsonl" else self._converted(source):
            if self.full:
                return
            self._f.write(line + b"\n")
            self.kept += 1

    def _converted(self, source: records.Source) -> Iterator[bytes]:
        if source.kind == "parquet":
            from .tables import parquet_rows

            for row in parquet_rows(source.path):
                yield _json_line(row)
            return
        for record in source:
            if record.row is None:
                self._reject(record)
            elif source.kind == "json" and record.raw:
                yield _WHITESPACE.sub(r"\1", record.raw).encode()  # the spelling of every number and escape stays
            else:
                yield records.dumps(record.row).encode()

    def _reject(self, record: records.Record) -> None:
        self.quarantined += 1
        row = {"file": Path(record.file).name, "line": record.line, "reason": record.error, "start": record.raw[:200]}
        with self._rejected.open("a", encoding="utf-8") as f:
            f.write(records.dumps(row) + "\n")


def _json_line(row: dict[str, Any]) -> bytes:
    """A Parquet row as JSON. What JSON has no word for: NaN becomes null, decimals and times text, bytes text or base64."""
    try:
        return records.dumps(row).encode()
    except (TypeError, ValueError):
        return records.dumps(_plain(row)).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return value if value is None or isinstance(value, (str, int)) else value.isoformat() if hasattr(value, "isoformat") else str(value)


def _lines(source: records.Source) -> Iterator[bytes]:
    """The lines of a JSONL file as they are, malformed ones too; only the encoding becomes UTF-8, because files are joined."""
    if source.encoding == "utf-8":
        with open_bytes(source.path) as f:
            for i, line in enumerate(f):
                line = line.removeprefix(codecs.BOM_UTF8) if i == 0 else line
                if line.strip():
                    yield line.removesuffix(b"\n").removesuffix(b"\r")
        return
    for _, text, _error in text_lines(source.path, source.encoding):
        if text.strip():
            yield text.encode("utf-8", "replace")
