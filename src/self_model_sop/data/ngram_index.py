"""Index of texts by their rare n-grams, for the similarity join: safe filters that name the pairs worth comparing.

Prefix filter: Chaudhuri et al., ICDE 2006; Bayardo et al., WWW 2007. Bit signatures that bound the difference of a pair: Sandes et al., Inf. Syst. 2019.
Every filter is safe: it may let a pair through that is no near-duplicate, never the other way round.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from .ngrams import Grams, first_of_runs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .ngrams import Bits, Ints

SLACK = 1 - 1e-12  # bounds are loosened by this factor, so that rounding can only let pairs through
FIELD = 52  # bits of a 64-bit key below the number of a text in its batch
BATCH_TEXTS = 1 << (64 - FIELD)
_HASH = FIELD - 8  # bits of the hash, below 8 bits of rarity
_SIGNATURE = 256  # bits
_PIECE = 1 << 14  # pairs looked at together
_SORTED = 1 << 27  # n-gram hashes sorted at once, at most (512 MiB)
_READ = 1 << 22  # bytes of a table read at once
_COUNTED = 1 << 18  # of these, how many are looked at together


def table_bits(total: int, memory: int = 1 << 34) -> int:
    """Size of a table of counts, as a power of two: about one entry for an n-gram, a quarter of the memory at most."""
    return min(32, max(10, (max(total, 2) - 1).bit_length()), max(10, (memory // 4).bit_length() - 1))


def count_up(table: NDArray[np.uint8], bits: int, hashes: NDArray[np.uint32]) -> None:
    """Count n-grams by the top bits of their hashes: 0, 1, or 2 for more. Tables of parts of a corpus add up (`add_table`)."""
    import numpy as np

    entry = hashes >> np.uint32(32 - bits)
    entry.sort()
    first = first_of_runs(entry)
    once = entry[first]
    table[once] = np.minimum(table[once] + np.uint8(1), 2)
    table[entry[~first]] = 2


def add_table(total: NDArray[np.uint8], file: IO[bytes], size: int) -> None:
    """Add a table of `size` entries, read from a file piece by piece, to one that may be smaller: the sum, at most 2. Both sizes are powers of two."""
    import numpy as np

    each = size // len(total)  # neighbours that share an entry of the smaller table
    for low in range(0, len(total), step := max(1, _READ // each)):
        part = total[low : low + step]
        found = np.frombuffer(file.read(len(part) * each), np.uint8).reshape(len(part), each)
        np.minimum(part + found.sum(axis=1, dtype=np.uint32), 2, out=part, casting="unsafe")


def frequencies(grams: Grams, bits: int, memory: int = 1 << 34) -> NDArray[np.uint8]:
    """Table [2**bits] of how often an n-gram occurs in all texts, by the top bits of its hash: 0 means at most once, else its count, at most 255.

    Where several share an entry it holds the highest count. Worked through in ranges of hashes, so that the memory for sorting is bounded.
    """
    import numpy as np

    table = np.zeros(1 << bits, np.uint8)
    parts = -(-grams.total // max(1, min(_SORTED, memory // 32))) or 1
    edges = [(i << 32) // parts for i in range(parts + 1)]
    for low, high in itertools.pairwise(edges):
        values = np.concatenate([_in_range(hashes, low, high) for _, _, hashes in grams])
        values.sort()
        for piece in _between_runs(values):
            _count(piece, table, bits)
    return table


def _between_runs(values: NDArray[np.uint32]) -> Iterator[NDArray[np.uint32]]:
    """Pieces of a sorted array, cut where the value changes."""
    import numpy as np

    cuts = np.searchsorted(values, values[_COUNTED::_COUNTED])
    for low, high in itertools.pairwise([0, *cuts.tolist(), len(values)]):
        yield values[low:high]


def _count(values: NDArray[np.uint32], table: NDArray[np.uint8], bits: int) -> None:
    """Enter the counts of sorted values that occur more than once."""
    import numpy as np

    same = values[1:] == values[:-1]  # a run of k equal values is a run of k - 1 of these
    begins, ends = same.copy(), same.copy()
    begins[1:] &= ~same[:-1]
    ends[:-1] &= ~same[1:]
    starts = np.flatnonzero(begins)
    if not len(starts):
        return
    counts = np.minimum(np.flatnonzero(ends) - starts + 2, 255).astype(np.uint8)
    entry = values[starts] >> np.uint32(32 - bits)
    firsts = np.flatnonzero(first_of_runs(entry))
    table[entry[firsts]] = np.maximum(table[entry[firsts]], np.maximum.reduceat(counts, firsts))


def _in_range(hashes: NDArray[Any], low: int, high: int) -> NDArray[np.uint32]:
    """The top 32 bits of the hashes for which they are in low .. high - 1."""
    import numpy as np

    top = hashes if hashes.dtype == np.uint32 else (hashes >> np.uint64(32)).astype(np.uint32)
    return top if high - low == 1 << 32 else top[(top >= low) & (top < high)]


@dataclass
class Index:
    """Texts by their n-gram sets.

    Attributes:
        size: n-grams in the set of each text.
        once: how many of them occur in no other text.
        signature: [words of 64 bits, texts]; bit i is the parity of the number of n-grams that hash to i.
        postings: sorted keys: hash of an n-gram of the prefix, then the text (in the low `text_bits` bits).
    """

    size: Ints
    once: Ints
    signature: NDArray[np.uint64]
    postings: NDArray[np.uint64]
    text_bits: int

    def text(self, postings: NDArray[np.uint64]) -> Ints:
        """The texts of some postings."""
        import numpy as np

        out: Ints = (postings & np.uint64((1 << self.text_bits) - 1)).view(np.int64)
        return out

    def lists(self, postings: NDArray[np.uint64]) -> tuple[Ints, Ints]:
        """(start, length) of each list: the texts whose prefixes share an n-gram."""
        import numpy as np

        starts = np.flatnonzero(first_of_runs(postings >> np.uint64(self.text_bits)))
        return starts, np.diff(starts, append=len(postings))

    def plausible(self, a: Ints, b: Ints, t: float) -> Bits:
        """Pairs for which sizes, n-grams that occur nowhere else, and signatures allow J >= t."""
        import numpy as np

        out = np.zeros(len(a), bool)
        for lo in range(0, len(a), _PIECE):  # small pieces stay in the cache
            x, y = a[lo : lo + _PIECE], b[lo : lo + _PIECE]
            sizes, other = self.size[x], self.size[y]
            overlap = np.minimum(sizes - self.once[x], other - self.once[y])
            sizes += other
            rest = np.flatnonzero((1 + t) * overlap >= t * SLACK * sizes)
            near = (1 + t) * SLACK * self.distance(x[rest], y[rest]) <= (1 - t * SLACK) * sizes[rest]
            out[lo + rest[near]] = True
        return out

    def distance(self, a: Ints, b: Ints) -> NDArray[np.int16]:
        """A lower bound of |A - B| + |B - A| of the n-gram sets of each pair."""
        import numpy as np

        out = np.zeros(len(a), np.int16)
        for word in self.signature:
            out += _popcount(word[a] ^ word[b])
        return out


def _popcount(words: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Set bits of each word."""
    import numpy as np

    if hasattr(np, "bitwise_count"):
        return np.asarray(np.bitwise_count(words))
    return np.asarray(np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1, dtype=np.uint8))


