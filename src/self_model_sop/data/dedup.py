"""Exact near-duplicate removal: character n-gram Jaccard, keep first, numpy only.

Two texts are near-duplicates when J(x, y) = |X & Y| / |X | Y| >= threshold, where X and Y are their sets of character n-grams. A text shorter
than n has no n-gram: it is a duplicate only of an equal text. The answer equals the sequential scan that compares each text with every kept one before it.

Method: the prefix-filter join (Chaudhuri et al., ICDE 2006; Bayardo et al., WWW 2007) over 64-bit hashes of the n-grams. Under any global
order of n-grams, the first |x| - ceil(t|x|) + 1 of x and of y share one if J >= t; ordered rarest first, few others do.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Hashes = NDArray[np.uint64]

_SPACE = re.compile(r"\s+")


def exact_key(text: str) -> bytes:
    """What exact deduplication compares: width, compatibility forms and case folded (NFKC, casefold), whitespace removed, UTF-8 (surrogates kept).

    Punctuation counts (a full stop or a question mark can turn the meaning). The kept text itself is never changed.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _SPACE.sub("", folded).encode("utf-8", "surrogatepass")


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

    if n < 1 or not 0 < threshold <= 1:
        raise ValueError(f"near_duplicates: n must be >= 1 and 0 < threshold <= 1, not n={n}, threshold={threshold}")
    kept_by = np.full(len(texts), -1, np.int64)
    seen: dict[str, int] = {}
    for i, text in enumerate(texts):
        first = seen.setdefault(text, i)
        if first != i:
            kept_by[i] = first
    ids = np.array([i for text, i in seen.items() if len(text) >= n], np.int64)
    del seen
    if len(ids):
        ids = ids[_survivors([texts[i] for i in ids], n, threshold)]
    if len(ids):
        near = _join([texts[i] for i in ids], n, threshold)
        dropped = near >= 0
        kept_by[ids[dropped]] = ids[near[dropped]]
        copies = np.flatnonzero(kept_by >= 0)  # a copy of a dropped text follows it to its keeper
        keeper = kept_by[kept_by[copies]]
        kept_by[copies] = np.where(keeper >= 0, keeper, kept_by[copies])
    return kept_by


