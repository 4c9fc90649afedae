"""Exact near-duplicate removal: character n-gram Jaccard, keep first, numpy only.

Two texts are near-duplicates when J(x, y) = |X & Y| / |X | Y| >= threshold, where X and Y are their sets of character n-grams. A text shorter
than n has no n-gram: it is a duplicate only of an equal text. The answer equals the sequential scan that compares each text with every kept one before it.

Three steps, each for fewer texts: equal texts; texts of which so many n-grams occur nowhere else that they can have no near-duplicate (a table of hash counts
shows it: most texts of a natural corpus); the exact join of the rest (similarity_join.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .characters import codepoints
from .fold import key_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .ngrams import Bits, Ints

MEMORY = 2 << 30  # bytes


def exact_key(text: str) -> bytes:
    """What exact deduplication compares: 16 bytes, equal for texts that differ only in width, case, compatibility forms, traditional or simplified characters, or spacing.

    Punctuation counts: a question mark can turn the meaning.
    """
    return key_of(codepoints(text))


def near_duplicates(texts: Sequence[str], *, n: int = 5, threshold: float = 0.8, memory: int = MEMORY, table: NDArray[np.uint8] | None = None) -> Ints:
    """For each text, -1 where it is kept, else the index of an earlier kept text with Jaccard >= `threshold`. Shape [len(texts)], int64.

    Args:
        texts: a list, or `parts.Texts`, which stay on disk.
        n: characters of an n-gram.
        threshold: least Jaccard of two near-duplicates.
        memory: bytes that tables and hashes may take; less means that more is computed again. Beyond it stay about 50 bytes a text, and 8 bytes for one in four
            n-grams of the texts that may have a near-duplicate.
        table: counts of the n-grams of at least these texts (`ngram_index.count_up`), where parts of the corpus were counted already.

    Raises:
        ValueError: `n` < 1, or `threshold` outside (0, 1].
    """
    import numpy as np

    from .ngrams import lengths_of
    from .similarity_join import join

    if n < 1 or not 0 < threshold <= 1:
        raise ValueError(f"near_duplicates: n must be >= 1 and 0 < threshold <= 1, not n={n}, threshold={threshold}")
    kept_by = np.full(len(texts), -1, np.int64)
    lengths = lengths_of(texts)
    short, long = np.flatnonzero(lengths < n), np.flatnonzero(lengths >= n)
    _drop_copies(kept_by, short, _pick(texts, short, memory))
    if len(long):
        long = long[_with_neighbours(_pick(texts, long, memory // 4), n, threshold, memory, table)]
    if len(long):
        chosen = _pick(texts, long, memory // 4)
        different = np.flatnonzero(_drop_copies(kept_by, long, chosen))
        near = join(_pick(chosen, different, memory // 4), n, threshold, memory)
        different = long[different]
        dropped = near >= 0
        kept_by[different[dropped]] = different[near[dropped]]
        copies = np.flatnonzero(kept_by >= 0)  # a copy of a dropped text follows it to its keeper
        keeper = kept_by[kept_by[copies]]
        kept_by[copies] = np.where(keeper >= 0, keeper, kept_by[copies])
    return kept_by


def _pick(texts: Sequence[str], indices: Ints, memory: int) -> Sequence[str]:
    from .parts import Texts

    if len(indices) == len(texts):
        return texts
    return texts.pick(indices, memory) if isinstance(texts, Texts) else list(map(texts.__getitem__, indices.tolist()))


def _drop_copies(kept_by: Ints, indices: Ints, texts: Sequence[str]) -> Bits:
    """Enter the texts that equal an earlier one of them; returns the mask of the others, [texts]."""
    import numpy as np

    first: dict[bytes, int] = {}
    for i, text in zip(indices.tolist(), texts, strict=True):
        earlier = first.setdefault(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), i)
        if earlier != i:
            kept_by[i] = earlier
    return np.asarray(kept_by[indices] < 0)


def _with_neighbours(texts: Sequence[str], n: int, threshold: float, memory: int, table: NDArray[np.uint8] | None) -> Ints:
    """Indices of the texts that may have a near-duplicate: so many n-grams occur nowhere else in the others that J >= threshold is impossible."""
    import numpy as np

    from .ngram_index import SLACK, frequencies, table_bits
    from .ngrams import Grams

    grams = Grams(texts, n, cache=memory // 8)
    least = np.uint8(1)
    if table is None:
        table = frequencies(grams, table_bits(grams.total, memory), memory)
    else:
        least = np.uint8(2)
    shift = np.uint32(32 - (len(table).bit_length() - 1))
    found = []
    for lo, hi, hashes in grams:
        count = grams.counts[lo:hi]
        elsewhere = np.add.reduceat(table[hashes >> shift] >= least, np.cumsum(count) - count, dtype=np.int64)
        found.append(lo + np.flatnonzero(elsewhere >= np.ceil(threshold * SLACK * count)))
    return np.concatenate(found)
