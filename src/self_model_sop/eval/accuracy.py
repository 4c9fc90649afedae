"""Shares of right answers with their uncertainty: Wilson intervals, and a paired bootstrap between models that answered the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .harness import Outcome

_Z = 1.959963984540054  # two-sided 95 %
RESAMPLES = 10_000


def wilson(right: float, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): right also near 0 and 1, and never outside them."""
    if not total:
        return 0.0, 1.0
    share, z2 = right / total, _Z * _Z
    middle, spread = share + z2 / (2 * total), _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(0.0, (middle - spread) / (1 + z2 / total)), min(1.0, (middle + spread) / (1 + z2 / total))


def share(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """`{right, total, accuracy, low, high}`."""
    right, total = sum(o.correct for o in outcomes), len(outcomes)
    low, high = wilson(right, total)
    return {"right": right, "total": total, "accuracy": right / total if total else 0.0, "low": low, "high": high}


def table(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All questions, each category, each subject, and the plain mean over subjects (`macro`)."""
    subjects, categories = _groups(outcomes, "subject"), _groups(outcomes, "category")
    categories.pop("", None)
    by_subject = {name: share(group) for name, group in subjects.items()}
    macro = sum(s["accuracy"] for s in by_subject.values()) / len(by_subject) if by_subject else 0.0
    return {**share(outcomes), "macro": macro, "categories": {name: share(group) for name, group in categories.items()}, "subjects": by_subject}


def _groups(outcomes: Sequence[Outcome], key: str) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for o in outcomes:
        found.setdefault(getattr(o, key), []).append(o)
    return found


def difference(first: Sequence[Outcome], second: Sequence[Outcome], *, seed: int = 0) -> dict[str, Any]:
    """`second` minus `first` on the same questions, with a 95 % interval of a paired bootstrap over questions (percentiles of 10,000 resamples).

    A resample of n pairs is a draw of how many pairs got better, worse, or stayed: one multinomial, exactly what drawing pair by pair gives.
    """
    import numpy as np

    right = {o.id: o.correct for o in first}
    pairs = [(right[o.id], o.correct) for o in second]
    better, worse, total = sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs), len(pairs)
    draws = np.random.default_rng(seed).multinomial(total, [better / total, worse / total, 1 - (better + worse) / total], RESAMPLES)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / total, [0.025, 0.975])
    return {"better": better, "worse": worse, "difference": (better - worse) / total, "low": float(low), "high": float(high)}


def letters(outcomes: Sequence[Outcome]) -> Mapping[str, int]:
    """How often each letter was said: a model that has learned only a letter shows here."""
    found: dict[str, int] = {}
    for o in outcomes:
        found[o.said] = found.get(o.said, 0) + 1
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
