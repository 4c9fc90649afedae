"""Bytes of a file, unpacked while reading, and the lines of its text in the encodings that Chinese data arrives in."""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import DATA, SopError, missing_extra

MAX_LINE_BYTES = 10_000_000
MAX_RATIO = 200  # unpacked bytes per stored byte; text reaches about 20
FREE_BYTES = 64 << 20  # so much is unpacked before the ratio is looked at
DAMAGED = "the file is damaged or its suffix is wrong; fetch it again"
BOMB = "this looks like a decompression bomb; unpack it yourself if it is wanted"
_CHUNK = 1 << 20


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
            raise SopError(f"cannot unpack: {error}", where=str(self._path), fix=DAMAGED, code=DATA) from None
        self._count += len(data)
        if self._count > self._limit:
            raise SopError(f"unpacks to more than {MAX_RATIO} times its size", where=str(self._path), fix=BOMB, code=DATA)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._inner.close()
        super().close()


def is_packed(path: Path) -> str:
    """`gz` or `zst` where a file's suffix or its first bytes say so, else empty."""
    with path.open("rb") as f:
        magic = f.read(4)
    if path.suffix == ".gz" or magic[:2] == b"\x1f\x8b":
        return "gz"
    return "zst" if path.suffix == ".zst" or magic == b"\x28\xb5\x2f\xfd" else ""


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked while reading where it is packed."""
    packed = is_packed(path)
    if packed == "gz":
        return io.BufferedReader(_Bounded(gzip.open(path, "rb"), path), _CHUNK)
    if packed == "zst":
        try:
            import zstandard
        except ImportError:
            raise missing_extra("zstandard", "zstd") from None
        return io.BufferedReader(_Bounded(zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(path.open("rb")), path), _CHUNK)
    return path.open("rb", buffering=_CHUNK)


class Span(NamedTuple):
    """The lines of a file that begin at the bytes start .. end - 1."""

    start: int = 0
    end: int | None = None


WHOLE = Span()


def _byte_lines(path: Path, limit: int, span: Span = WHOLE) -> Iterator[tuple[int, bytes, bool]]:
    """(line number, line without its end, complete?) for every line; of a line longer than `limit` only the start."""
    with open_bytes(path) as f:
        number, at = _seek_line(f, span.start)
        while (span.end is None or at < span.end) and (line := f.readline(limit + 2)):
            number += 1
            at += len(line)
            complete = len(line.rstrip(b"\r\n")) <= limit
            if not complete:
                tail = line
                while tail and not tail.endswith(b"\n"):
                    tail = f.readline(_CHUNK)
                    at += len(tail)
                line = line[:1000]
            yield number, line.removesuffix(b"\n").removesuffix(b"\r"), complete


def _seek_line(f: IO[bytes], start: int) -> tuple[int, int]:
    """(lines before, byte) of the first line that begins at `start` or later; the file is left there."""
    number, at, last = 0, 0, b"\n"
    while at < start:
        chunk = f.read(min(_CHUNK, start - at))
        if not chunk:
            return number, start
        number += chunk.count(b"\n")
        at, last = at + len(chunk), chunk[-1:]
    while last != b"\n" and (tail := f.readline(_CHUNK)):
        at, last = at + len(tail), tail[-1:]
        number += last == b"\n"
    return number, at


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


def text_lines(path: Path, encoding: str, limit: int = MAX_LINE_BYTES, span: Span = WHOLE) -> Iterator[tuple[int, str, str | None]]:
    """(line number, text, error) for every line of a text file, or of a span of it (no span of UTF-16/32); error is line_too_long or undecodable."""
    if encoding.startswith(("utf-16", "utf-32")):
        yield from _wide_lines(path, encoding, limit)
        return
    for number, line, complete in _byte_lines(path, limit, span):
        if number == 1 and encoding == "utf-8":
            line = line.removeprefix(codecs.BOM_UTF8)
        if not complete:
            yield number, line.decode(encoding, "replace"), "line_too_long"
            continue
        try:
            yield number, line.decode(encoding), None
        except UnicodeDecodeError:
            yield number, line.decode(encoding, "replace"), "undecodable"


def _wide_lines(path: Path, encoding: str, limit: int) -> Iterator[tuple[int, str, str | None]]:
    """Lines of UTF-16/32, where a newline is no single byte; `surrogatepass` keeps the damage inside its line."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass" if encoding.startswith("utf-16") else "replace")
    number, rest, skipping = 0, "", False
    with open_bytes(path) as f:
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
                bad = has_surrogate(line)
                yield number, line.removesuffix("\r").encode("utf-8", "replace").decode() if bad else line.removesuffix("\r"), "undecodable" if bad else None
            if not chunk:
                return
            if len(rest) > limit:
                if not skipping:
                    number += 1
                    yield number, rest[:1000], "line_too_long"
                rest, skipping = "", True


def has_surrogate(text: str) -> bool:
    """True for text with half a surrogate pair, which no UTF-8 file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
