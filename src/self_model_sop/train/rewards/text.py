"""Rewards for the text of an answer: equality, form, references, refusal, length and repetition."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from .answer import conclusions, marked, spoken
from .numbers_zh import chinese_integer, fold

# --- equality --------------------------------------------------------------------------------------------------------------------------------


def exact(answer: str, row: Mapping[str, Any], *, normalise: bool = True, separator: str | None = None) -> float:
    """1 where the answer is the ground truth (or one of several), else 0.

    Args:
        answer: the model's text; of a thought only what follows it counts, of `<answer>` or a box its content.
        row: `ground_truth` is the text.
        normalise: compare without case, white space, punctuation and width.
        separator: parts several accepted answers in the ground truth.
    """
    text = spoken(answer)
    inner = marked(text)
    given = _plain(text if inner is None else inner) if normalise else (text if inner is None else inner)
    truths = str(row["ground_truth"]).split(separator) if separator else [str(row["ground_truth"])]
    return float(any(given == (_plain(t) if normalise else t) for t in truths) and bool(given))


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] not in "PZC" or (c == "-" and len(folded) < 30))


# --- form ------------------------------------------------------------------------------------------------------------------------------------


def json_object(answer: str, row: Mapping[str, Any], *, keys: Sequence[str] = (), fence: bool = True) -> float:
    """1 for one JSON object with all `keys`, their share where some are missing, 0 for anything else: text around it, a repeated key, NaN.

    Args:
        answer: the model's text; what follows a closed thought.
        row: not read.
        keys: what the object must hold; none: any object.
        fence: allow a Markdown code fence around it.
    """
    text = spoken(answer).strip()
    inner = re.fullmatch(r"```(?:json)?\s*\n(.*)\n```", text, re.DOTALL) if fence else None
    try:
        loaded = json.loads(inner[1] if inner else text, object_pairs_hook=_unique, parse_constant=_refused)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(loaded, dict):
        return 0.0
    return sum(key in loaded for key in keys) / len(keys) if keys else 1.0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _refused(name: str) -> float:
    raise ValueError(name)


def tags(answer: str, row: Mapping[str, Any], *, names: Sequence[str] = ("think", "answer")) -> float:
    """1 where the answer is these tags in this order, each once, none empty, and nothing else around them; else 0.

    Args:
        answer: the model's text.
        row: not read.
        names: of the tags; `[think]` alone asks for a thought and any text after it.
    """
    pieces = [rf"<{re.escape(n)}>(?P<t{i}>.*?)</{re.escape(n)}>" for i, n in enumerate(names)]
    tail = r"(?P<rest>.+)" if len(names) == 1 else ""
    found = re.fullmatch(r"\s*" + r"\s*".join(pieces) + tail + r"\s*", answer, re.DOTALL)
    if not found or any(not part.strip() for part in found.groups()):
        return 0.0
    return float(all(answer.count(f"<{n}>") == 1 and answer.count(f"</{n}>") == 1 for n in names))


# --- references ------------------------------------------------------------------------------------------------------------------------------

_NUMERAL = r"[零〇一二两三四五六七八九十百千\d]+"
_REFERENCE = re.compile(rf"《(?P<title>[^《》\n]{{1,80}})》|第(?P<article>{_NUMERAL})条(?:之(?P<of>{_NUMERAL}))?|\[(?P<note>\d{{1,4}})\]")


def cite(answer: str, row: Mapping[str, Any]) -> float:
    """How well the cited references are the required ones: 2 · right / (cited + required), so that citing everything does not help.

    References are statutes with articles (《民法典》第一百条, also 第100条) and notes ([3]). An article without a title near it counts where a required one has its number.

    Args:
        answer: the model's text; what follows a closed thought.
        row: `extra_info.references` (a list, or text with one a line) or else the references that `ground_truth` names.

    Raises:
        ValueError: where the row requires none.
    """
    extra = row.get("extra_info") or {}
    given = extra.get("references") if isinstance(extra, Mapping) else None
    named = "\n".join(map(str, given)) if isinstance(given, (list, tuple)) else str(given or row["ground_truth"])
    required, cited = references(named), references(spoken(answer))
    if not required:
        raise ValueError("the row names no reference to cite")
    right = sum(any(_same(c, r) for c in cited) for r in required)
    matched = sum(any(_same(c, r) for r in required) for c in cited)
    return min(right, matched) * 2 / (len(cited) + len(required))


def references(text: str) -> set[tuple[str, str]]:
    """(title, article or note) of each reference; a title without an article has "", an article without a title too."""
    out: set[tuple[str, str]] = set()
    title, alone = "", False
    for match in _REFERENCE.finditer(fold(text)):
        if match["title"]:
            if alone:
                out.add((title, ""))
            title, alone = re.sub(r"^中华人民共和国|\s", "", match["title"]), True
        elif match["note"]:
            out.add(("", f"[{int(match['note'])}]"))
        else:
            out.add((title, "-".join(_digits(n) for n in (match["article"], match["of"]) if n)))
            alone = False
    if alone:
        out.add((title, ""))
    return out


def _digits(numeral: str) -> str:
    value = int(numeral) if numeral.isdecimal() else chinese_integer(numeral)
    return numeral if value is None else str(value)


def _same(cited: tuple[str, str], required: tuple[str, str]) -> bool:
    return cited == required or (bool(cited[1]) and cited[1] == required[1] and not (cited[0] and required[0]))


# --- refusal ---------------------------------------------------------------------------------------------------------------------------------

_REFUSES = re.compile(
    r"(?:无法|不能|没法|难以)(?:回答|作答|确定|判断|得出|给出|推断|提供|得知|知道)|(?:未|没有?)(?:提及|提到|给出|说明|足够的?信息|相关(?:信息|内容|资料))|(?:信息|资料|条件)不(?:足|够|全)|不(?:知道|清楚|确定)|"
    r"(?:拒绝|不便|抱歉.{0,8}不(?:能|便))回答|超出.{0,10}范围|unanswerable|(?:can(?:no|')t|cannot|unable to) (?:answer|determine|be determined)|not enough information|don't know",
    re.IGNORECASE,
)


def refusal(answer: str, row: Mapping[str, Any], *, phrases: Sequence[str] = ()) -> float:
    """1 where an unanswerable question is refused and an answerable one is not, else 0; an empty answer is neither.

    Args:
        answer: the model's text; what follows a closed thought. A refusal that then concludes all the same (无法确定, 但答案是 B) is none.
        row: unanswerable where `extra_info.answerable` is false, or where `ground_truth` itself refuses.
        phrases: further texts that refuse.
    """
    extra = row.get("extra_info") or {}
    stated = extra.get("answerable") if isinstance(extra, Mapping) else None
    answerable = bool(stated) if stated is not None else not refuses(str(row["ground_truth"]), phrases)
    text = spoken(answer).strip()
    return float(bool(text) and refuses(text, phrases) != answerable)


def refuses(text: str, phrases: Sequence[str] = ()) -> bool:
    """Whether a text refuses to answer, and does not answer after all."""
    folded = fold(text)
    if not (_REFUSES.search(folded) or any(fold(p) in folded for p in phrases)):
        return False
    return marked(folded) is None and all(_REFUSES.search(piece) for piece in conclusions(folded))


# --- penalties -------------------------------------------------------------------------------------------------------------------------------


def length(answer: str, row: Mapping[str, Any], *, least: int = 1, most: int = 800, margin: int = 200) -> float:
    """0 up to `most` characters, falling evenly to -1 at `most + margin`; -1 below `least`. (Soft overlong punishment: DAPO, arXiv 2503.14476.)

    Args:
        answer: the model's text, the thought included.
        row: not read.
        least: characters without surrounding white space that an answer needs.
        most: characters that cost nothing.
        margin: characters over which the penalty grows.
    """
    count = len(answer.strip())
    if count < least:
        return -1.0
    return 0.0 - min(1.0, max(0, count - most) / margin) if margin else 0.0 - float(count > most)


def repetition(answer: str, row: Mapping[str, Any], *, n: int = 4, free: float = 0.2) -> float:
    """Minus the share of character n-grams that occurred before, above the share that costs nothing, scaled to [-1, 0].

    Args:
        answer: the model's text; white space does not count.
        row: not read.
        n: characters of one piece.
        free: share of repeated pieces that costs nothing; Chinese prose repeats some.
    """
    text = re.sub(r"\s+", "", answer)
    total = len(text) - n + 1
    if total < 2:
        return 0.0
    repeated = 1 - len({text[i : i + n] for i in range(total)}) / total
    return 0.0 - max(0.0, (repeated - free) / (1 - free))
