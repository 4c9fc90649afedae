"""What goes into one training item: whole examples, bins of examples (best fit), or blocks cut from one stream of documents."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .tokens import Segment, TokenSet


class Item(NamedTuple):
    """One training item: the examples that it holds, their segments, and its place in the training, which random draws about it are seeded with."""

    examples: list[int]
    segments: list[Segment]
    place: int


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most `capacity`: best-fit decreasing (Johnson 1973), longest first into the fullest bin that still has room.

    Raises:
        ValueError: where a length exceeds the capacity.
    """
    if len(lengths) and max(lengths) > capacity:
        raise ValueError(f"a length of {max(lengths)} exceeds the capacity {capacity}")
    bins: list[list[int]] = []
    spaces: list[int] = []  # distinct free spaces, sorted
    having: dict[int, list[int]] = {}  # free space -> bins with it
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[index]
        at = bisect.bisect_left(spaces, size)
        if at < len(spaces):
            space = spaces[at]
            chosen = having[space].pop()
            if not having[space]:
                del having[space], spaces[at]
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left = space - size
        if left not in having:
            having[left] = []
            bisect.insort(spaces, left)
        having[left].append(chosen)
    return bins


class Examples:
    """A dataset of single examples."""

    def __init__(self, tokens: TokenSet, indices: Sequence[int] | None = None) -> None:
        self.tokens = tokens
        self.indices = list(range(len(tokens)) if indices is None else indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Item:
        index = self.indices[i]
        return Item([index], [self.tokens.segment(index)], i)


class Bins:
    """A dataset of bins, each of several whole examples that do not see one another."""

    def __init__(self, tokens: TokenSet, capacity: int) -> None:
        self.tokens = tokens
        self.bins = best_fit(tokens.lengths.tolist(), capacity)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, i: int) -> Item:
        return Item(self.bins[i], [self.tokens.segment(j) for j in self.bins[i]], i)


class Blocks:
    """A dataset of blocks of `size` tokens cut from one stream of documents: no padding, no remainder lost (the last block is shorter).

    A document that does not fit is continued in the next block, as a segment of its own.
    """

    def __init__(self, tokens: TokenSet, order: npt.NDArray[np.int64], size: int) -> None:
        self.tokens, self.order, self.size = tokens, order, size
        lengths = tokens.lengths[order]
        self.ends = np.cumsum(lengths)
        self.total = int(self.ends[-1]) if len(lengths) else 0

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def __getitem__(self, i: int) -> Item:
        start, stop = i * self.size, min((i + 1) * self.size, self.total)
        examples: list[int] = []
        segments: list[Segment] = []
        at = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            document = int(self.order[at])
            begins = int(self.ends[at]) - int(self.tokens.lengths[document])
            ends = min(int(self.ends[at]), stop)
            if ends > start:
                examples.append(document)
                segments.append(self.tokens.segment(document, start - begins, ends - begins))
            start, at = ends, at + 1
        return Item(examples, segments, i)


class Ordered:
    """`count` items of `base` in a seeded order that goes on where an earlier phase stopped; a new permutation for each pass."""

    def __init__(self, base: Blocks | Bins | Examples, seed: int, first: int, count: int) -> None:
        self.base, self.seed, self.first, self.count = base, seed, first, count
        self._pass, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Item:
        number, at = divmod(self.first + i, len(self.base))
        if number != self._pass:
            self._pass, self._order = number, np.random.default_rng([self.seed, number]).permutation(len(self.base))
        return self.base[int(self._order[at])]._replace(place=self.first + i)
