"""The forgetting guard: what a model knew in general must survive what it learns about the domain, or the run stops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import option
from ..errors import DATA, SopError
from .table import points, relative


@dataclass(frozen=True, kw_only=True)
class Guard:
    """The stop rule. Changes are those of the last model against the first."""

    general: tuple[str, ...] = option((), "texts and question sets that must not get worse; empty: no guard")
    max_loss: float = option(0.05, "largest rise of bits per byte on a general text (0.05: 5 %)")
    max_drop: float = option(0.05, "largest fall of the share of right answers on a general question set (0.05: 5 points)")
    stop: bool = option(True, "exit 3 where that is exceeded; false: only say so")

    def __post_init__(self) -> None:
        if self.max_loss < 0 or self.max_drop < 0:
            raise ValueError("max_loss and max_drop are allowances: 0 or more")


def judge(results: Mapping[str, Any], guard: Guard) -> list[dict[str, Any]]:
    """One entry per later model and general set: the change, its interval, the limit, and whether it is exceeded."""
    return list(_entries(results, guard))


def _entries(results: Mapping[str, Any], guard: Guard) -> Iterator[dict[str, Any]]:
    for model in list(results["models"])[1:]:
        for name in guard.general:
            bits, exam = results["bits"].get(model, {}).get(name), results["exams"].get(model, {}).get(name)
            if bits:
                against = bits["against_first"]
                change, limit, shown, limit_shown = against["change"], guard.max_loss, relative(against), f"{100 * guard.max_loss:+.1f} %"
                broken = change > limit
            elif exam:
                against = exam["against_first"]
                change, limit, shown, limit_shown = against["difference"], -guard.max_drop, points(against), f"{-100 * guard.max_drop:+.1f} points"
                broken = change < limit
            else:
                continue
            yield {
                "model": model, "set": name, "kind": "bits" if bits else "exam", "change": change, "low": against.get("low"), "high": against.get("high"),
                "limit": limit, "shown": shown, "limit_shown": limit_shown, "broken": broken,
            }  # fmt: skip


def enforce(entries: list[dict[str, Any]], guard: Guard, last: str, where: str) -> None:
    """Stop where the last model lost more than is allowed.

    Raises:
        SopError: with exit code 3; the measurements are kept.
    """
    broken = [e for e in entries if e["broken"] and e["model"] == last]
    if broken and guard.stop:
        what = "; ".join(f"{e['model']} lost too much on {e['set']}: {e['shown']}, at most {e['limit_shown']} allowed" for e in broken)
        fix = "mix general text into the training data, train less or with a lower learning rate; or raise guard.max_loss / guard.max_drop, or set guard.stop: false"
        raise SopError(what, where=where, fix=fix, code=DATA)
