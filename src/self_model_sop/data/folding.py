"""Text folded for comparison: what differs only in width, case, traditional or simplified characters, or spacing becomes equal. Kept text is never folded."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable

_PLANES = (range(0x80, 0x20000), range(0x2F800, 0x2FA20))  # code points outside have no compatibility form
_HAN = (range(0x3400, 0x4DC0), range(0x4E00, 0xA000))
_FREQUENT = tuple(zip("，：；？！（）　", ",:;?!() ", strict=True))  # replaced one by one first: far faster than by pattern
_WORDS_APART = re.compile(r"[0-9a-zß-ӿ]\s+[0-9a-zß-ӿ]")
_SPACE = re.compile(r"(?<=[0-9a-zß-ӿ])\s+(?=[0-9a-zß-ӿ])")
_NO_LETTER = re.compile(r"[\W_]+")


@functools.cache
def simplified() -> dict[str, str]:
    """Traditional -> simplified, one character each; empty where opencc (extra `zh`) is not installed."""
    try:
        import opencc
    except ImportError:
        return {}
    characters = [chr(c) for block in _HAN for c in block]
    converted = opencc.OpenCC("t2s").convert("\n".join(characters)).split("\n")
    return {old: new for old, new in zip(characters, converted, strict=True) if old != new}


@functools.cache
def _table() -> tuple[re.Pattern[str], dict[str, str], re.Pattern[str]]:
    """(pattern of the characters that change, what they become, pattern of those that may combine with their neighbours)."""
    changed, combining = dict(simplified()), []
    for plane in _PLANES:
        for code in plane:
            character = chr(code)
            if unicodedata.decomposition(character):
                folded = unicodedata.normalize("NFKC", character)
                if folded != character:
                    changed[character] = "".join(simplified().get(c, c) for c in folded)
            if unicodedata.combining(character) or 0x1100 <= code < 0x1200 or unicodedata.category(character) == "Mc":
                combining.append(character)
    return _one_of(changed), changed, _one_of(combining)


def _one_of(characters: Iterable[str]) -> re.Pattern[str]:
    """A class of the characters below U+10000, plus all above: `re` tests those first ones by a bitmap, and single ones above slowly, one by one."""
    below = re.escape("".join(c for c in characters if c < "\U00010000"))
    return re.compile(f"[{below}\U00010000-\U0010ffff]")


def fold(text: str) -> str:
    """NFKC, traditional to simplified (by character), casefold."""
    pattern, changed, combining = _table()
    if combining.search(text):
        text = unicodedata.normalize("NFKC", text)
    for wide, narrow in _FREQUENT:
        text = text.replace(wide, narrow)
    return pattern.sub(lambda match: changed.get(match[0], match[0]), text).casefold()


def without_spacing(folded: str) -> str:
    """Remove whitespace; between two letters or digits of an alphabet one space stays (`now here` is not `nowhere`)."""
    if _WORDS_APART.search(folded):
        folded = _SPACE.sub("\0", folded)
        return "".join(folded.split()).replace("\0", " ")
    return "".join(folded.split())


def letters(text: str) -> str:
    """Folded letters and digits only: what n-gram overlap with an evaluation set compares."""
    return _NO_LETTER.sub("", fold(text))