def _blocks(texts: Sequence[str], n: int, size: int = 1 << 20) -> Iterator[tuple[int, Hashes, Ints]]:
    """Yield (first text, hash of the n-gram at every character, offsets) for runs of about `size` characters."""
    import numpy as np

    lo, total = 0, 0
    for hi, text in enumerate(texts, 1):
        total += len(text)
        if total >= size or hi == len(texts):
            part = texts[lo:hi]
            offsets = np.concatenate([[0], np.cumsum([len(x) for x in part])])
            codes = np.frombuffer("".join(part).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
            hashes, piece = np.zeros(len(codes), np.uint64), 1 << 15
            for s in range(0, len(codes), piece):  # small pieces stay in cache
                g = codes[s : s + piece + n - 1]
                k = max(min(piece, len(g) - n + 1), 0)
                x = g[:k].copy()
                for j in range(1, n):
                    x *= np.uint64(0x9E3779B97F4A7C15)
                    x += g[j : j + k]
                x ^= x >> np.uint64(32)
                x *= np.uint64(0xD6E8FEB86659FD93)
                hashes[s : s + k] = x
            yield lo, hashes, offsets  # the n-1 windows that cross a text's end: do not read
            lo, total = hi, 0


def _first(key: NDArray[Any]) -> NDArray[np.bool_]:
    """Mask of the first of each run of a sorted array."""
    import numpy as np

    mask = np.ones(len(key), bool)
    mask[1:] = key[1:] != key[:-1]
    return mask


def _spans(lo: Ints, count: Ints) -> Ints:
    """The concatenated ranges lo[i] : lo[i] + count[i]."""
    import numpy as np

    return np.arange(count.sum()) + np.repeat(lo - np.cumsum(count) + count, count)


def _survivors(texts: Sequence[str], n: int, t: float) -> Ints:
    """Indices of texts in which enough n-grams may occur elsewhere (hash collisions only add some)."""
    import numpy as np

    bits = min(32, max(10, int(np.ceil(np.log2(sum(map(len, texts)) + 1)))))
    table, kept, out = np.zeros(1 << bits, np.uint8), [], []
    for lo, h, off in _blocks(texts, n):
        i = (h >> np.uint64(64 - bits)).astype(np.uint32)
        u = np.sort(i)
        table[u] = np.minimum(table[u] + 1, 2)  # 0, 1 or "more"
        table[u[1:][u[1:] == u[:-1]]] = 2
        kept.append((lo, i, off))
    for lo, i, off in kept:
        often = np.cumsum(np.r_[0, table[i] > 1], dtype=np.int32)
        m = np.diff(off) - n + 1
        once = m - (often[off[1:] - n + 1] - often[off[:-1]])
        out.append(lo + np.flatnonzero(once < m - np.ceil(t * m - 1e-9) + 1))
    return np.concatenate(out)


def _join(texts: Sequence[str], n: int, t: float) -> Ints:
    """kept_by of texts that are all different and at least n long."""
    import numpy as np

    U, first, spans = np.uint64, _first, _spans
    keeper = np.full(len(texts), -1, np.int64)
    hs, ms = [], []
    for _, h, off in _blocks(texts, n):
        ms.append(np.diff(off) - n + 1)
        hs.append(h[spans(off[:-1], ms[-1])])
    h, m = np.concatenate(hs), np.concatenate(ms)
    del hs
    beg, N = np.cumsum(m) - m, len(m)
    D = U(max(1, (N - 1).bit_length()))
    low = (U(1) << D) - U(1)  # low D bits of a key: the text

    def doc(key: Hashes) -> Ints:
        return (key & low).view(np.int64)

    key = np.sort(h >> D << D | np.repeat(np.arange(N, dtype=np.uint64), m))
    key = key[first(key)]  # a set of n-grams per text
    size = np.bincount(doc(key), minlength=N)
    need = np.ceil(t * size - 1e-9)
    for _ in range(3):  # peel: a neighbour shares `need` n-grams
        same = key[1:] >> D == key[:-1] >> D
        key = key[(np.r_[same, False] | np.r_[False, same])[: len(key)]]
        key = key[(np.bincount(doc(key), minlength=N) >= need)[doc(key)]]
    s = np.flatnonzero(first(key >> D))
    df = np.diff(np.r_[s, len(key)])
    df = np.repeat(np.minimum(df, 255).astype(np.uint64), df)  # rarest first within each text
    key = np.sort((key & low) << (U(64) - D) | (df << U(56) | key >> U(8)) >> D)
    d = (key >> (U(64) - D)).view(np.int64)
    cnt = np.bincount(d, minlength=N)
    pre = np.arange(len(d)) - (np.cumsum(cnt) - cnt)[d] < (cnt - need + 1)[d]  # one of these is shared
    post = np.sort(key[pre] << D | d[pre].view(np.uint64))
    alive = np.ones(N, bool)

    def check(a: Ints, b: Ints) -> tuple[Ints, Ints]:
        """The unique pairs a < b of like size whose true Jaccard is >= t."""
        ok = (a != b) & (size[a] >= need[b]) & (size[b] >= need[a])
        k = np.sort(b[ok] << 32 | a[ok])
        k = k[first(k)]
        a, b = k & 0xFFFFFFFF, k >> 32
        yes = np.zeros(len(a), bool)
        for s in range(0, len(a), 4096):
            x, y = a[s : s + 4096], b[s : s + 4096]
            p = np.arange(len(x), dtype=np.uint64) << U(52)
            k2 = [np.sort(np.repeat(p, m[z]) | h[spans(beg[z], m[z])] >> U(12)) for z in (x, y)]
            k3 = np.sort(np.concatenate([z[first(z)] for z in k2]))
            c = np.bincount((k3[~first(k3)] >> U(52)).view(np.int64), minlength=len(x))
            yes[s : s + len(x)] = c / (size[x] + size[y] - c) >= t
        return a[yes], b[yes]

    for _ in range(9):  # big clusters: drop copies of a sure survivor first
        b = doc(post)
        s = np.flatnonzero(first(post >> D))
        cnt = np.diff(np.r_[s, len(b)])
        g = np.repeat(s, cnt)
        a = b[g]
        sure = np.ones(N, bool)
        sure[b[a != b]] = False
        q = sure[a] & (a != b)
        by, gone = check(a[q], b[q])
        if not len(gone):
            break
        keeper[gone], alive[gone] = by, False
        post = post[alive[doc(post)]]

    b = doc(post)
    s = np.flatnonzero(first(post >> D))
    cnt = np.diff(np.r_[s, len(b)])
    g = np.repeat(s, cnt)
    cnt = np.arange(len(b)) - g  # then all pairs sharing an entry
    cut = [*np.searchsorted(np.cumsum(cnt), np.arange(0, cnt.sum() + 1, 1 << 23)).tolist(), len(b)]
    pairs = [check(b[spans(g[i:j], cnt[i:j])], np.repeat(b[i:j], cnt[i:j])) for i, j in itertools.pairwise(cut)]
    a, b = np.concatenate([e[0] for e in pairs]), np.concatenate([e[1] for e in pairs])
    for i in np.argsort(b, kind="stable"):
        if alive[a[i]] and alive[b[i]]:
            alive[b[i]], keeper[b[i]] = False, a[i]
    return keeper
