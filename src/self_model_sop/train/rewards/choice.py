"""Reward for multiple-choice questions: the letters that an answer chooses, however it words that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .answer import marked, spoken
from .numbers_zh import fold

_JOIN = r"(?:[\s、,/和与及以或者&+()\[\]{}\"'“”‘’*《》【】]|and|or){0,8}"  # bounded, so that no text is scanned twice
_GROUP = rf"[(\[{{\"'“‘*《【]{{0,4}}\s{{0,4}}(?P<letters>(?<![A-Za-z])[A-J](?:{_JOIN}[A-J]){{0,12}})(?![A-Za-z])"
_MARK = (
    r"(?:(?:答案|选项|结论)[】\])]?(?:应该?|应当)?(?:是|为|选择?|[:=])*|正确的(?:选项|说法|一项)?(?:是|为)|而是|(?:综上(?:所述)?|因此|所以|故)[,:]?|(?<!不)(?<!不能)(?<!不该)(?<!不应)(?<!别)(?<!没)(?<!未)(?:应|应该|应当|故|我|可|当)?选(?:择|项|出)?的?(?:是|为|:)*"
    r"|(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)\s*(?:is|:)*)"
)
_SAID = re.compile(rf"{_MARK}\s{{0,4}}{_GROUP}", re.IGNORECASE)
_JUDGED = re.compile(rf"{_GROUP}\s*(?:选?项)?(?:的?说法|的?表述)?\s*(?:都|均|是|为)*\s*(?:正确|对的?|符合题意|符合)(?!吗)")
_STARTS = re.compile(rf"{_GROUP}\s{{0,4}}(?:$|[.。:、)\]*])")
_ONLY = re.compile(rf"\W{{0,8}}{_GROUP}\W{{0,8}}", re.IGNORECASE)
_OPTION = re.compile(r"(?<![A-Za-z])[A-J][.、:)]")
_REJECTS = re.compile(r"\s{0,4}(?:选?项)?(?:的?说法|的?表述)?\s*(?:都|均|是|为)?\s*(?:不正确|错|不对|不符|不选|不是|排除|有误|×)")


def choice(answer: str, row: Mapping[str, Any], *, partial: bool = False) -> float:
    """1 where the chosen letters are those of the ground truth, else 0; several marks of a choice count as the last one, so that naming every letter earns nothing.

    Args:
        answer: the model's text.
        row: its `ground_truth` names the letters: B, ACD, 答案：B.
        partial: of a question with several right letters, a part without a wrong one earns its share, as in Chinese examinations.

    Raises:
        ValueError: where the ground truth names no letter.
    """
    truth = chosen(str(row["ground_truth"]))
    if not truth:
        raise ValueError("the ground truth names no letter")
    given = chosen(answer)
    if given == truth:
        return 1.0
    return len(given) / len(truth) if partial and given and given < truth else 0.0


def chosen(text: str) -> frozenset[str]:
    """The letters that a text chooses: those of its last `答案是`, `选`, box or tag; else those that it calls right; else the letters that it consists of or begins with."""
    folded = fold(spoken(text))
    inner = marked(folded)
    if inner is not None:
        return _letters(inner) if _ONLY.fullmatch(inner.strip()) else chosen(inner)
    said = [m for m in _SAID.finditer(folded) if not _REJECTS.match(folded, m.end())]
    if said:
        return _letters(said[-1]["letters"])
    judged = [m["letters"] for m in _JUDGED.finditer(folded)]
    if judged:
        return frozenset().union(*map(_letters, judged))
    lines = [line.strip() for line in folded.splitlines() if line.strip()]
    alone = [bool(_ONLY.fullmatch(line)) for line in lines]
    if lines and all(alone):
        return _letters(folded)
    if lines and (alone[0] or alone[-1]):
        return _letters(lines[-1] if alone[-1] else lines[0])
    start = _STARTS.match(lines[0]) if len(lines) == 1 and len(_OPTION.findall(lines[0])) < 2 else None
    return _letters(start["letters"]) if start else frozenset()


def _letters(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[A-J]", re.sub(r"(?i)\b(?:and|or)\b", " ", text).upper()))
