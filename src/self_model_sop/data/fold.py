"""What two texts are compared by: width, case, compatibility forms, traditional/simplified and whitespace folded away. The kept text is never changed."""

from __future__ import annotations

import hashlib
import importlib.util
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .characters import Codes
    from .ngrams import Ints

_ALPHABETS = 0x530  # Latin, Greek, Cyrillic lie below


@lru_cache(maxsize=1)
def folding_table() -> NDArray[np.uint32]:
    """The folded form of every code point, 0 for whitespace and invisible characters, [0x110000]; characters whose folded form is longer stay."""
    import numpy as np

    table = np.arange(0x110000, dtype=np.uint32)
    for point in [*range(0xD800), *range(0xE000, 0x10000)]:
        char = chr(point)
        folded = unicodedata.normalize("NFKC", char).casefold()
        if char.isspace() or unicodedata.category(char) in ("Cc", "Cf"):
            table[point] = 0
        elif len(folded) == 1:
            table[point] = ord(folded)
    simplified = np.arange(0x110000, dtype=np.uint32)
    for traditional, first in _simplified_characters():
        simplified[ord(traditional)] = ord(first)
    return simplified[table]


def _simplified_characters() -> Iterator[tuple[str, str]]:
    """(traditional, simplified) characters of OpenCC's own table; the first where several are offered. Read as data: the package is not imported."""
    spec = importlib.util.find_spec("opencc")
    assert spec is not None and spec.origin is not None  # a dependency of the package
    for line in (Path(spec.origin).parent / "dictionary" / "TSCharacters.txt").read_text(encoding="utf-8").splitlines():
        traditional, _, choices = line.partition("\t")
        if len(traditional) == 1 and choices:
            yield traditional, choices[0]


@lru_cache(maxsize=1)
def letters_table() -> NDArray[np.uint32]:
    """Like `folding_table`, with 0 for whatever is no letter or digit too, and accents taken off, [0x110000]: for overlap with evaluation items."""
    table = folding_table().copy()
    for point in [*range(0x10000), *range(0x1D400, 0x1D800)]:
        base = unicodedata.normalize("NFKD", chr(table[point]))
        if not base[0].isalnum():
            table[point] = 0
        elif not any(c.isalnum() for c in base[1:]):  # marks only
            table[point] = ord(base[0].casefold()[0])
    table[0x10000:0x1D400] = table[0x1D800:0x20000] = 0  # emoji and other symbols; beyond lie the rare Han characters
    return table


def key_of(codes: Codes, exact: bytes = b"") -> bytes:
    """16 bytes that are equal for texts with the same folded form (and the same `exact` bytes). `codes`: code points, [chars].

    Between two letters or digits of an alphabet whitespace counts as one space (`now here` is not `nowhere`), elsewhere as nothing.
    """
    import numpy as np

    return keys_of(codes, np.array([len(codes)]), [exact])[0]


def keys_of(codes: Codes, ends: Ints, exact: Sequence[bytes]) -> list[bytes]:
    """The keys of texts that lie one after the other. `codes`: [chars]; `ends`: where each text ends, [texts]."""
    import numpy as np

    folded = folding_table()[codes]
    solid = folded != 0
    kept = folded[solid]
    cuts = np.cumsum([np.count_nonzero(solid[low:high]) for low, high in pairwise([0, *ends.tolist()])], dtype=np.int64)
    word = kept < _ALPHABETS
    if word.any():
        word &= (kept >= 0x80) | ((kept >= 0x30) & (kept < 0x3A)) | ((kept >= 0x61) & (kept < 0x7B))
        after_space = np.concatenate([[False], ~solid[:-1]])
        apart = np.flatnonzero(after_space[solid][1:] & word[1:] & word[:-1]) + 1
        apart = apart[~np.isin(apart, cuts)]  # between two texts
        if len(apart):
            kept = np.insert(kept, apart, 0x20)
            cuts = cuts + np.searchsorted(apart, cuts, side="right")
    data = memoryview(kept.tobytes())
    out, low = [], 0
    for cut, more in zip((4 * cuts).tolist(), exact, strict=True):
        digest = hashlib.blake2b(data[low:cut], digest_size=16)
        if more:
            digest.update(more)
        out.append(digest.digest())
        low = cut
    return out
