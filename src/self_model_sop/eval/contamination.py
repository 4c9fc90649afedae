"""How many items of an evaluation set the training data contains: overlap of 13-grams of letters, option-aware for multiple choice (`data/decontaminate.py`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.decontaminate import Choice, Overlap
from .questions import Question

MIN_LETTERS = 13


def item_of(item: Any) -> str | Choice:
    """A text or a question as decontamination knows it."""
    return Choice(item.question, item.options) if isinstance(item, Question) else str(item)


def contaminated(items: Sequence[Any], training: Sequence[Path], n: int = MIN_LETTERS) -> list[int]:
    """Positions of the items that some training text overlaps, sorted.

    A pass names one item per text, so texts with a hit are looked at again for the items that are left, until nothing new is found.
    """
    left = dict(enumerate(item_of(i) for i in items))
    found: set[int] = set()
    texts: list[str] | Iterator[str] = training_texts(training)
    while left:
        positions, hit = list(left), []
        source = _Kept(texts)
        for first in Overlap(list(left.values()), n).find(source):
            text = source.next()
            if first is not None:
                found.add(positions[first])
                hit.append(text)
        if not hit:
            break
        left = {k: item for k, item in left.items() if k not in found}
        texts = hit
    return sorted(found)


class _Kept:
    """Hands texts on and remembers those whose answer has not come back yet (`Overlap` answers in order, a block at a time)."""

    def __init__(self, texts: Sequence[str] | Iterator[str]) -> None:
        self._texts = iter(texts)
        self._waiting: deque[str] = deque()

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self._waiting.append(text)
            yield text

    def next(self) -> str:
        """The oldest text that has not been asked for."""
        return self._waiting.popleft()


def training_texts(paths: Sequence[Path]) -> Iterator[str]:
    """Every text of the training files; folders are entered, and of each set only what is trained on (`train.*`) where it is split."""
    from ..data.formats import RowError, to_text
    from ..data.records import files_of, read

    for file in files_of(paths):
        if file.name.split(".")[0] in ("validation", "test") and (file.parent / file.name.replace(file.name.split(".")[0], "train", 1)).exists():
            continue
        for record in read(file):
            if record.row is None:
                continue
            try:
                yield to_text(record.row)
            except RowError:
                continue


def summary(items: Sequence[Any], found: Sequence[int]) -> dict[str, Any]:
    """`{items, found, share, positions}`."""
    return {"items": len(items), "found": len(found), "share": len(found) / len(items) if items else 0.0, "positions": list(found)}
