"""Cleaning that never changes meaning: markup residue goes, every statement stays.

`收缩压<140mmHg且舒张压>90mmHg` holds no tag, `10<sup>9</sup>/L` is 10⁹/L and not 109/L, an ideographic space is a space and not nothing.
Code (fenced or between backticks) is never touched. Each step is gated by a substring test, because most texts need none of them.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from ..config import option
from .characters import codepoints, text_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .batch import Batch
    from .characters import Codes
    from .ngrams import Bits

Where = Literal["pretrain", "all", "none"]


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """`clean:` what is done to the text inside a row."""

    html: Where = option("all", "remove HTML tags and decode entities: in pretraining text, in all rows (dialogues about code are left alone), or nowhere")
    links: Where = option("pretrain", "remove web addresses, keep their link text")
    whitespace: bool = option(True, "U+3000, U+00A0 and relatives to a space, \\r\\n to \\n, no spaces at line ends, at most one blank line in a row")
    controls: bool = option(True, "remove control, zero-width and direction characters")
    width: bool = option(True, "full-width letters and digits to ASCII, radicals and compatibility ideographs to the common ones; Chinese punctuation and superscripts stay")
    mojibake: bool = option(True, "repair UTF-8 that was once read as Latin-1, where the whole text shows it")
    simplify: bool = option(False, "traditional to simplified Chinese (OpenCC)")


# --- HTML ---------------------------------------------------------------------------------------------------------------------------------

_BLOCK = frozenset(
    """p div br hr li ul ol dl dt dd tr table thead tbody tfoot h1 h2 h3 h4 h5 h6 blockquote pre section article header footer nav aside main figure figcaption
    form center""".split()  # noqa: SIM905
)
_INLINE = frozenset(
    """a abbr b big cite code del em font i iframe img input ins kbd label mark meta link o:p q s samp script small span strike strong style sub sup svg path td th
    tt u var video audio source button select option textarea body head html title base canvas col colgroup caption object embed param noscript ruby rt rp wbr time
    address acronym""".split()  # noqa: SIM905
)
_LIKE_WORDS = frozenset(  # also a variable, an unknown or a placeholder in plain text
    """a b i p q s u var time code label title link source object option select input main path body head base col param form center map mark address
    table""".split()  # noqa: SIM905
)
_NAMES = "|".join(re.escape(n) for n in sorted(_BLOCK | _INLINE, key=len, reverse=True))
_SWITCHES = "async|autofocus|autoplay|checked|controls|defer|disabled|hidden|loop|multiple|muted|nowrap|noshade|open|readonly|required|reversed|selected"
_VALUE = r"""(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>=`]+)"""
_ATTRIBUTES = rf"(?:\s+(?:[a-zA-Z_:@][\w:.@-]*\s*=\s*{_VALUE}|(?:{_SWITCHES})\b))*"  # `<b and c>` has none: it stays
_TAG = re.compile(rf"<(/?)({_NAMES})({_ATTRIBUTES})\s*(/?)>", re.I)
_DROPPED = re.compile(r"<(script|style|noscript|iframe)\b[^<>]*>.*?</\1\s*>", re.I | re.S)
_COMMENT = re.compile(r"<!--.*?-->|<!doctype\b[^<>]*>|<!\[CDATA\[|\]\]>|<\?xml\b[^<>]*\?>", re.I | re.S)
_SUP = re.compile(r"<su([pb])(?:\s[^<>]*)?>\s*([^<>]{1,20}?)\s*</su\1\s*>", re.I)
_CODE = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`)", re.S)
_ABOUT_CODE = re.compile(r"html|xml|jsx|css|代码|标签|标记|[{};]\s*(?:\n|$)|\$\w|=>|::|\(\)|#include|^\s*(?:import|def|class|function|public|private) ", re.I | re.M)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_SUPERSCRIPTS = str.maketrans("0123456789+-=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿ")
_SUBSCRIPTS = str.maketrans("0123456789+-=()", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎")
_CELL_END = re.compile(r"</t[dh]\s*>\s*(?=<t[dh]\b)", re.I)


def strip_html(text: str) -> str:
    """Remove HTML tags, keeping what they stand for: breaks, list items, table cells, super- and subscripts.

    A tag counts only with a known name, closed syntax and, where it could be an inequality or a placeholder (`a<b>c`, `<title>`), more evidence:
    attributes, its closing tag, or (for `<p>`) other markup around it.
    """
    if not _TAG.search(text):
        return _COMMENT.sub("", text) if "<!" in text or "<?" in text else text
    text = _COMMENT.sub("", _DROPPED.sub("", text))
    text = _SUP.sub(_script, text)
    text = _CELL_END.sub(" | ", text)
    names = {(m[1], m[2].lower()) for m in _TAG.finditer(text)}
    page = any(name not in _LIKE_WORDS for _, name in names)

    def replacement(m: re.Match[str]) -> str:
        closing, name, attributes = m[1], m[2].lower(), m[3]
        paired = ("", name) in names and ("/", name) in names
        if name in _LIKE_WORDS and not attributes and not paired and not (name == "p" and page):
            return m[0]
        if name == "li" and not closing:
            return "\n- "
        return "\n" if name in ("br", "hr") or (name in _BLOCK and closing) else ""

    return _TAG.sub(replacement, text)


def _script(m: re.Match[str]) -> str:
    """`<sup>9</sup>` as ⁹; what has no such character as ^(...) or _(...), so that 10<sup>ab</sup> never becomes 10ab."""
    table, mark = (_SUPERSCRIPTS, "^") if m[1].lower() == "p" else (_SUBSCRIPTS, "_")
    if all(ord(c) in table for c in m[2]):
        return m[2].translate(table)
    return f"{mark}({m[2]})" if len(m[2]) > 1 else f"{mark}{m[2]}"


def decode_entities(text: str) -> str:
    """Decode complete entities once (`&lt;` `&#8805;`), leaving bare ampersands and unknown names alone."""
    return _ENTITY.sub(lambda m: html.unescape(m[0]), text)


# --- links --------------------------------------------------------------------------------------------------------------------------------

_MARKDOWN_LINK = re.compile(r"!?\[([^\]\n]*)\]\((?:https?://|www\.)[^\s()]*(?:\([^\s()]*\)[^\s()]*)*\)")
_URL = re.compile(r"(?:https?://|ftp://|(?<![\w.@])www\.)[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")


def strip_links(text: str) -> str:
    """Remove web addresses; `[text](address)` becomes its text."""
    text = _MARKDOWN_LINK.sub(r"\1", text)
    return _URL.sub(lambda m: _after_url(m[0]), text)


def _after_url(url: str) -> str:
    """What of a matched address belongs to the sentence around it: closing punctuation."""
    end = len(url)
    while end and (url[end - 1] in ".,;:!?'*" or (url[end - 1] == ")" and url.count(")", 0, end) > url.count("(", 0, end))):
        end -= 1
    return url[end:]


# --- characters ---------------------------------------------------------------------------------------------------------------------------

_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_INVISIBLE = "\u00ad\u180e\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2061\u2062\u2063\u2064\u2066\u2067\u2068\u2069\ufeff\ufff9\ufffa\ufffb"
_CONTROLS = "".join(chr(c) for c in [*range(9), 11, *range(14, 32), *range(127, 160)] if c != 0x85)


def _width_table() -> dict[int, str]:
    """Characters whose NFKC form is the same character in another width or block; no punctuation, no super- or subscripts, no unit squares."""
    points = [*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B), *range(0x2F00, 0x2FD6), *range(0xF900, 0xFAD9), *range(0xFB00, 0xFB07)]
    return {c: form for c in points if (form := unicodedata.normalize("NFKC", chr(c))) != chr(c)}


