"""Exact near-duplicate removal: character n-gram Jaccard, keep first, numpy only.

Two texts are near-duplicates when J(x, y) = |X & Y| / |X | Y| >= threshold, where X and Y are their sets of character n-grams. A text shorter
than n has no n-gram: it is a duplicate only of an equal text. The answer equals the sequential scan that compares each text with every kept one before it.

Three steps, each for fewer texts: equal texts; texts of which so many n-grams occur nowhere else that they can have no near-duplicate (a table of hash counts
shows it: most texts of a natural corpus); the exact join of the rest (similarity_join.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .characters import codepoints
from .fold import key_of

if TYPE_CHECKING:
    from .ngrams import Ints


def exact_key(text: str) -> bytes:
    """What exact deduplication compares: 16 bytes, equal for texts that differ only in width, case, compatibility forms, traditional or simplified characters, or spacing.

    Punctuation counts: a question mark can turn the meaning.
    """
    return key_of(codepoints(text))


def clusters(kept_by: Ints) -> dict[int, list[int]]:
    """`{kept index: [indices dropped in its favour, ascending]}` of the kept texts that have any."""
    groups: dict[int, list[int]] = {}
    for i, keeper in enumerate(kept_by.tolist()):
        if keeper >= 0:
            groups.setdefault(keeper, []).append(i)
    return groups


def near_duplicates(texts: Sequence[str], *, n: int = 5, threshold: float = 0.8) -> Ints:
    """For each text, -1 where it is kept, else the index of an earlier kept text with Jaccard >= `threshold`. Shape [len(texts)], int64.

    Raises:
        ValueError: `n` < 1, or `threshold` outside (0, 1].
    """
    import numpy as np

    from .similarity_join import join

    if n < 1 or not 0 < threshold <= 1:
        raise ValueError(f"near_duplicates: n must be >= 1 and 0 < threshold <= 1, not n={n}, threshold={threshold}")
    kept_by = np.full(len(texts), -1, np.int64)
    first = dict(zip(reversed(texts), range(len(texts) - 1, -1, -1), strict=True))  # text -> where it occurs first
    if len(first) < len(texts):
        occurs = np.fromiter(map(first.__getitem__, texts), np.int64, len(texts))
        copies = np.flatnonzero(occurs != np.arange(len(texts)))
        kept_by[copies] = occurs[copies]
    candidates = np.sort(np.fromiter(first.values(), np.int64, len(first)))
    del first
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    candidates = candidates[lengths[candidates] >= n]
    if len(candidates):
        candidates = candidates[_with_neighbours(_pick(texts, candidates), n, threshold)]
    if len(candidates):
        near = join(_pick(texts, candidates), n, threshold)
        dropped = near >= 0
        kept_by[candidates[dropped]] = candidates[near[dropped]]
        copies = np.flatnonzero(kept_by >= 0)  # a copy of a dropped text follows it to its keeper
        keeper = kept_by[kept_by[copies]]
        kept_by[copies] = np.where(keeper >= 0, keeper, kept_by[copies])
    return kept_by


def _pick(texts: Sequence[str], indices: Ints) -> list[str]:
    return list(map(texts.__getitem__, indices.tolist()))


def _with_neighbours(texts: Sequence[str], n: int, threshold: float) -> Ints:
    """Indices of the texts that may have a near-duplicate: so many n-grams occur nowhere else in the others that J >= threshold is impossible."""
    import numpy as np

    from .ngram_index import SLACK, frequencies, table_bits
    from .ngrams import Grams

    grams = Grams(texts, n, cache=1 << 28)
    bits = table_bits(grams.total)
    table = frequencies(grams, bits)
    often = table > 0
    found = []
    for lo, hi, hashes in grams:
        count = grams.counts[lo:hi]
        elsewhere = np.add.reduceat(often[hashes >> np.uint32(32 - bits)], np.cumsum(count) - count, dtype=np.int64)
        found.append(lo + np.flatnonzero(elsewhere >= np.ceil(threshold * SLACK * count)))
    return np.concatenate(found)
