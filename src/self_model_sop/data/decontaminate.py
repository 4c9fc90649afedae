"""Find training texts that contain items of an evaluation set: overlap of n-grams of folded letters, option-aware for multiple choice, offline.

n = 13 as in Brown et al. 2020 (there words, here letters and digits: width, case, traditional or simplified characters, accents, spacing and punctuation make no difference).

* Plain item: a text overlaps it if they share an n-gram. An item shorter than n is found only as a whole text.
* Multiple choice: a text overlaps it if it shares an n-gram with the question (or contains a shorter question whole) *and* holds one of the options (whole, or
  an n-gram of a longer one). The question alone may be a phrase that many questions share ("which of the following is right"), an option alone a fact that may
  well be learned. Question and option must add up to n letters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .characters import codepoints, text_of
from .fold import letters_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .characters import Codes
    from .ngrams import Ints

_BLOCK = 1 << 18  # characters looked at together
_SHORTEST = 4  # letters of a question that is looked up


@dataclass(frozen=True)
class Choice:
    """A multiple-choice item: the question (with its passage, if any), and its options without letters."""

    question: str
    options: tuple[str, ...]


def item_of(row: Mapping[str, Any]) -> str | Choice:
    """An evaluation row as an item: multiple choice where it has options, else its text.

    Raises:
        RowError: the row has neither.
    """
    from .formats import choice_of, detect, to_text

    if detect(dict(row)) == "choice":
        question, options, _ = choice_of(dict(row))
        return Choice(question, tuple(options))
    return to_text(dict(row))


def overlaps(texts: Iterable[str], eval_texts: Sequence[str | Choice], n: int = 13) -> list[int | None]:
    """For each text the index of the first evaluation item that it overlaps, or None. Keeps one block of texts in memory."""
    return list(Overlap(eval_texts, n).find(texts))


def letters(text: str) -> str:
    """The folded letters and digits of a text: what is compared."""
    return text_of(_fold([text])[0])


def _fold(texts: Sequence[str]) -> tuple[Codes, Ints]:
    """Folded letters of all texts one after the other, and where each begins (and the last one ends), [texts + 1]."""
    import numpy as np

    folded = letters_table()[codepoints("".join(texts))]
    kept = np.flatnonzero(folded)
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    return folded[kept], np.concatenate([[0], np.searchsorted(kept, ends)])


@dataclass(frozen=True)
class _Item:
    """A folded item; `options` is empty for a plain one."""

    text: str
    options: tuple[str, ...]

    def evidence(self, folded: str, n: int) -> bool:
        """Whether a text that shares an n-gram with `text` (or contains it) overlaps this item."""
        return not self.options or any(_contains(folded, option, n) and min(len(self.text), n) + min(len(option), n) >= n for option in self.options)


def _contains(folded: str, part: str, n: int) -> bool:
    """Whether `part` occurs whole, or, where it is longer than n, any n-gram of it."""
    if len(part) <= n:
        return bool(part) and part in folded
    return any(part[i : i + n] in folded for i in range(len(part) - n + 1))


class Overlap:
    """Evaluation items, ready to be looked for in any number of texts.

    Args:
        items: plain texts, or `Choice`.
        n: letters of an n-gram.

    Raises:
        ValueError: `n` below 4.
    """

    def __init__(self, items: Sequence[str | Choice], n: int = 13) -> None:
        if n < _SHORTEST:
            raise ValueError(f"decontamination: n must be >= {_SHORTEST}, not {n}")
        self.n = n
        self.items = [_Item(letters(i.question), tuple(map(letters, i.options))) if isinstance(i, Choice) else _Item(letters(i), ()) for i in items]
        short = {k: item for k, item in enumerate(self.items) if len(item.text) < n}
        self._whole: dict[str, int] = {}
        for k, item in short.items():
            if item.text and not item.options:
                self._whole.setdefault(item.text, k)
        questions = {k: item.text for k, item in short.items() if item.options and len(item.text) >= _SHORTEST}
        width = min(map(len, questions.values()), default=_SHORTEST)
        self._long = _Lookup({k: item.text for k, item in enumerate(self.items) if k not in short}, n)
        self._short = _Lookup({k: text[:width] for k, text in questions.items()}, width)

    def find(self, texts: Iterable[str]) -> Iterator[int | None]:
        """For each text the first item that it overlaps, or None."""
        block: list[str] = []
        size = 0
        for text in texts:
            block.append(text)
            size += len(text)
            if size >= _BLOCK:
                yield from self._find(block)
                block, size = [], 0
        yield from self._find(block)

    def _find(self, texts: list[str]) -> list[int | None]:
        import numpy as np

        codes, begins = _fold(texts)
        found: list[int | None] = [None] * len(texts)
        if self._whole:
            for i in np.flatnonzero(np.diff(begins) < self.n).tolist():
                found[i] = self._whole.get(text_of(codes[begins[i] : begins[i + 1]]))
        for lookup in (self._long, self._short):
            for text, position, item in lookup.hits(codes, begins):
                known = found[text]
                if (known is None or item < known) and self._confirmed(text_of(codes[begins[text] : begins[text + 1]]), position, self.items[item]):
                    found[text] = item
        return found

    def _confirmed(self, folded: str, position: int, item: _Item) -> bool:
        """Whether the texts themselves agree with a hit by hash, and there is an option."""
        shared = folded[position : position + self.n] in item.text if len(item.text) >= self.n else item.text in folded
        return shared and item.evidence(folded, self.n)


class _Lookup:
    """Hashes of the n-grams of some items, sorted, and whose they are."""

    def __init__(self, items: Mapping[int, str], n: int) -> None:
        import numpy as np

        from .ngrams import Grams

        self.n = n
        grams = Grams(list(items.values()), n, width=64)
        hashes: NDArray[np.uint64] = np.concatenate([h for _, _, h in grams] or [np.zeros(0, np.uint64)])
        owner = np.repeat(np.fromiter(items, np.int64, len(items)), grams.counts)
        order = np.lexsort((owner, hashes))
        self.hashes, self.owner = hashes[order], owner[order]
        self.bits = min(27, max(10, (32 * len(hashes) + 1).bit_length()))
        self.table = np.zeros(1 << self.bits, bool)  # spares most searches
        self.table[self._entry(self.hashes)] = True

    def _entry(self, hashes: NDArray[np.uint64]) -> Ints:
        import numpy as np

        out: Ints = (hashes >> np.uint64(64 - self.bits)).view(np.int64)
        return out

    def hits(self, codes: Codes, begins: Ints) -> Iterator[tuple[int, int, int]]:
        """Yield (text, position in it, item) of n-grams with the same hash, each pair of text and item once, ordered."""
        import numpy as np

        from .ngrams import first_of_runs, hash_windows, ranges

        if not len(self.hashes) or len(codes) < self.n:
            return
        hashes = hash_windows(codes, self.n, 64)
        at = np.flatnonzero(self.table[self._entry(hashes)])
        text = np.searchsorted(begins, at, "right") - 1
        inside = at + self.n <= begins[text + 1]
        at, text = at[inside], text[inside]
        low, high = np.searchsorted(self.hashes, hashes[at], "left"), np.searchsorted(self.hashes, hashes[at], "right")
        item = self.owner[ranges(low, high - low)]
        at, text = np.repeat(at, high - low), np.repeat(text, high - low)
        order = np.lexsort((at, item, text))
        at, text, item = at[order], text[order], item[order]
        once = first_of_runs(text) | first_of_runs(item)
        yield from zip(text[once].tolist(), (at - begins[text])[once].tolist(), item[once].tolist(), strict=True)
