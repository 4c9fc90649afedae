"""How usual a text is beside a clean sample: its perplexity per character under an n-gram model of that sample.

As a filter: CCNet (Wenzek et al., LREC 2020), there with word pieces.

Interpolated Kneser-Ney smoothing, one discount for each order (Kneser & Ney, ICASSP 1995; Chen & Goodman, TR-10-98, 1998, section 3):

    p_k(w | h) = (c_k(hw) - D_k) / c_k(h) + D_k T_k(h) / c_k(h) * p_{k-1}(w | h without its first character),    p_0 = 1 / (characters of the sample + 1)

c_k counts occurrences at the highest order and different characters before hw below it; T_k(h) is how many w follow h; D_k = n1 / (n1 + 2 n2), where n1 and n2 n-grams
have a count of 1 and 2. Where h was not seen p_k = p_{k-1}, so a character that the sample lacks costs much, and every context's probabilities add up to 1.

Texts are compared as deduplication folds them (width, case, traditional/simplified), without whitespace, every digit as 0: neither layout nor amounts make a text unusual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import option
from ..errors import DATA, SopError
from .characters import codepoints

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .characters import Codes
    from .ngrams import Ints

LEVELS = (0, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1_000, 2_000, 5_000)  # lower ends of the histogram's bars
_HELD_OUT = 10  # every tenth text of the sample, for the limit
_ENOUGH = 20  # held-out texts


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    """`filters.perplexity:` which pretraining texts are too unusual."""

    sample: tuple[Path, ...] = option((), "files of clean text to compare with (any format; their text fields); empty: off", path="input")
    sample_chars: int = option(5_000_000, "so many characters of the sample are read")
    order: int = option(3, "characters of an n-gram; 2 to 6")
    max_perplexity: float | None = option(None, "texts above it are dropped (high_perplexity); none: what a share `tolerance` of held-out sample texts exceeds")
    tolerance: float = option(0.01, "used where max_perplexity is none")
    min_chars: int = option(30, "shorter texts (without whitespace) are not judged: their perplexity says little")


def problems(config: PerplexityConfig) -> list[tuple[str, str, str]]:
    """What cannot work: (key, what, fix)."""
    found = []
    if not 2 <= config.order <= 6:
        found.append(("order", "must lie between 2 and 6", "3"))
    if config.max_perplexity is not None and not config.max_perplexity > 1:
        found.append(("max_perplexity", "must be above 1", "null: taken from the sample"))
    if not 0 < config.tolerance < 0.5:
        found.append(("tolerance", "must lie between 0 and 0.5", "0.01"))
    if config.min_chars < 1 or config.sample_chars < 1000:
        found.append(("min_chars" if config.min_chars < 1 else "sample_chars", "is too small", "30" if config.min_chars < 1 else "5000000"))
    return found


def folded(texts: Sequence[str]) -> tuple[Codes, Ints]:
    """What the model reads: folded characters of all texts one after the other, [chars], and where each text begins (and the last one ends), [texts + 1]."""
    import numpy as np

    from .fold import folding_table

    codes = folding_table()[codepoints("".join(texts))]
    solid = np.flatnonzero(codes)
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    codes = codes[solid]
    codes[(codes >= ord("0")) & (codes <= ord("9"))] = ord("0")
    return codes, np.concatenate([[0], np.searchsorted(solid, ends)])


class _Table:
    """Rows by 64-bit key: sorted keys, and where those with the same top bits begin."""

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        import numpy as np

        self._shift = np.uint64(64 - max(1, len(keys).bit_length()))
        tops = np.arange(1 << (64 - int(self._shift)), dtype=np.uint64) << self._shift
        self._starts = np.searchsorted(keys, tops).astype(np.int32)
        self._keys = np.append(keys, np.uint64(2**64 - 1))

    def rows(self, keys: NDArray[np.uint64]) -> NDArray[np.int32]:
        """The row of each key, or -1, [keys]."""
        import numpy as np

        at = self._starts[(keys >> self._shift).view(np.int64)]
        behind = np.flatnonzero(self._keys[at] < keys)
        while len(behind):
            at[behind] += 1
            behind = behind[self._keys[at[behind]] < keys[behind]]
        at[self._keys[at] != keys] = -1
        return at


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length. A row beyond the last, found as -1, stands for those not seen.

    Attributes:
        table: their hashes.
        share: (c(hw) - D) / c(h), [rows + 1].
        rest: what a longer n-gram leaves to the shorter one behind this context, D T(h) / c(h), [rows + 1]; 1 where nothing follows.
    """

    table: _Table
    share: NDArray[np.float64]
    rest: NDArray[np.float64]


