"""Characters as arrays: code points, and the class of each."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Codes = NDArray[np.uint32]

SPACE, HAN, LETTER, DIGIT, PUNCTUATION, SYMBOL, KANA, HANGUL = range(8)


def codepoints(text: str) -> Codes:
    """The text as code points, [chars]."""
    import numpy as np

    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def text_of(codes: Codes) -> str:
    """The text of code points."""
    return codes.astype("<u4", copy=False).tobytes().decode("utf-32-le", "surrogatepass")


def classes(codes: Codes) -> NDArray[np.uint8]:
    """The class (SPACE, HAN, ...) of every character, [chars]."""
    kinds: NDArray[np.uint8] = _table()[codes]
    return kinds


@lru_cache(maxsize=1)
def _table() -> NDArray[np.uint8]:
    """The class of every code point, [0x110000]."""
    import numpy as np

    table = np.full(0x110000, SYMBOL, np.uint8)
    by_category = {"L": LETTER, "M": LETTER, "N": DIGIT, "P": PUNCTUATION, "S": SYMBOL, "Z": SPACE, "C": SPACE}
    for point in range(0x10000):
        table[point] = by_category[unicodedata.category(chr(point))[0]]
    for first, last, kind in ((0x3400, 0x9FFF, HAN), (0xF900, 0xFAFF, HAN), (0x20000, 0x323AF, HAN), (0x3041, 0x30FF, KANA), (0x31F0, 0x31FF, KANA), (0xAC00, 0xD7AF, HANGUL)):
        table[first : last + 1] = kind
    table[0x30FB] = table[0x30FC] = PUNCTUATION
    return table
