"""Which of some texts are near-duplicates of an earlier one: an exact set-similarity join over n-gram sets, keep first.

Prefix filter: Chaudhuri et al., ICDE 2006; Bayardo et al., WWW 2007. Bit signatures that bound the overlap of a pair: Sandes et al., Inf. Syst. 2019.
Every filter is safe: it may let a pair through that is no near-duplicate, never the other way round. What passes is compared exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .ngrams import Grams, first_of_runs, ranges

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .ngrams import Bits, Ints

SLACK = 1 - 1e-12  # bounds are loosened by this factor, so that rounding can only let pairs through
_SIGNATURE = 256  # bits
_BATCH_TEXTS = 1 << 12  # texts of one batch are numbered in 12 bits of a 64-bit key
_PAIRS = 1 << 21  # candidate pairs looked at together
_SORTED = 1 << 27  # n-gram hashes sorted at once (512 MiB)
_FIELD = 52  # low bits of a key: rarity and hash of an n-gram


def frequencies(grams: Grams, *, bits: int) -> NDArray[np.uint8]:
    """Table [2**bits] of how often an n-gram occurs in all texts, by the top bits of its hash: 0 means at most once, else its count, at most 255.

    Where several share an entry it holds the highest count. Worked through in ranges of hashes, so that the memory for sorting is bounded.
    """
    import numpy as np

    table = np.zeros(1 << bits, np.uint8)
    parts = -(-grams.total // _SORTED) or 1
    edges = [(i << 32) // parts for i in range(parts + 1)]
    for low, high in itertools.pairwise(edges):
        values = np.concatenate([_in_range(hashes, low, high) for _, _, hashes in grams])
        values.sort()
        same = values[1:] == values[:-1]  # a run of k equal values is a run of k - 1 of these
        begins, ends = same.copy(), same
        begins[1:] &= ~same[:-1]
        starts = np.flatnonzero(begins)
        ends[:-1] &= ~same[1:]
        counts = np.minimum(np.flatnonzero(ends) - starts + 2, 255).astype(np.uint8)
        entry = values[starts] >> np.uint32(32 - bits)
        del values, same, begins, ends
        firsts = np.flatnonzero(first_of_runs(entry))
        if len(firsts):
            table[entry[firsts]] = np.maximum.reduceat(counts, firsts)
    return table


def _in_range(hashes: NDArray[Any], low: int, high: int) -> NDArray[np.uint32]:
    """The top 32 bits of the hashes for which they are in low .. high - 1."""
    import numpy as np

    top = hashes if hashes.dtype == np.uint32 else (hashes >> np.uint64(32)).astype(np.uint32)
    return top if high - low == 1 << 32 else top[(top >= low) & (top < high)]


def table_bits(total: int) -> int:
    """Size of the table of `frequencies`, as a power of two: about one entry for an n-gram."""
    return min(32, max(10, (max(total, 2) - 1).bit_length()))


def bucket(hashes: NDArray[np.uint64], bits: int) -> Ints:
    """Where `frequencies` keeps the count of each hash."""
    import numpy as np

    out: Ints = (hashes >> np.uint64(64 - bits)).view(np.int64)
    return out


@dataclass
class _Index:
    """Texts by their n-gram sets. Arrays over texts: size of the set, how many of it occur nowhere else, signature; and the postings."""

    size: Ints
    once: Ints
    signature: NDArray[np.uint64]
    postings: NDArray[np.uint64]  # sorted; hash of an n-gram of the prefix in the high bits, text in the low ones
    text_bits: int

    def text(self, postings: NDArray[np.uint64]) -> Ints:
        import numpy as np

        out: Ints = (postings & np.uint64((1 << self.text_bits) - 1)).view(np.int64)
        return out

    def list_starts(self, postings: NDArray[np.uint64]) -> tuple[Ints, Ints]:
        """Start of each list (texts that share an n-gram of their prefixes), and its length."""
        import numpy as np

        starts = np.flatnonzero(first_of_runs(postings >> np.uint64(self.text_bits)))
        return starts, np.diff(starts, append=len(postings))


def _batches(grams: Grams, limit: int = 1 << 20) -> Iterator[tuple[int, int, NDArray[np.uint64]]]:
    """The blocks of `grams`, cut to at most `_BATCH_TEXTS` texts."""
    for lo, hi, hashes in grams:
        at = 0
        for start in range(lo, hi, _BATCH_TEXTS):
            stop = min(hi, start + _BATCH_TEXTS)
            count = int(grams.counts[start:stop].sum())
            yield start, stop, hashes[at : at + count]
            at += count


def _build(grams: Grams, t: float) -> _Index:
    """Index the rarest n-grams of each text: J >= t implies that two texts share one of the first |x| - ceil(t|x|) + 1, in any global order."""
    import numpy as np

    bits = table_bits(grams.total)
    table = frequencies(grams, bits=bits)
    number = len(grams.texts)
    size, once = np.zeros((2, number), np.int64)
    index = _Index(size, once, np.zeros((number, _SIGNATURE // 64), np.uint64), np.zeros(0, np.uint64), max(1, (number - 1).bit_length()))
    entries = []
    for lo, hi, hashes in _batches(grams):
        count = table[bucket(hashes, bits)]
        key = np.repeat(np.arange(hi - lo, dtype=np.uint64) << np.uint64(_FIELD), grams.counts[lo:hi])
        key |= count.astype(np.uint64) << np.uint64(_FIELD - 8)
        key |= hashes >> np.uint64(64 - _FIELD + 8)
        key.sort()  # by text, rarest n-gram first
        key = key[first_of_runs(key)]
        text = (key >> np.uint64(_FIELD)).view(np.int64)
        rare = ((key >> np.uint64(_FIELD - 8)) & np.uint64(255)).astype(np.uint8) == 0
        size = np.bincount(text, minlength=hi - lo)
        index.size[lo:hi], index.once[lo:hi] = size, np.bincount(text[rare], minlength=hi - lo)
        cell = text * _SIGNATURE + (key & np.uint64(_SIGNATURE - 1)).view(np.int64)
        parity = (np.bincount(cell, minlength=(hi - lo) * _SIGNATURE) & 1).astype(np.uint8)
        index.signature[lo:hi] = np.packbits(parity).view(np.uint64).reshape(hi - lo, -1)
        prefix = size - np.ceil(t * SLACK * size).astype(np.int64) + 1
        used = (np.arange(len(key)) - (np.cumsum(size) - size)[text] < prefix[text]) & ~rare
        low = np.uint64(index.text_bits)
        entries.append(key[used] << np.uint64(64 - _FIELD + 8) >> low << low | (text[used] + lo).view(np.uint64))
    index.postings = np.concatenate(entries)
    index.postings.sort()
    return index


def _plausible(index: _Index, a: Ints, b: Ints, t: float) -> Bits:
    """Pairs whose sizes and n-grams that occur nowhere else allow J >= t."""
    import numpy as np

    overlap = np.minimum(index.size[a] - index.once[a], index.size[b] - index.once[b])
    out: Bits = (1 + t) * overlap >= t * SLACK * (index.size[a] + index.size[b])
    return out


def _popcount(words: NDArray[np.uint64]) -> Ints:
    """Number of set bits of each row."""
    import numpy as np

    if hasattr(np, "bitwise_count"):
        return np.asarray(np.bitwise_count(words).sum(axis=1), np.int64)
    return np.asarray(np.unpackbits(words.view(np.uint8), axis=1).sum(axis=1), np.int64)


def _distance(index: _Index, a: Ints, b: Ints) -> Ints:
    """A lower bound of |x - y| + |y - x|."""
    return _popcount(index.signature[a] ^ index.signature[b])


def _candidates(index: _Index, a: Ints, b: Ints, t: float) -> tuple[Ints, Ints, Ints]:
    """The distinct pairs that no filter excludes, with their distances, ordered by b, then the likeliest a first."""
    import numpy as np

    ok = _plausible(index, a, b, t)
    key = b[ok] << 32 | a[ok]
    key.sort()
    key = key[first_of_runs(key)]
    a, b = key & 0xFFFFFFFF, key >> 32
    distance = _distance(index, a, b)
    total = index.size[a] + index.size[b]
    ok = (1 + t) * distance <= (1 - t * SLACK * SLACK) * total * (1 + 1e-9)
    a, b, distance = a[ok], b[ok], distance[ok]
    order = np.lexsort((distance, b))
    return a[order], b[order], distance[order]


def similar(texts: Sequence[str], a: Ints, b: Ints, n: int, t: float) -> Bits:
    """Mask of the pairs (a[i], b[i]) of texts whose n-gram sets have Jaccard >= t: counted, not estimated (n-grams compared by 51 bits of hash)."""
    import numpy as np

    out = np.zeros(len(a), bool)
    lengths = np.fromiter((len(texts[i]) + len(texts[j]) for i, j in zip(a.tolist(), b.tolist(), strict=True)), np.int64, len(a))
    ends = np.cumsum(lengths)
    lo = 0
    while lo < len(a):
        hi = max(lo + 1, int(np.searchsorted(ends, ends[lo] - lengths[lo] + (1 << 18), side="right")))
        hi = min(hi, lo + _BATCH_TEXTS, len(a))
        out[lo:hi] = _jaccard([texts[i] for i in a[lo:hi].tolist()], [texts[i] for i in b[lo:hi].tolist()], n) >= t
        lo = hi
    return out


def _jaccard(left: list[str], right: list[str], n: int) -> NDArray[np.float64]:
    """Jaccard of the n-gram sets of left[i] and right[i], for at most `_BATCH_TEXTS` pairs."""
    import numpy as np

    grams = Grams(left + right, n, width=64, block=1 << 62)
    [(_, _, hashes)] = grams
    pair = np.concatenate([np.arange(len(left), dtype=np.uint64) << np.uint64(_FIELD)] * 2)
    side = np.repeat(np.array([0, 1], np.uint64), len(left))
    key = np.repeat(pair | side, grams.counts)
    key |= hashes >> np.uint64(64 - _FIELD) & ~np.uint64(1)
    key.sort()
    key = key[first_of_runs(key)]
    both = key[1:] >> np.uint64(1) == key[:-1] >> np.uint64(1)
    common = np.bincount((key[1:][both] >> np.uint64(_FIELD)).view(np.int64), minlength=len(left))
    total = np.bincount((key >> np.uint64(_FIELD)).view(np.int64), minlength=len(left))
    out: NDArray[np.float64] = common / (total - common)
    return out


class _Join:
    """State of one join: which texts are still undecided or kept, and for the dropped ones the kept text that caused it."""

    def __init__(self, texts: Sequence[str], n: int, t: float, index: _Index) -> None:
        import numpy as np

        self.texts, self.n, self.t, self.index = texts, n, t, index
        self.keeper: Ints = np.full(len(texts), -1, np.int64)
        self.postings = index.postings
        self._drop_single_lists()

    def _drop_single_lists(self) -> None:
        import numpy as np

        _, length = self.index.list_starts(self.postings)
        self.postings = self.postings[np.repeat(length > 1, length)]

    def sure_rounds(self) -> None:
        """Drop the near-duplicates of texts that are surely kept (they come first in all their lists), then take both out of the lists; repeat.

        A cluster of k copies costs k comparisons here instead of k * k / 2.
        """
        import numpy as np

        for _ in range(50):
            before = len(self.postings)
            if not before:
                return
            starts, length = self.index.list_starts(self.postings)
            b = self.index.text(self.postings)
            a = np.repeat(b[starts], length)
            sure = np.ones(len(self.texts), bool)
            sure[b[a != b]] = False
            pick = sure[a] & (a != b)
            self._decide(a[pick], b[pick])
            alive = (self.keeper < 0) & ~sure
            self.postings = self.postings[alive[b]]
            self._drop_single_lists()
            if len(self.postings) > 0.9 * before:
                return

    def _decide(self, a: Ints, b: Ints) -> None:
        """Compare pairs whose `a` is kept: for each b its likeliest keeper first, the others only where that one is none."""
        a, b, _ = _candidates(self.index, a, b, self.t)
        best = first_of_runs(b)
        for chosen in (best, ~best):
            x, y = a[chosen], b[chosen]
            open_ = self.keeper[y] < 0
            x, y = x[open_], y[open_]
            yes = similar(self.texts, x, y, self.n, self.t)
            x, y = x[yes][::-1], y[yes][::-1]
            self.keeper[y] = x  # written last: the likeliest

    def all_pairs(self) -> None:
        """Whatever is left: every pair that shares a list, in the order of the later text, so that earlier decisions spare comparisons."""
        import numpy as np

        starts, length = self.index.list_starts(self.postings)
        text = self.index.text(self.postings)
        before = np.arange(len(text)) - np.repeat(starts, length)  # predecessors in the list
        order = np.argsort(text, kind="stable")
        pairs = np.cumsum(before[order])
        lo = 0
        while lo < len(order):
            hi = max(lo + 1, int(np.searchsorted(pairs, (pairs[lo - 1] if lo else 0) + _PAIRS, side="right")))
            while hi < len(order) and text[order[hi]] == text[order[hi - 1]]:
                hi += 1
            entry = order[lo:hi]
            a = text[ranges(entry - before[entry], before[entry])]
            b = np.repeat(text[entry], before[entry])
            open_ = self.keeper[a] < 0
            self._scan(a[open_], b[open_])
            lo = hi

    def _scan(self, a: Ints, b: Ints) -> None:
        """Compare pairs (a < b), then decide in the order of b: only a kept text drops another."""
        a, b, _ = _candidates(self.index, a, b, self.t)
        yes = similar(self.texts, a, b, self.n, self.t)
        for i, j in zip(a[yes].tolist(), b[yes].tolist(), strict=True):
            if self.keeper[i] < 0 and self.keeper[j] < 0:
                self.keeper[j] = i


def join(texts: Sequence[str], n: int, t: float) -> Ints:
    """For each text -1 where it is kept, else the index of an earlier kept one with Jaccard >= t. All texts differ and are at least n long."""
    grams = Grams(texts, n, width=64, cache=1 << 28)
    work = _Join(texts, n, t, _build(grams, t))
    del grams
    work.sure_rounds()
    work.all_pairs()
    return work.keeper