_GONE, _LONGER = 0xFFFFFFFF, 0xFFFFFFFE


@lru_cache(maxsize=8)
def _character_rules(whitespace: bool, controls: bool, width: bool) -> tuple[dict[int, str], Codes]:
    """What characters become: as a table for str.translate, and as an array [0x110000] (_GONE: nothing, _LONGER: more than one character)."""
    import numpy as np

    table: dict[int, str] = {}
    if whitespace:
        table |= dict.fromkeys(map(ord, _SPACES), " ") | {0x85: "\n", 0x0C: "\n"}
    if controls:
        table |= dict.fromkeys(map(ord, _INVISIBLE + _CONTROLS), "")
    if width:
        table |= _width_table()
    array = np.arange(0x110000, dtype=np.uint32)
    for point, form in table.items():
        array[point] = ord(form) if len(form) == 1 else _LONGER if form else _GONE
    return table, array


def _mapped(text: str, config: CleanConfig) -> str:
    table, array = _character_rules(config.whitespace, config.controls, config.width)
    codes = codepoints(text)
    new = array[codes]
    changed = new != codes
    if not changed.any():
        return text
    if (new == _LONGER).any():
        return text.translate(table)
    return text_of(new[new != _GONE])


_WIDE_POINT = re.compile(r"(?<=[0-9])．(?=[0-9])")
_WIDE_PERCENT = re.compile(r"(?<=[0-9])％")
_INDENT = re.compile(r"^[\u3000\u00a0]+", re.M)
_LINE_END = re.compile(r"[ \t]+(?=\n)")


def _thin(text: str, marks: tuple[str, ...], rest: re.Pattern[str]) -> str:
    """Newlines without what each mark has beside them. Repeated replacement is the quickest way for the usual one or two characters; `rest` ends longer runs."""
    for _ in range(4):
        if not any(mark in text for mark in marks):
            return text
        for mark in marks:
            text = text.replace(mark, "\n")
    return rest.sub("", text)


