"""`rewards:` which functions judge an answer, with what weight; checked against the functions themselves before anything is loaded."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import errors
from ..config import option, project_root
from ..errors import SopError, suggest
from . import rewards
from .rewards import REWARDS, Part, Unscored

MODEL = "reward_model"  # the judge of reward_model_name_or_path
Finding = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class RewardSetting:
    """One entry of `rewards:`."""

    name: str = option(help=f"{', '.join(REWARDS)}; {MODEL}: the judge of reward_model_name_or_path; or a function of yours, file.py:function, relative to the project root")
    weight: float = option(1.0, "its share in the sum; a penalty is negative by itself, so its weight is positive too")
    options: dict[str, Any] = option(help="keyword options of the function", factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or not self.weight:
            raise ValueError("weight must be a number other than 0")


def complete(given: Sequence[RewardSetting], judge: str | None) -> tuple[RewardSetting, ...]:
    """The rewards of a run: a judge that is named but not listed counts with weight 1."""
    listed = any(setting.name == MODEL for setting in given)
    return (*given, RewardSetting(name=MODEL)) if judge and not listed else tuple(given)


def findings(given: Sequence[RewardSetting], judge: str | None) -> Iterator[Finding]:
    """What is wrong with `rewards:`, without loading a model or running a user's file."""
    every = complete(given, judge)
    if not every:
        yield "rewards", "nothing judges the answers", f"list rewards (- name: {' | '.join(REWARDS)}), or name a reward_model_name_or_path"
    labels = [rewards.label(setting.name) for setting in every]
    for name in sorted({name for name in labels if labels.count(name) > 1}):
        yield "rewards", f"{name} is listed twice", "keep one of them, or give functions of your own different names"
    for i, setting in enumerate(given):
        yield from (("rewards", f"entry {i + 1}: {what}", fix) for what, fix in _wrong(setting, judge))


def _wrong(setting: RewardSetting, judge: str | None) -> Iterator[tuple[str, str]]:
    if setting.name == MODEL:
        if not judge:
            yield f"{MODEL} needs reward_model_name_or_path", "name the folder that `sop train reward` wrote"
        if setting.options:
            yield f"{MODEL} has no options", "leave them out"
    elif rewards.is_file(setting.name):
        path = file_of(setting.name)
        if not path.is_file():
            yield f"no such file: {path}", "a reward of your own is file.py:function, relative to the project root"
        elif not rewards.label(setting.name).isidentifier():
            yield f"{setting.name!r} names no function", "write file.py:function"
    elif setting.name not in REWARDS:
        yield f"no reward {setting.name!r}", suggest(setting.name, [*REWARDS, MODEL], f"rewards: {', '.join([*REWARDS, MODEL])}; or file.py:function")
    else:
        yield from _options(setting.name, setting.options)


def _options(name: str, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    function = REWARDS[name].function
    known, hints = rewards.options_of(function), typing.get_type_hints(function)
    for key, value in given.items():
        if key not in known:
            yield f"{name} has no option {key!r}", suggest(key, known, f"its options: {', '.join(known) or 'none'}")
        elif not _fits(value, hints[key]):
            yield f"{name}.{key}: expected {inspect.formatannotation(hints[key])}, got {value!r}", ""


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is collections.abc.Sequence:
        return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
    if arguments:
        return any(_fits(value, one) for one in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def file_of(name: str) -> Path:
    """Where the file of `file.py:function` lies."""
    path = Path(name.rpartition(":")[0]).expanduser()
    return path if path.is_absolute() or path.is_file() else project_root() / path


def files(given: Sequence[RewardSetting]) -> dict[str, Path]:
    """Input name -> file of each function of the user, so that its content enters the fingerprint and its hash the manifest."""
    return {f"reward_{rewards.label(s.name)}": file_of(s.name) for s in given if rewards.is_file(s.name)}


def parts(given: Sequence[RewardSetting]) -> list[Part]:
    """The functions of a run with options and weights, the judge left out.

    Raises:
        SopError: where a file of the user does not load, or its function does not take these options.
    """
    made = []
    for setting in given:
        if setting.name == MODEL:
            continue
        if rewards.is_file(setting.name):
            setting = dataclasses.replace(setting, name=f"{file_of(setting.name).resolve()}:{rewards.label(setting.name)}")
        try:
            made.append(rewards.part(setting.name, setting.weight, setting.options, Path("/")))
        except Unscored as error:
            raise SopError(str(error), where="rewards", fix="def reward(answer: str, row: dict, **options) -> float", code=errors.USAGE) from error
    return made
