"""Which characters new tokens are made for, and which text they can therefore never change."""

from __future__ import annotations

import re
import unicodedata

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
# CJK symbols, brackets and full-width punctuation. General punctuation (quotes, dashes, ellipsis) is left out: English text uses it too.
PUNCTUATION = "\u3001-\u3003\u3005-\u3011\u3014-\u301f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"

HAN_RUN = re.compile(f"[{HAN}]+")
IN_SCRIPT = re.compile(f"[{HAN}{PUNCTUATION}]")
SCRIPT_RUN = re.compile(f"[{HAN}{PUNCTUATION}]+")


def has_script(text: str) -> bool:
    """True if the text holds a Chinese character or Chinese punctuation, also after NFC (which turns U+2F00-style variants into plain Han)."""
    return bool(IN_SCRIPT.search(text) or IN_SCRIPT.search(unicodedata.normalize("NFC", text)))


def whole(data: bytes) -> str | None:
    """The text of a token's bytes, or None where it begins or ends inside a character."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def continues(data: bytes) -> bool:
    """True if the bytes begin inside a UTF-8 character."""
    return 0x80 <= data[0] < 0xC0 if data else False


def only_script(beginning: bytes) -> bool:
    """True if the bytes hold a Chinese character, or are the beginning of one and of nothing else."""
    for cut in range(min(3, len(beginning)) + 1):
        head = whole(beginning[: len(beginning) - cut])
        if head is not None:
            return has_script(head) or (cut > 0 and _all_inside(beginning[len(beginning) - cut :]))
    return False


def _all_inside(beginning: bytes) -> bool:
    """True if every character whose UTF-8 starts so is of the script."""
    first = beginning[0]
    missing = (4 if first >= 0xF0 else 3 if first >= 0xE0 else 2) - len(beginning)
    low, high = (whole(beginning + bytes([end]) * missing) for end in (0x80, 0xBF))
    return bool(low and high) and all(IN_SCRIPT.match(chr(c)) for c in range(ord(low or ""), ord(high or "") + 1))