class Model:
    """The n-gram model of some texts.

    Args:
        texts: the sample.
        order: characters of the longest n-gram.
    """

    def __init__(self, texts: Sequence[str], order: int) -> None:
        import numpy as np

        codes, begins = folded(texts)
        if not len(codes):
            raise ValueError("a model needs text")
        self.order = order
        self.characters = len(codes)
        inside = _inside(begins, len(codes))
        hashes, rows, tables, seen = [_hashes(codes, k) for k in range(1, order + 1)], [], [], []
        for k in range(1, order + 1):
            full = np.flatnonzero(inside >= k - 1)  # places at which an n-gram of this length ends
            keys, first, row, count = np.unique(hashes[k - 1][full], return_index=True, return_inverse=True, return_counts=True)
            tables.append(_Table(keys))
            seen.append((full[first], count))
            rows.append(np.full(len(codes), -1, np.int64))
            rows[-1][full] = row
        self.distinct = len(seen[0][0])
        shares, rests = [], [np.ones(len(s[0]) + 1) for s in seen]
        lowest = 0.0
        for k in range(1, order + 1):
            place, count = seen[k - 1]
            if k < order:  # how many different characters stand before it
                count = np.bincount(rows[k - 1][seen[k][0]], minlength=len(place))
            context = rows[k - 2][place - 1] if k > 1 else np.zeros(len(place), np.int64)
            share, rest = _discounted(count, context, len(seen[k - 2][0]) if k > 1 else 1)
            shares.append(np.append(share, 0.0))
            if k > 1:
                rests[k - 2][:-1] = rest
            else:
                lowest = float(rest[0]) / (self.distinct + 1)
        self._lowest = lowest
        self._orders = [_Order(t, s, r) for t, s, r in zip(tables, shares, rests, strict=True)]

    def logs(self, codes: Codes, begins: Ints) -> NDArray[np.float64]:
        """The natural logarithm of the probability of each character after those before it in its text, [chars]."""
        import numpy as np

        inside = _inside(begins, len(codes))
        p = np.full(len(codes), self._lowest)
        before = np.zeros(0)
        for k, order in enumerate(self._orders, 1):
            row = order.table.rows(_hashes(codes, k))
            row[inside < k - 1] = -1
            if k > 1:
                p *= before
            p += order.share[row]
            before = np.concatenate([[1.0], order.rest[row][:-1]])
            before[inside < k] = 1.0
        out: NDArray[np.float64] = np.log(p)
        return out

    def perplexities(self, texts: Sequence[str]) -> tuple[NDArray[np.float64], Ints]:
        """(perplexity per character, characters it is the mean of) of each text, [texts]; NaN for a text without characters."""
        import numpy as np

        codes, begins = folded(texts)
        lengths = np.diff(begins)
        total = np.bincount(np.repeat(np.arange(len(texts)), lengths), self.logs(codes, begins) if len(codes) else None, minlength=len(texts))
        with np.errstate(invalid="ignore"):
            return np.exp(-total / lengths), lengths


def _inside(begins: Ints, number: int) -> Ints:
    """Characters of the same text before each, [chars]."""
    import numpy as np

    return np.arange(number) - np.repeat(begins[:-1], np.diff(begins))


