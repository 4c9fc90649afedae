"""Hashes of character n-grams of many texts at once, in numpy, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Bits = NDArray[np.bool_]

BLOCK = 1 << 20  # characters hashed at once: bounds memory, keeps the arrays near the cache
_PIECE = 1 << 14
# odd multipliers: Knuth's golden ratio, then the mixers of xxHash; one set per width
_MULTIPLIERS = {32: (0x9E3779B1, 0x85EBCA77, 15), 64: (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 32)}


def hash_windows(codes: NDArray[np.uint32], n: int, width: int) -> NDArray[Any]:
    """Hash of the n characters that begin at every position; uint32 or uint64 by `width`, shape [len(codes)]; the last n - 1 are undefined."""
    import numpy as np

    kind: Any = np.uint32 if width == 32 else np.uint64
    step, mix, shift = _MULTIPLIERS[width]
    out = np.zeros(len(codes), kind)
    for start in range(0, len(codes) - n + 1, _PIECE):  # small pieces stay in the cache
        piece = codes[start : start + _PIECE + n - 1].astype(kind, copy=False)
        x = out[start : start + len(piece) - n + 1]
        np.multiply(piece[: len(x)], kind(step), out=x)
        for j in range(1, n):
            x += piece[j : j + len(x)]
            x *= kind(step)
        x ^= x >> kind(shift)
        x *= kind(mix)
        x ^= x >> kind(shift)
    return out


@runtime_checkable
class Stored(Protocol):
    """Texts that are not in memory: their lengths are known, neighbours can be read together."""

    lengths: Ints

    def joined(self, low: int, high: int) -> str: ...


def lengths_of(texts: Sequence[str]) -> Ints:
    """Characters of each text, [texts]."""
    import numpy as np

    return texts.lengths if isinstance(texts, Stored) else np.fromiter(map(len, texts), np.int64, len(texts))


class Grams:
    """The n-gram hashes of texts that are all at least n long.

    Blocks are computed anew at each iteration, or kept where all of them fit into `cache` bytes.
    """

    def __init__(self, texts: Sequence[str], n: int, *, width: int = 32, cache: int = 0, block: int = BLOCK) -> None:
        import numpy as np

        self.texts, self.n, self.width = texts, n, width
        self.lengths = lengths_of(texts)
        self.counts = self.lengths - (n - 1)  # n-grams of each text, repeats included
        ends = np.cumsum(self.lengths)
        self.total = int(self.counts.sum())
        cuts = np.searchsorted(ends, np.arange(block, ends[-1] if len(ends) else 0, block), side="left") + 1
        self.cuts = np.unique(np.concatenate([[0], cuts, [len(texts)]])).tolist()
        self._kept: list[NDArray[Any]] | None = [] if self.total * width // 8 <= cache else None

    def __iter__(self) -> Iterator[tuple[int, int, NDArray[Any]]]:
        """Yield (first text, one past the last, their hashes one text after the other: `counts` says how many each)."""
        spans = list(zip(self.cuts[:-1], self.cuts[1:], strict=True))
        if self._kept is not None and len(self._kept) == len(spans):
            yield from ((lo, hi, h) for (lo, hi), h in zip(spans, self._kept, strict=True))
            return
        for lo, hi in spans:
            hashes = self._block(lo, hi)
            if self._kept is not None:
                self._kept.append(hashes)
            yield lo, hi, hashes

    def _block(self, lo: int, hi: int) -> NDArray[Any]:
        import numpy as np

        joined = self.texts.joined(lo, hi) if isinstance(self.texts, Stored) else "".join(self.texts[lo:hi])
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4")
        hashes = hash_windows(codes, self.n, self.width)
        inside = np.ones(len(codes), bool)  # windows that cross into the next text are dropped
        ends = np.cumsum(self.lengths[lo:hi])
        for j in range(1, self.n):
            inside[ends - j] = False
        return hashes[inside]


def first_of_runs(values: NDArray[Any]) -> Bits:
    """Mask of the first of each run of equal neighbours."""
    import numpy as np

    mask = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=mask[1:])
    return mask


def ranges(start: Ints, count: Ints) -> Ints:
    """The concatenation of start[i], start[i] + 1, ..., start[i] + count[i] - 1."""
    import numpy as np

    return np.arange(count.sum()) + np.repeat(start - np.cumsum(count) + count, count)