def build(grams: Grams, t: float, memory: int = 1 << 34) -> Index:
    """Index the prefixes: J >= t implies that two texts share one of the first |x| - ceil(t|x|) + 1 n-grams of each, in any global order; here rarest first."""
    import numpy as np

    bits = table_bits(grams.total, memory)
    table = frequencies(grams, bits, memory)
    number = len(grams.texts)
    size, once = np.zeros((2, number), np.int64)
    index = Index(size, once, np.zeros((_SIGNATURE // 64, number), np.uint64), np.zeros(0, np.uint64), max(1, (number - 1).bit_length()))
    postings = []
    for lo, hi, hashes in _batches(grams):
        rarity = table[(hashes >> np.uint64(64 - bits)).view(np.int64)].astype(np.uint64)
        key = np.repeat(np.arange(hi - lo, dtype=np.uint64) << np.uint64(FIELD), grams.counts[lo:hi])
        key |= rarity << np.uint64(_HASH) | hashes >> np.uint64(64 - _HASH)
        key.sort()  # by text, rarest n-gram first
        postings.append(_add(index, lo, hi, key[first_of_runs(key)], t))
    index.postings = np.concatenate(postings)
    index.postings.sort()
    return index


def _batches(grams: Grams) -> Iterator[tuple[int, int, NDArray[np.uint64]]]:
    """The blocks of `grams`, cut to at most `BATCH_TEXTS` texts."""
    for lo, hi, hashes in grams:
        at = 0
        for start in range(lo, hi, BATCH_TEXTS):
            stop = min(hi, start + BATCH_TEXTS)
            count = int(grams.counts[start:stop].sum())
            yield start, stop, hashes[at : at + count]
            at += count


def _add(index: Index, lo: int, hi: int, key: NDArray[np.uint64], t: float) -> NDArray[np.uint64]:
    """Fill in the rows lo .. hi - 1 of the index from their sorted n-grams, and return their postings."""
    import numpy as np

    text = (key >> np.uint64(FIELD)).view(np.int64)
    rare = (key >> np.uint64(_HASH) & np.uint64(255)).astype(np.uint8) == 0
    size = np.bincount(text, minlength=hi - lo)
    index.size[lo:hi], index.once[lo:hi] = size, np.bincount(text[rare], minlength=hi - lo)
    bit = text * _SIGNATURE + (key & np.uint64(_SIGNATURE - 1)).view(np.int64)
    parity = (np.bincount(bit, minlength=(hi - lo) * _SIGNATURE) & 1).astype(np.uint8)
    index.signature[:, lo:hi] = np.packbits(parity).view(np.uint64).reshape(hi - lo, -1).T
    prefix = size - np.ceil(t * SLACK * size).astype(np.int64) + 1
    end = np.cumsum(size) - size + prefix  # positions from here on are no part of the prefix
    used = (np.arange(len(key)) < np.repeat(end, size)) & ~rare
    low = np.uint64(index.text_bits)
    postings: NDArray[np.uint64] = key[used] << np.uint64(64 - _HASH) >> low << low | (text[used] + lo).view(np.uint64)
    return postings