def _characters(text: str, config: CleanConfig) -> str:
    if config.whitespace:
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if "\u3000" in text or "\u00a0" in text:
            text = _thin(text.lstrip("\u3000\u00a0"), ("\n\u3000", "\n\u00a0"), _INDENT)
    if not (text.isascii() and text.isprintable()):
        text = _mapped(text, config)
        if config.width and ("．" in text or "％" in text):
            text = _WIDE_PERCENT.sub("%", _WIDE_POINT.sub(".", text))
    if config.whitespace:
        text = _thin(text, (" \n", "\t\n"), _LINE_END)
        while "\n\n\n" in text:
            text = text.replace("\n\n\n", "\n\n")
    return text


# --- mojibake, simplification -------------------------------------------------------------------------------------------------------------

_LATIN = re.compile(r"[\u00c2-\u00f4][\u0080-\u00bf\u0152-\u017e\u0192\u02c6\u02dc\u2013-\u2026\u2030\u2039\u203a\u20ac\u2122]")


def repair_mojibake(text: str) -> str:
    """UTF-8 that was read as Latin-1 or Windows-1252, read again; unchanged unless the whole text decodes and becomes Chinese."""
    if len(_LATIN.findall(text)) * 4 < len(text) * 0.6:
        return text
    for encoding in ("cp1252", "latin-1"):
        try:
            repaired = text.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
        if any("\u4e00" <= c <= "\u9fff" for c in repaired):
            return repaired
    return text


@lru_cache(maxsize=1)
def _opencc() -> Any:
    import opencc

    return opencc.OpenCC("t2s")


# --- everything ---------------------------------------------------------------------------------------------------------------------------


def cleaner(config: CleanConfig, *, pretrain: bool) -> Callable[[str], str]:
    """The function that cleans one text; pretraining text is cleaned harder than the texts of a dialogue."""
    markup, links = _wanted(config, pretrain)

    def plain(text: str) -> str:
        if markup and "<" in text and (pretrain or not _ABOUT_CODE.search(text)):
            text = strip_html(text)
        if markup and "&" in text and ";" in text:
            text = decode_entities(text)
        if links and ("://" in text or "www." in text):
            text = strip_links(text)
        return _characters(text, config)

    def clean(text: str) -> str:
        if config.mojibake and not text.isascii() and _LATIN.search(text):
            text = repair_mojibake(text)
        if "`" in text or "~~~" in text:
            text = "".join(part if i % 2 else plain(part) for i, part in enumerate(_CODE.split(text)))
        else:
            text = plain(text)
        if config.simplify:
            text = _opencc().convert(text)
        return text.strip() if config.whitespace else text

    return clean


def _wanted(config: CleanConfig, pretrain: bool) -> tuple[bool, bool]:
    """Whether tags and entities, and links, are removed."""
    html, links = (getattr(config, name) == "all" or (pretrain and getattr(config, name) == "pretrain") for name in ("html", "links"))
    return html, links


_DIRTY, _BLANK, _LINK = 1, 2, 4


@lru_cache(maxsize=8)
def _suspects(config: CleanConfig, pretrain: bool) -> NDArray[np.uint8]:
    """What a character may ask for, [0x110000]: cleaning wherever it stands (_DIRTY), at some places (_BLANK), before some others (_LINK)."""
    import numpy as np

    markup, links = _wanted(config, pretrain)
    _, mapped = _character_rules(config.whitespace, config.controls, config.width)
    table: NDArray[np.uint8] = (mapped != np.arange(0x110000, dtype=np.uint32)).astype(np.uint8) * np.uint8(_DIRTY)
    table[[ord(c) for c in ("<&" if markup else "") + ("．％" if config.width else "") + ("\r" if config.whitespace else "")]] = _DIRTY
    if config.mojibake:
        table[0xC2:0xF5] = _DIRTY
    if config.whitespace:
        table[[c for c in range(0x3001) if chr(c).isspace()]] |= _DIRTY
        table[[ord(c) for c in " \t\n"]] = _BLANK
    if links:
        table[[ord(":"), ord("w")]] |= _LINK
    return table


def unclean(batch: Batch, config: CleanConfig, *, pretrain: bool) -> Bits:
    """Mask of the texts that cleaning may change, [texts]; all others it would leave as they are."""
    import numpy as np

    if config.simplify:
        return np.ones(len(batch.texts), bool)
    codes, last = batch.codes, len(batch.codes) - 1
    kinds = _suspects(config, pretrain)[codes]
    out = batch.having(np.flatnonzero((kinds & _DIRTY) != 0))
    if config.whitespace:
        edges = np.zeros(last + 2, bool)
        edges[batch.starts] = edges[batch.ends - 1] = True
        at = np.flatnonzero((kinds & _BLANK) != 0)
        one, two = codes[np.minimum(at + 1, last)], codes[np.minimum(at + 2, last)]
        out |= batch.having(at[edges[at] | ((one == 10) & ((codes[at] != 10) | (two == 10)))])
    at = np.flatnonzero((kinds & _LINK) != 0)
    first, one = codes[at], codes[np.minimum(at + 1, last)]
    out |= batch.having(at[np.where(first == ord(":"), one == ord("/"), one == ord("w"))])
    return out
