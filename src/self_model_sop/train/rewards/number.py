"""Reward for questions whose answer is a number, with or without a unit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

from .answer import conclusions, marked, spoken
from .numbers_zh import Quantity, fold, quantities

_HEDGE = re.compile(r"\s*(?:[、,;/~|]|或者?|和|以及|至|到|-)\s*(?:是|为)?\s*$")


def number(
    answer: str, row: Mapping[str, Any], *, tolerance: float = 0.0, relative: float = 1e-6, unit: Literal["optional", "required", "ignored"] = "optional", marked_only: bool = False
) -> float:  # fmt: skip
    """1 where the number that an answer concludes with equals the ground truth's, else 0.

    One number is compared: the one in the last box or answer tag, else the one after the last conclusion (答案是, 所以, =, ####), else the last of the text. An enumeration
    (3、4、5) is no answer. Units are converted (0.325 g is 325 mg); a percentage equals its fraction (35 % is 0.35).

    Args:
        answer: the model's text.
        row: its `ground_truth` holds the number, in any spelling.
        tolerance: absolute distance that still counts, in the unit of the ground truth.
        relative: distance that still counts, as a share of the ground truth.
        unit: optional: an answer without a unit is read in the ground truth's; required: it must name one of the same kind; ignored: numbers alone are compared.
        marked_only: count only numbers after a conclusion, in a box or in a tag.

    Raises:
        ValueError: where the ground truth holds no number.
    """
    truth = concluded(str(row["ground_truth"]))
    if truth is None:
        raise ValueError("the ground truth holds no number")
    given = concluded(answer, marked_only=marked_only)
    return float(given is not None and _equal(given, truth, tolerance, relative, unit))


def concluded(text: str, *, marked_only: bool = False) -> Quantity | None:
    """The quantity that a text gives as its answer, or None where it gives none, or several to choose from."""
    folded = fold(spoken(text))
    inner = marked(folded)
    if inner is not None:
        return _single(inner, last=False)
    for piece in conclusions(folded):
        if quantities(piece, folded=True):
            return _single(piece, last=False)
    return None if marked_only else _single(folded, last=True)


def _single(text: str, *, last: bool) -> Quantity | None:
    """The last quantity of a text, or the first of a conclusion (after an equation: what it comes to); None in an enumeration of different ones."""
    if "=" in text:
        tail = text.rpartition("=")[2]
        if quantities(tail, folded=True):
            text, last = tail, False
    found = quantities(text, folded=True)
    if not found:
        return None
    at = len(found) - 1 if last else 0
    chosen = found[at]
    for i in (at - 1, at + 1):
        if 0 <= i < len(found) and found[i].value != chosen.value:
            left, right = sorted((found[i], chosen), key=lambda q: q.start)
            if _HEDGE.fullmatch(text[left.end : right.start]) or not text[left.end : right.start].strip():
                return None
    return chosen


def _equal(given: Quantity, truth: Quantity, tolerance: float, relative: float, unit: str) -> bool:
    if unit == "ignored":
        return _near(given.number, truth.number, tolerance, relative) or _near(given.value, truth.value, tolerance, relative)
    if given.dimension == truth.dimension:
        if unit == "required" and truth.percent and not given.percent:
            return False
        if truth.percent and not given.percent and unit == "optional" and _near(given.number, truth.number, tolerance, relative):
            return True  # 百分之几: a bare 35
        scale = Fraction(1, 100) if truth.percent else truth.factor
        return _near(given.value / scale, truth.value / scale, tolerance, relative)
    if unit == "optional" and (not given.dimension or not truth.dimension) and not (given.percent or truth.percent):
        return _near(given.number, truth.number, tolerance, relative)
    return False


def _near(given: Fraction, truth: Fraction, tolerance: float, relative: float) -> bool:
    return abs(given - truth) <= Fraction(tolerance) + abs(truth) * Fraction(relative)
