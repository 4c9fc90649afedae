"""Text that knows where it came from, through a Jinja template.

A `Tracked` string behaves as the `str` that it is and carries a second string of the same length, one code point per character: 0 for the template's
own text, otherwise the number of the message field (a "leaf") that the character was copied from. Slicing, stripping, splitting, joining and
concatenating treat both strings alike, so the rendered text says of each character whether the template or the data wrote it. Operations that cannot
be followed exactly taint their whole result (`MIXED` where several leaves took part): nothing from the data ever passes as template text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

TEMPLATE = "\0"
MIXED = "\ufffd"
_MIXED_NUMBER = ord(MIXED)


def leaf_mark(number: int) -> str:
    """The code point that marks characters of leaf `number` (1, 2, ...), skipping surrogates and the mark of mixed text."""
    if number >= 0xD800:
        number += 0x2800  # past the surrogates and the end of the basic plane
    return chr(number)


def leaf_number(mark: str) -> int:
    """The inverse of `leaf_mark`; 0 for template text, -1 for mixed text."""
    code = ord(mark)
    if code == _MIXED_NUMBER:
        return -1
    return code - 0x2800 if code >= 0x10000 else code


class Tracked(str):
    """A string and the origin of each of its characters (`marks`, same length)."""

    __slots__ = ("marks",)
    marks: str

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        return tracked(str.__add__(self, other), self.marks + marks_of(other))

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        return tracked(str.__add__(other, self), marks_of(other) + self.marks)

    def __mul__(self, times: Any) -> Any:
        return tracked(str.__mul__(self, times), self.marks * times)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> Any:
        return tainted(str.__mod__(self, values), self, values)

    def __rmod__(self, pattern: Any) -> Any:
        return tainted(str.__mod__(pattern, self), self)

    def __getitem__(self, key: Any) -> Any:
        return tracked(str.__getitem__(self, key), self.marks[key])

    def __iter__(self) -> Iterator[str]:
        return (tracked(c, m) for c, m in zip(str.__iter__(self), self.marks, strict=True))

    def strip(self, chars: str | None = None, /) -> Any:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Any:
        text = str.lstrip(self, chars)
        return tracked(text, self.marks[len(self) - len(text) :])

    def rstrip(self, chars: str | None = None, /) -> Any:
        text = str.rstrip(self, chars)
        return tracked(text, self.marks[: len(text)])

    def removeprefix(self, prefix: str, /) -> Any:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> Any:
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> Any:
        return self._aligned(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> Any:
        return self._aligned(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> Any:
        return self._aligned(str.splitlines(self, keepends), None)

    def partition(self, sep: str, /) -> Any:
        return tuple(self._aligned(str.partition(self, sep), ""))

    def rpartition(self, sep: str, /) -> Any:
        return tuple(self._aligned(str.rpartition(self, sep), ""))

    def _aligned(self, pieces: Iterable[str], sep: str | None) -> list[str]:
        """The pieces of a split with their marks; without a separator, white space lies between them, and no piece starts with what lies there."""
        found: list[str] = []
        at = 0
        for piece in pieces:
            start = at if sep is not None else str.find(self, piece, at)
            end = start + len(piece)
            found.append(tracked(piece, self.marks[start:end]))
            at = end + len(sep or "")
        return found

    def replace(self, old: str, new: str, count: Any = -1, /) -> Any:
        if not old:
            return tainted(str.replace(self, old, new, count), self, new)
        return join(tracked_or_plain(new), self.split(old, count))

    def join(self, parts: Iterable[str], /) -> Any:
        return join(self, parts)


def _conservative(name: str) -> Any:
    original = getattr(str, name)

    def method(self: Tracked, *args: Any, **kwargs: Any) -> Any:
        text = original(self, *args, **kwargs)
        same_length = not args and not kwargs and len(text) == len(self)
        return tracked(text, self.marks) if same_length else tainted(text, self, args, kwargs)

    method.__name__ = name
    return method


for _name in ("capitalize", "casefold", "center", "expandtabs", "format", "format_map", "ljust", "lower", "rjust", "swapcase", "title", "translate", "upper", "zfill"):
    setattr(Tracked, _name, _conservative(_name))


def tracked(text: str, marks: str) -> Tracked:
    """A tracked string from characters and their marks (equal lengths)."""
    result = str.__new__(Tracked, text)
    result.marks = marks
    return result


def marks_of(text: str) -> str:
    """The marks of any string; plain text is the template's."""
    return text.marks if isinstance(text, Tracked) else TEMPLATE * len(text)


def tracked_or_plain(text: str) -> Tracked:
    """The same text as a tracked string."""
    return text if isinstance(text, Tracked) else tracked(text, TEMPLATE * len(text))


def join(separator: str, parts: Iterable[Any]) -> str:
    """`separator.join(parts)` with marks; a plain `str` where nothing is tracked."""
    items = list(parts)
    text = str.join(separator, items)
    if not (isinstance(separator, Tracked) or any(isinstance(item, Tracked) for item in items)):
        return text
    return tracked(text, marks_of(separator).join([marks_of(item) for item in items]))


def concat(parts: Iterable[str]) -> str:
    """What a Jinja environment joins its output with."""
    return join("", parts)


def tainted(text: str, *sources: Any) -> str:
    """`text` marked wholly with the one leaf found in `sources`, `MIXED` where there are several, or plain where there is none."""
    seen = set().union(*(set(marks) for marks in _all_marks(sources))) - {TEMPLATE}
    if not seen:
        return text
    return tracked(text, (seen.pop() if len(seen) == 1 else MIXED) * len(text))


def _all_marks(value: Any) -> Iterator[str]:
    if isinstance(value, Tracked):
        yield value.marks
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _all_marks(key)
            yield from _all_marks(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _all_marks(child)


def track_tree(value: Any, mark: str) -> Any:
    """A copy of JSON-like data with each string (keys included) tracked as one leaf."""
    if isinstance(value, str):
        return tracked(value, mark * len(value))
    if isinstance(value, Mapping):
        return {track_tree(key, mark): track_tree(child, mark) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [track_tree(child, mark) for child in value]
    return value
