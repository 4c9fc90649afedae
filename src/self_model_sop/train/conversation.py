"""Conversations on their way through a template: what goes in with its origin, and what comes out as runs of text that are known to be data."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .encoding import Span
from .sandbox import TemplateError
from .tracked import leaf_mark, track_tree

Message = Mapping[str, Any]
FIELDS = ("content", "reasoning_content", "tool_calls", "other")
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Turn:
    """One assistant turn in the text.

    `start:end` are the characters that the model would generate: `opening` (what the template lets it write first, such as `<think>`), the message, and
    `end_marker` ("" where the template writes none). `missing` names fields of the message that the template left out, wholly or in part.
    """

    message: int
    start: int
    end: int
    end_marker: str
    weight: float
    missing: tuple[str, ...] = ()
    opening: str = ""


@dataclass
class Drawn:
    """Text and the runs of characters that came from data: (start, end, message, field); message -1 are tools."""

    text: str
    runs: list[tuple[int, int, int, str]] = field(default_factory=list)

    @property
    def data(self) -> list[Span]:
        return [(run[0], run[1]) for run in self.runs]


def track_message(index: int, message: Message) -> dict[str, Any]:
    """A message whose texts know where they came from; `role` stays plain because templates write it into control tokens."""
    base, out = 2 + index * len(FIELDS), {}
    for key, value in message.items():
        if key in ("role", "_weight"):
            if key == "role":
                out[key] = value
            continue
        kind = 0 if key == "content" else 1 if key in REASONING else 2 if key == "tool_calls" else 3
        out[key] = track_tree(value, leaf_mark(base + kind))
    return out


def spell_calls(message: Mapping[str, Any], style: str) -> dict[str, Any]:
    """A message whose tool calls are spelled in one of the ways that templates read."""
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        if style.startswith("object") and isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise TemplateError("the arguments of a tool call are not JSON") from None
        elif not style.startswith("object") and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append({"type": "function", **{k: v for k, v in call.items() if k in ("id", "type")}, "function": {**function, "arguments": arguments}})
    if style == "text":
        written = "\n".join(f'{{"name": {json.dumps(c["function"]["name"], ensure_ascii=False)}, "arguments": {c["function"]["arguments"]}}}' for c in calls)
        content = "\n".join(part for part in (message.get("content"), written) if part)
        return {**{k: v for k, v in message.items() if k != "tool_calls"}, "content": content}
    new = {**message, "tool_calls": calls}
    if style.endswith("_null") and not new.get("content"):
        new["content"] = None
    return new


def weight_of(message: Message) -> float:
    """The weight of a message's tokens: 0 for `train: false`, else `weight`, else 1.

    Raises:
        TemplateError: where it is no number of at least 0.
    """
    if message.get("train") is False:
        return 0.0
    weight = message.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise TemplateError(f"weight {weight!r} of a message is not a number of at least 0")
    return float(weight)


def missing_fields(message: Mapping[str, Any], index: int, runs: Sequence[tuple[int, int, int, str]]) -> tuple[str, ...]:
    """Fields of which the template wrote less than their text without surrounding white space."""
    written: dict[str, int] = {}
    for start, end, owner, kind in runs:
        if owner == index:
            written[kind] = written.get(kind, 0) + end - start
    missing = []
    content, reasoning = message.get("content"), message.get("reasoning_content")
    if isinstance(content, str) and written.get("content", 0) < len(content.strip()):
        missing.append("content")
    if isinstance(reasoning, str) and written.get("reasoning_content", 0) < len(reasoning.strip()):
        missing.append("reasoning_content")
    if message.get("tool_calls") and not written.get("tool_calls"):
        missing.append("tool_calls")
    return tuple(missing)


def around(drawn: Drawn, k: int) -> tuple[str, str]:
    """The template text right before and right after run `k`."""
    runs = drawn.runs
    before = drawn.text[runs[k - 1][1] if k else 0 : runs[k][0]]
    return before, drawn.text[runs[k][1] : runs[k + 1][0] if k + 1 < len(runs) else len(drawn.text)]


def token_weights(text: str, starts: Sequence[int], ends: Sequence[int], turns: Sequence[Turn]) -> list[float]:
    """The weight of each token: that of its turn, 0 outside. A token that begins before a turn counts only if it holds more of it than white space."""
    weights = [0.0] * len(starts)
    for turn in turns:
        first, last = bisect_left(starts, turn.start), bisect_left(starts, turn.end)
        while first and ends[first - 1] > turn.start and text[turn.start : ends[first - 1]].strip():
            first -= 1
        weights[first:last] = [turn.weight] * (last - first)
    return weights


def common_prefix(a: str, b: str) -> str:
    """The longest text that both begin with."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return a[:n]
