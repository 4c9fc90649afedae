"""Which of some texts are near-duplicates of an earlier one: an exact set-similarity join over n-gram sets, keep first.

The index (ngram_index.py) names the pairs that may be near-duplicates; here they are compared exactly, in an order that makes few comparisons suffice:
a dropped text needs only one kept text that it resembles, and drops no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .ngram_index import BATCH_TEXTS, FIELD, SLACK, build
from .ngrams import Grams, first_of_runs, ranges

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .ngram_index import Index
    from .ngrams import Bits, Ints

_PAIRS = 1 << 21  # pairs looked at together
_COMPARED = 1 << 12  # plausible pairs decided together
_CHARACTERS = 1 << 18  # characters compared together
_LONG = 256  # length of a list from which its texts may rather be paired with all such texts


def join(texts: Sequence[str], n: int, t: float, memory: int = 1 << 31) -> Ints:
    """For each text -1 where it is kept, else the index of an earlier kept one with Jaccard >= t. All texts differ and are at least n long."""
    work = _Join(texts, n, t, build(Grams(texts, n, width=64, cache=memory // 8), t, memory))
    work.sure_rounds()
    work.in_order()
    return work.keeper


def similar(texts: Sequence[str], a: Ints, b: Ints, n: int, t: float) -> Bits:
    """Mask of the pairs (a[i], b[i]) of texts whose n-gram sets have Jaccard >= t: counted, not estimated (n-grams compared by 51 bits of hash)."""
    import numpy as np

    out = np.zeros(len(a), bool)
    left, right = [texts[i] for i in a.tolist()], [texts[i] for i in b.tolist()]
    ends = np.cumsum(np.fromiter(map(len, left), np.int64, len(a)) + np.fromiter(map(len, right), np.int64, len(a)))
    lo = 0
    while lo < len(a):
        before = ends[lo - 1] if lo else 0
        hi = min(max(lo + 1, int(np.searchsorted(ends, before + _CHARACTERS, side="right"))), lo + BATCH_TEXTS)
        out[lo:hi] = _jaccard(left[lo:hi], right[lo:hi], n) >= t
        lo = hi
    return out


def _jaccard(left: list[str], right: list[str], n: int) -> NDArray[np.float64]:
    """Jaccard of the n-gram sets of left[i] and right[i], for at most `BATCH_TEXTS` pairs."""
    import numpy as np

    grams = Grams(left + right, n, width=64, block=1 << 62)
    [(_, _, hashes)] = grams
    pair = np.tile(np.arange(len(left), dtype=np.uint64) << np.uint64(FIELD), 2)
    side = np.repeat(np.array([0, 1], np.uint64), len(left))
    key = np.repeat(pair | side, grams.counts)
    key |= hashes >> np.uint64(64 - FIELD) & ~np.uint64(1)
    key.sort()
    key = key[first_of_runs(key)]
    both = key[1:] >> np.uint64(1) == key[:-1] >> np.uint64(1)
    common = np.bincount((key[1:][both] >> np.uint64(FIELD)).view(np.int64), minlength=len(left))
    total = np.bincount((key >> np.uint64(FIELD)).view(np.int64), minlength=len(left))
    out: NDArray[np.float64] = common / (total - common)
    return out


class _Join:
    """State of one join: for each text the kept text that dropped it, or -1 while it is undecided or kept."""

    def __init__(self, texts: Sequence[str], n: int, t: float, index: Index) -> None:
        import numpy as np

        self.texts, self.n, self.t, self.index = texts, n, t, index
        self.keeper: Ints = np.full(len(texts), -1, np.int64)
        self.postings = index.postings
        self._restrict(np.ones(len(texts), bool))

    def _restrict(self, alive: Bits) -> None:
        """Leave only these texts in the lists, and only lists of two or more."""
        import numpy as np

        self.postings = self.postings[alive[self.index.text(self.postings)]]
        _, length = self.index.lists(self.postings)
        self.postings = self.postings[np.repeat(length > 1, length)]

    def sure_rounds(self) -> None:
        """Texts that come first in all their lists are surely kept: drop their near-duplicates, take both out of the lists, and repeat while that helps.

        A cluster of k copies costs k comparisons here instead of k * k / 2.
        """
        import numpy as np

        while before := len(self.postings):
            starts, length = self.index.lists(self.postings)
            b = self.index.text(self.postings)
            a = np.repeat(b[starts], length)
            sure = np.ones(len(self.texts), bool)
            sure[b[a != b]] = False
            pick = sure[a] & (a != b)
            self._drop(*self._candidates(a[pick], b[pick]))
            self._restrict((self.keeper < 0) & ~sure)
            if len(self.postings) > 0.9 * before:
                return

    def in_order(self) -> None:
        """Whatever is left, in the order of the texts: each is compared with the kept ones before it that share a list with it.

        Where the long lists of a text name more pairs than there are texts of a fitting size in such lists, it is paired with those instead.
        """
        import numpy as np

        text = self.index.text(self.postings)
        if not len(text):
            return
        starts, length = self.index.lists(self.postings)
        before = np.arange(len(text)) - np.repeat(starts, length)  # predecessors in the list
        long = np.repeat(length >= _LONG, length)
        order = np.argsort(text, kind="stable")
        first = np.flatnonzero(first_of_runs(text[order]))  # the entries of one text are neighbours in `order`
        last = np.append(first[1:], len(order))
        owner = text[order[first]]
        frequent = np.unique(text[long])
        frequent = frequent[np.argsort(self.index.size[frequent], kind="stable")]
        named, fitting = np.add.reduceat((before * long)[order], first), self._window(owner, frequent)[1]
        dense = named > fitting
        ends = np.cumsum(np.minimum(named, fitting) + np.add.reduceat((before * ~long)[order], first))
        lo = 0
        while lo < len(first):
            hi = max(lo + 1, int(np.searchsorted(ends, (ends[lo - 1] if lo else 0) + _PAIRS, side="right")))
            entry = order[first[lo] : last[hi - 1]]
            entry = entry[~(long[entry] & np.repeat(dense[lo:hi], (last - first)[lo:hi]))]
            heavy = owner[lo:hi][dense[lo:hi]]
            frequent = frequent[self.keeper[frequent] < 0]
            begin, count = self._window(heavy, frequent)
            a = np.concatenate([text[ranges(entry - before[entry], before[entry])], frequent[ranges(begin, count)]])
            b = np.concatenate([np.repeat(text[entry], before[entry]), np.repeat(heavy, count)])
            useful = (a < b) & (self.keeper[a] < 0)
            self._scan(*self._candidates(a[useful], b[useful]))
            lo = hi

    def _window(self, texts: Ints, by_size: Ints) -> tuple[Ints, Ints]:
        """(begin, count) of those of `by_size`, texts in the order of their sizes, whose size allows a Jaccard of t with each of `texts`."""
        import numpy as np

        size, t = self.index.size, self.t * SLACK
        most = (1 + t) / t * (size - self.index.once)[texts] - size[texts]
        begin = np.searchsorted(size[by_size], np.ceil(t * size[texts]), "left")
        end = np.searchsorted(size[by_size], np.floor(np.minimum(most, size[texts] / t) * (1 + 1e-9)), "right")
        return begin, np.maximum(end - begin, 0)

    def _candidates(self, a: Ints, b: Ints) -> tuple[Ints, Ints]:
        """The distinct pairs that no filter excludes, ordered by b, then the likeliest a first."""
        import numpy as np

        ok = self.index.plausible(a, b, self.t)
        key = b[ok] << 32 | a[ok]
        key.sort()
        key = key[first_of_runs(key)]
        a, b = key & 0xFFFFFFFF, key >> 32
        order = np.lexsort((self.index.distance(a, b) - self.index.size[a], b))
        return a[order], b[order]

    def _scan(self, a: Ints, b: Ints) -> None:
        """Decide all b of candidate pairs (ordered by b), some at a time: first against the texts before them, then among themselves."""
        import numpy as np

        lo = 0
        while lo < len(b):
            hi = min(len(b), lo + _COMPARED)
            if hi < len(b):  # all pairs of a text together
                hi = int(np.searchsorted(b, b[hi], side="left"))
                hi = hi if hi > lo else int(np.searchsorted(b, b[lo], side="right"))
            x, y = a[lo:hi], b[lo:hi]
            earlier = x < y[0]
            open_ = self.keeper[x] < 0
            self._drop(x[earlier & open_], y[earlier & open_])
            among = ~earlier & open_ & (self.keeper[y] < 0)
            self._drop_in_turn(x[among], y[among])
            lo = hi

    def _drop(self, a: Ints, b: Ints) -> None:
        """Drop each b that resembles one of its a, all of them kept. A text's likeliest keeper is tried first, then the next 2, 4, 8, ... of them."""
        import numpy as np

        starts = np.flatnonzero(first_of_runs(b))
        rank = np.arange(len(b)) - np.repeat(starts, np.diff(starts, append=len(b)))
        low, width = 0, 1
        while len(b):
            now = rank < low + width
            yes = similar(self.texts, a[now], b[now], self.n, self.t)
            self.keeper[b[now][yes][::-1]] = a[now][yes][::-1]  # the likeliest is written last
            later = ~now & (self.keeper[b] < 0)
            a, b, rank = a[later], b[later], rank[later]
            low, width = low + width, 2 * width

    def _drop_in_turn(self, a: Ints, b: Ints) -> None:
        """Compare all pairs, then decide in the order of b: only a kept text drops another."""
        yes = similar(self.texts, a, b, self.n, self.t)
        for i, j in zip(a[yes].tolist(), b[yes].tolist(), strict=True):
            if self.keeper[i] < 0 and self.keeper[j] < 0:
                self.keeper[j] = i