def _hashes(codes: Codes, n: int) -> NDArray[np.uint64]:
    """Hash of the n characters that end at every position, [chars]; the first n - 1 are undefined."""
    import numpy as np

    from .ngrams import hash_windows

    out: NDArray[np.uint64] = np.roll(hash_windows(codes, n, 64), n - 1)
    return out


def _discounted(count: Ints, context: Ints, contexts: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(share of each n-gram in its context, what each context leaves to shorter ones)."""
    import numpy as np

    ones, twos = int((count == 1).sum()), int((count == 2).sum())
    discount = ones / (ones + 2 * twos) if ones else 0.5
    total = np.bincount(context, count, minlength=contexts)
    kinds = np.bincount(context, count > 0, minlength=contexts)
    known = total > 0
    rest = np.ones(contexts)
    rest[known] = discount * kinds[known] / total[known]
    share = np.maximum(count - discount, 0) / np.maximum(total, 1)[context]
    return share, rest


@dataclass(frozen=True)
class PerplexityFilter:
    """A trained model with the limit that a text may reach. `about`: what the manifest says of it."""

    model: Model
    limit: float
    min_chars: int
    about: dict[str, Any]

    def judge(self, texts: Sequence[str]) -> list[float | None]:
        """The perplexity of each text, or None where it is too short to say anything."""
        found, lengths = self.model.perplexities(texts)
        return [round(p, 2) if n >= self.min_chars else None for p, n in zip(found.tolist(), lengths.tolist(), strict=True)]


def level(perplexity: float) -> str:
    """The bar of the histogram that a perplexity belongs to, by its lower end."""
    return str(max(x for x in LEVELS if x <= perplexity))


def train(config: PerplexityConfig, clean: Callable[[str], str]) -> PerplexityFilter:
    """The filter that the configuration describes. `clean`: what pretraining texts go through before they are judged.

    Raises:
        SopError: the sample holds no text, or too little to take the limit from.
    """
    where = ", ".join(map(str, config.sample))
    texts = list(_first(config.sample_chars, map(clean, _sample(config.sample))))
    held = [t for i, t in enumerate(texts) if i % _HELD_OUT == _HELD_OUT - 1] if config.max_perplexity is None else []
    used = [t for i, t in enumerate(texts) if i % _HELD_OUT != _HELD_OUT - 1] if held else texts
    try:
        model = Model(used, config.order)
    except ValueError:
        raise SopError("the sample for perplexity holds no text", where=where, fix="name files of clean text of the same domain", code=DATA) from None
    about: dict[str, Any] = {"order": config.order, "sample_characters": model.characters, "sample_texts": len(used)}
    if config.max_perplexity is not None:
        return PerplexityFilter(model, config.max_perplexity, config.min_chars, about | {"limit": config.max_perplexity})
    found, lengths = model.perplexities(held)
    judged = sorted(found[lengths >= config.min_chars].tolist())
    if len(judged) < _ENOUGH:
        what = f"the limit comes from every {_HELD_OUT}th text of the sample, and of those only {len(judged)} can be judged; {_ENOUGH} are needed"
        raise SopError(what, where=where, fix="give a sample of more texts (one a row), or set filters.perplexity.max_perplexity", code=DATA)
    limit = round(judged[min(len(judged) - 1, int(len(judged) * (1 - config.tolerance)))], 2)
    return PerplexityFilter(model, limit, config.min_chars, about | {"limit": limit, "held_out_texts": len(judged), "held_out_median": round(judged[len(judged) // 2], 2)})


def _sample(paths: Sequence[Path]) -> Iterator[str]:
    from .formats import RowError, to_text
    from .records import read

    for record in read(paths):
        if record.row is not None:
            try:
                yield to_text(record.row)
            except RowError:
                continue


def _first(characters: int, texts: Iterable[str]) -> Iterator[str]:
    """Texts up to so many characters."""
    for text in texts:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)
