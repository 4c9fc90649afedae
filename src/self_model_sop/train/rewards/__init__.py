"""Verifiable rewards: one pure function each, `(answer, row, **options) -> float`, and their weighted sum.

This folder imports nothing but the standard library and itself: a copy of it runs in the environment of verl, on any node.

A row is that of `data.preference` (rl/*.parquet): `ground_truth`, and where it is there `prompt` (messages), `data_source`, `extra_info`.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .choice import choice
from .number import number
from .text import cite, exact, json_object, length, refusal, repetition, tags

Row = Mapping[str, Any]
Function = Callable[..., float]


class Reward(NamedTuple):
    """A reward function, the range of what it returns, and whether it compares with the row (a form or a length does not)."""

    function: Function
    least: float
    most: float
    compares: bool


REWARDS: dict[str, Reward] = {
    "choice": Reward(choice, 0, 1, True),
    "number": Reward(number, 0, 1, True),
    "exact": Reward(exact, 0, 1, True),
    "cite": Reward(cite, 0, 1, True),
    "refusal": Reward(refusal, 0, 1, True),
    "json": Reward(json_object, 0, 1, False),
    "tags": Reward(tags, 0, 1, False),
    "length": Reward(length, -1, 0, False),
    "repetition": Reward(repetition, -1, 0, False),
}


@dataclass(frozen=True)
class Part:
    """One summand: its name, its weight, the function with its options bound, and whether it compares with the row."""

    name: str
    weight: float
    function: Callable[[str, Row], float]
    compares: bool = True


class Unscored(ValueError):
    """A reward function failed on a row, or returned no finite number."""


def part(name: str, weight: float, options: Mapping[str, Any], folder: Path) -> Part:
    """The summand that a setting names; `file.py:function` is taken from `folder`.

    Raises:
        Unscored: where there is no such function.
    """
    if is_file(name):
        function = from_file(folder / name.rpartition(":")[0], name.rpartition(":")[2])
        return Part(label(name), weight, lambda answer, row: function(answer, row, **options))
    if name not in REWARDS:
        raise Unscored(f"no reward {name!r}")
    known = REWARDS[name]
    return Part(name, weight, lambda answer, row: known.function(answer, row, **options), known.compares)


def is_file(name: str) -> bool:
    """Whether a reward's name is `file.py:function`."""
    return name.rpartition(":")[0].endswith(".py")


def label(name: str) -> str:
    """What metrics and tables call a reward: of `file.py:function` the function."""
    return name.rpartition(":")[2] if is_file(name) else name


def from_file(path: Path, name: str) -> Function:
    """A function of a local Python file.

    Raises:
        Unscored: where the file does not load or has no such function.
    """
    spec = importlib.util.spec_from_file_location(f"sop_reward_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise Unscored(f"no Python file at {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Unscored(f"{path.name} does not load: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise Unscored(f"{path.name} has no function {name!r}")
    return found  # type: ignore[no-any-return]


def options_of(function: Function) -> dict[str, inspect.Parameter]:
    """The options that a reward function takes: its keyword-only parameters."""
    return {name: p for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


def each(parts: Sequence[Part], answer: str, row: Row) -> dict[str, float]:
    """Label -> what each summand gives, not weighted.

    Raises:
        Unscored: where a function fails or gives no finite number.
    """
    out = {}
    for summand in parts:
        try:
            value = float(summand.function(answer, row))
        except Exception as error:
            raise Unscored(f"{summand.name}: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise Unscored(f"{summand.name} gave {value}")
        out[summand.name] = value
    return out


def total(parts: Sequence[Part], scores: Mapping[str, float]) -> float:
    """The weighted sum of what `each` gave."""
    return sum(summand.weight * scores[summand.name] for summand in parts)
