"""What a base tokenizer makes of a corpus: unique id sequences with their counts, as flat arrays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from ..train.encoding import batches
from .base import Base, bare
from .script import SCRIPT_RUN

if TYPE_CHECKING:
    import numpy as np

PRIVATE = 0x10000  # ids are written as the code points from here on

Texts = Iterable[tuple[str, float]]  # (text, weight)


@dataclass(frozen=True)
class Units:
    """Unique id sequences.

    Args:
        ids: all sequences, one behind the other, int64 `[tokens]`.
        starts: where each begins, and the end of the last, int64 `[units + 1]`.
        counts: how often each occurs, float64 `[units]`.
    """

    ids: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @staticmethod
    def of(counted: Mapping[bytes, float]) -> Units:
        """From counted int32 bytes."""
        import numpy as np

        lengths = np.fromiter((len(k) >> 2 for k in counted), dtype=np.int64, count=len(counted))
        ids = np.frombuffer(b"".join(counted), dtype=np.int32).astype(np.int64)
        return Units(ids, np.concatenate([[0], np.cumsum(lengths)]), np.fromiter(counted.values(), dtype=np.float64, count=len(counted)))

    @property
    def lengths(self) -> np.ndarray:
        import numpy as np

        return np.diff(self.starts)

    def items(self) -> Iterator[tuple[tuple[int, ...], float]]:
        """(ids, count) of each unit."""
        for start, stop, count in zip(self.starts, self.starts[1:], self.counts.tolist(), strict=False):
            yield tuple(self.ids[start:stop].tolist()), count

    def strings(self) -> list[str]:
        """Each unit as a string of private code points."""
        return split(self.ids, self.starts[1:-1])


def split(numbers: np.ndarray, breaks: np.ndarray) -> list[str]:
    """Numbers as strings of private code points, parted before each position of `breaks`."""
    import numpy as np

    if not len(numbers):
        return []
    codes = np.insert((numbers + PRIVATE).astype(np.uint32), breaks, 0x20)
    return codes.astype("<u4").tobytes().decode("utf-32-le").split(" ")


def count_pretokens(base: Base, texts: Texts) -> Units:
    """Count the pre-tokens of two or more base tokens in their real context."""
    tokenizer, counted = base.tokenizer, defaultdict[bytes, float](float)
    for encodings, weights in _encoded(tokenizer, texts):
        for encoding, weight in zip(encodings, weights, strict=True):
            _count(encoding, weight, counted)
    return Units.of(counted)


def _count(encoding: Any, weight: float, counted: dict[bytes, float]) -> None:
    import numpy as np

    words = encoding.word_ids
    data = np.array(encoding.ids, dtype=np.int32).tobytes()
    borders = np.array([-1 if w is None else w for w in words] if None in words else words, dtype=np.int64)
    edges = [0, *((np.flatnonzero(np.diff(borders)) + 1) * 4).tolist(), len(data)]
    for start, stop in pairwise(edges):
        if stop - start > 4:
            counted[data[start:stop]] += weight


def count_runs(base: Base, texts: Texts) -> Units:
    """Count the runs of Chinese text; for tokenizers without pre-tokens (SentencePiece)."""
    import numpy as np

    runs = defaultdict[str, float](float)
    for text, weight in texts:
        for run in SCRIPT_RUN.findall(text):
            runs[run] += weight
    counted = defaultdict[bytes, float](float)
    tokenizer = on_runs(base)
    for encodings, weights in _encoded(tokenizer, runs.items()):
        for encoding, weight in zip(encodings, weights, strict=True):
            counted[np.array(encoding.ids, dtype=np.int32).tobytes()] += weight
    return Units.of(counted)


def on_runs(base: Base) -> Any:
    """The tokenizer without what it does at the ends of a text, for single runs."""
    return bare({**base.data, "normalizer": None, "pre_tokenizer": None})


def _encoded(tokenizer: Any, texts: Texts) -> Iterator[tuple[list[Any], list[float]]]:
    """Batches of encodings with the weights of their texts; the next batch is encoded while this one is counted."""

    def encode(batch: tuple[list[str], list[float]]) -> tuple[list[Any], list[float]]:
        return tokenizer.encode_batch(batch[0], add_special_tokens=False), batch[1]

    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for batch in _batches(texts):
            following = pool.submit(encode, batch)
            if waiting:
                yield waiting.result()
            waiting = following
        if waiting:
            yield waiting.result()


def _batches(texts: Texts) -> Iterator[tuple[list[str], list[float]]]:
    for batch in batches(texts, lambda item: item[0]):
        yield [text for text, _ in batch], [weight for _, weight in batch]


def tally(tokenizer: Any, texts: Texts, size: int) -> np.ndarray:
    """Weighted uses of each id below `size`, float64 `[size]`."""
    import numpy as np

    uses = np.zeros(size)
    for batch, weights in _batches(texts):
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ids = [e.ids for e in encodings]
        lengths = [len(i) for i in ids]
        flat = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=sum(lengths))
        uses += np.bincount(flat, weights=np.repeat(weights, lengths), minlength=size)
    return uses
