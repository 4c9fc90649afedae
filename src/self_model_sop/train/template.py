"""One rendering of a conversation: messages -> text -> ids -> which tokens are learned, in one pass.

Training, evaluation, chat, serving and export all render here. The text is what the tokenizer's own Jinja template writes and the ids are those of
`apply_chat_template`; which characters came from which message is tracked through the template, so the mask of every assistant turn is exact for any
template, with or without `{% generation %}`.

Learned of an assistant turn: everything from the end of its prompt (what the template writes before the model speaks) to its end marker, that included.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import console
from ..errors import SopError
from . import families, sandbox
from .encoding import Encoder, Span, ensure_pad
from .sandbox import TemplateError
from .tracked import leaf_mark, leaf_number, marks_of, track_tree

__all__ = ["Rendered", "Renderer", "TemplateError", "Turn", "ensure_pad", "renderer_for"]

Message = Mapping[str, Any]
TrainOn = Literal["all_assistant", "last", "full"]
ROLES = frozenset({"system", "user", "assistant", "tool"})
_RUN = re.compile(r"([^\0])\1*", re.DOTALL)
_FIELDS = ("content", "reasoning_content", "tool_calls", "other")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_NO_THINKING: tuple[dict[str, Any], ...] = ({"enable_thinking": False}, {"thinking": False})


@dataclass(frozen=True)
class Turn:
    """One assistant turn in the text.

    `start:end` are the characters that the model would generate, `end_marker` is the text that ends them ("" where the template writes none), `missing`
    names fields of the message that the template left out, wholly or in part.
    """

    message: int
    start: int
    end: int
    end_marker: str
    weight: float
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation; `ids`, `supervised` and `weights` have one entry per token.

    `remarks` names what is worth counting: `spelled` (a message held text that looks like a control token; it is spelled as plain text),
    `calls_as_text` (the template has no format for tool calls), `tools_left_out` and `ROLE_left_out` (the template does not write them).
    """

    text: str
    ids: list[int]
    supervised: list[bool]
    weights: list[float]
    turns: tuple[Turn, ...] = ()
    remarks: frozenset[str] = frozenset()

    @property
    def labels(self) -> list[int]:
        """The ids of supervised tokens, -100 elsewhere."""
        return [i if s else -100 for i, s in zip(self.ids, self.supervised, strict=True)]


@dataclass
class _Drawn:
    """Text and the runs of characters that came from data: (start, end, message, field); message -1 are tools."""

    text: str
    runs: list[tuple[int, int, int, str]] = field(default_factory=list)

    @property
    def data(self) -> list[Span]:
        return [(run[0], run[1]) for run in self.runs]


class Renderer:
    """Renders conversations with one tokenizer and one template; made by `renderer_for`.

    Args:
        tokenizer: a fast tokenizer.
        template: Jinja source.
        name: what the run's output calls the template.
        stop: further texts that end a turn (from a template file).
        train_on: `all_assistant`, `last` (the last assistant turn only) or `full` (every token).
        verified: whether a real tokenizer of the template's family proved it.
    """

    def __init__(self, tokenizer: Any, template: str, *, name: str, stop: Sequence[str] = (), train_on: TrainOn = "all_assistant", verified: bool = True) -> None:
        self.tokenizer, self.template, self.name, self.train_on, self.verified = tokenizer, template, name, train_on, verified
        self.encoder = Encoder(tokenizer, template)
        self._variables = dict(tokenizer.special_tokens_map)
        self._prompt_lengths: dict[tuple[str, str, str], int] = {}
        self._call_style: str | None = None
        self._header, self._ends = self._learn(tuple(stop))

    # --- what others call ----------------------------------------------------------------------------------------------------------------

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's end markers, and the tokenizer's end token."""
        texts = [*self._ends, *([self.tokenizer.eos_token] if self.tokenizer.eos_token else [])]
        ids = [self.tokenizer.convert_tokens_to_ids(t) for t in texts if t in self.encoder.control]
        return list(dict.fromkeys(i for i in ids if i is not None))

    def render(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None) -> Rendered:
        """Text, ids and mask of a whole conversation.

        A message may carry `train: false` or `weight: 0.5` (assistant turns only).

        Raises:
            TemplateError: where the template refuses the conversation or it cannot be proven which text is the assistant's.
        """
        prepared = self._prepare(messages)
        drawn = self._draw(prepared, tools)
        turns = self._turns(drawn, prepared, tools)
        encoded = self.encoder.encode(drawn.text, drawn.data)
        weights = [1.0] * len(encoded.ids) if self.train_on == "full" else _weights(drawn.text, encoded.starts, encoded.ends, turns)
        return Rendered(drawn.text, encoded.ids, [w > 0 for w in weights], weights, tuple(turns), frozenset(self._remarks(drawn, messages, tools, encoded.spelled)))

    def _remarks(self, drawn: _Drawn, messages: Sequence[Message], tools: Sequence[Any] | None, spelled: bool) -> Iterator[str]:
        written = {run[2] for run in drawn.runs}
        if spelled:
            yield "spelled"
        if tools and -1 not in written:
            yield "tools_left_out"
        if self._call_style == "text" and any(message.get("tool_calls") for message in messages):
            yield "calls_as_text"
        yield from (f"{m['role']}_left_out" for i, m in enumerate(messages) if i not in written and m["role"] != "assistant" and m.get("content"))

    def prompt(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, **variables: Any) -> list[int]:
        """Ids of a conversation up to where the model speaks; `variables` go to the template (`enable_thinking=False`)."""
        drawn = self._draw(self._prepare(messages), tools, add_generation_prompt=True, **variables)
        return self.encoder.encode(drawn.text, drawn.data).ids

    def prepared(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as the template gets them: tool calls in the spelling that it reads (plain JSON text where it reads none)."""
        return [{k: v for k, v in message.items() if k != "_weight"} for message in self._prepare(messages)]

    @property
    def writes_tool_calls(self) -> bool:
        """Whether the template has a format for tool calls; where it has none, they are written as JSON text."""
        return self._style() != "text"

    def text(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = False, **variables: Any) -> str:
        """The rendered text alone."""
        return self._draw(self._prepare(messages), tools, add_generation_prompt=add_generation_prompt, **variables).text

    # --- drawing -------------------------------------------------------------------------------------------------------------------------

    def _draw(self, messages: Sequence[Message], tools: Sequence[Any] | None, **variables: Any) -> _Drawn:
        values = {"documents": None, "add_generation_prompt": False, **self._variables, **variables}
        values["messages"] = [_tracked_message(i, message) for i, message in enumerate(messages)]
        values["tools"] = track_tree(list(tools), leaf_mark(1)) if tools else None
        text = sandbox.render(self.template, values)
        marks = marks_of(text)
        drawn = _Drawn(str.__str__(text))
        for match in _RUN.finditer(marks):
            number = leaf_number(match.group(1))
            if number < 0:
                raise TemplateError("the template mixes the text of several messages in a way that cannot be followed", fix="use a template that writes each message by itself")
            message, kind = divmod(number - 2, len(_FIELDS)) if number > 1 else (-1, 3)
            drawn.runs.append((match.start(), match.end(), message, _FIELDS[kind]))
        return drawn

    def _prepare(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as the template wants them: known roles, no null fields, reasoning under every name, tool calls in the style it reads."""
        if not messages:
            raise TemplateError("an empty conversation")
        prepared = []
        for message in messages:
            if message.get("role") not in ROLES:
                raise TemplateError(f"unknown role {message.get('role')!r}", fix=f"roles are {', '.join(sorted(ROLES))}")
            new = {k: v for k, v in message.items() if v is not None and k not in ("train", "weight")}
            reasoning = next((new[k] for k in _REASONING if k in new), None)
            if reasoning:
                new = {**new, "thinking": reasoning, "reasoning_content": reasoning}
            prepared.append(new)
        if any(message.get("tool_calls") for message in prepared):
            style = self._style()
            prepared = [_styled(message, style) if message.get("tool_calls") else message for message in prepared]
        for new, message in zip(prepared, messages, strict=True):
            new["_weight"] = _weight(message)
        return prepared

    def _style(self) -> str:
        """How this template wants tool calls: the first spelling that it writes out completely."""
        if self._call_style is None:
            call = {"type": "function", "function": {"name": "probe_name", "arguments": {"probe_key": "probe_value"}}}
            calling = {"role": "assistant", "content": "", "tool_calls": [call]}
            talk: list[dict[str, Any]] = [{"role": "user", "content": "u"}, calling, {"role": "tool", "content": "r", "name": "probe_name"}]
            for style in ("object", "string", "object_null", "string_null"):
                try:
                    drawn = self._draw([m if "tool_calls" not in m else _styled(m, style) for m in talk], None)
                except TemplateError:
                    continue
                written = "".join(drawn.text[a:b] for a, b, message, _ in drawn.runs if message == 1)
                if all(word in written for word in ("probe_name", "probe_key", "probe_value")):
                    self._call_style = style
                    break
            else:
                self._call_style = "text"
        return self._call_style

    # --- what the template writes around an answer ---------------------------------------------------------------------------------------

    def _learn(self, stop: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """(what stands before an answer, what may end it), from a question and an answer.

        Raises:
            SopError: where the template writes no end marker, or loses the answer.
        """
        talk = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            drawn = self._draw(talk, None)
        except TemplateError as error:
            raise SopError(f"the chat template cannot write a question and an answer: {error.what}", where=self.name, fix="use another template_path") from error
        answer = next((run for run in drawn.runs if run[2] == 1), None)
        if answer is None:
            raise SopError("the chat template does not write the assistant's answer", where=self.name, fix="use another template_path")
        before, after = _around(drawn, drawn.runs.index(answer))
        asked, prompt = self._draw(talk[:1], None), self._draw(talk[:1], None, add_generation_prompt=True)
        header = prompt.text[len(asked.text) :] if prompt.text.startswith(asked.text) else ""
        if not header and before.endswith(always := prompt.text[prompt.runs[-1][1] :]):  # some templates write the prompt always
            header = always
        learned = self._first_control(after) or (after.rstrip() if after.strip() else "")
        eos = self.tokenizer.eos_token
        ends = tuple(dict.fromkeys([*([learned] if learned else []), *stop, *([eos] if eos else [])]))
        if not learned and not stop:
            raise SopError(
                "the chat template writes nothing after an answer, so the model would never learn to stop", where=self.name,
                fix="set template_path to a template whose assistant turns end (self_model/template/) and template_override: true",
            )  # fmt: skip
        return header, ends

    def _first_control(self, literal: str) -> str:
        """`literal` up to and including its first control token; "" where it has none."""
        found = [(at + len(t), -len(t)) for t in self.encoder.control if (at := literal.find(t)) >= 0]
        first = min(((end + negative, end) for end, negative in found), default=None)
        return literal[: first[1]].lstrip() if first else ""

    def _turns(self, drawn: _Drawn, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> list[Turn]:
        """The assistant turns of a drawn conversation."""
        runs, turns = drawn.runs, []
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for k, run in enumerate(runs):
            first.setdefault(run[2], k)
            last[run[2]] = k
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            missing = _missing(message, i, runs[first[i] : last[i] + 1] if i in first else [])
            if i not in first:
                if missing:
                    raise TemplateError(f"the template leaves out message {i + 1} (assistant: {', '.join(missing)})", fix="use a template that writes it")
                continue  # an empty answer: nothing to learn
            a, b = first[i], last[i]
            if any(run[2] != i for run in runs[a : b + 1]):
                raise TemplateError(f"the template weaves message {i + 1} into others", fix="use a template that writes each message by itself")
            start = runs[a][0] - self._opening(drawn, a, messages, tools)
            end, marker = self._ending(drawn, b, messages, tools)
            turns.append(Turn(i, start, end, marker, float(message["_weight"]), missing))
        if self.train_on == "last" and turns:
            turns = turns[-1:]
        return turns

    def _opening(self, drawn: _Drawn, k: int, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> int:
        """How many characters of template text before run `k` the model itself would write: `<think>`, or the start of a tool call."""
        before, _ = _around(drawn, k)
        if self._header and before.endswith(self._header):
            return 0
        index, start = drawn.runs[k][2], drawn.runs[k][0]
        key = (before, drawn.runs[k][3], messages[index - 1]["role"] if index else "")
        if key not in self._prompt_lengths:
            self._prompt_lengths[key] = self._prompt_gap(drawn, start, index, messages, tools)
        return self._prompt_lengths[key]

    def _prompt_gap(self, drawn: _Drawn, start: int, index: int, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> int:
        """Distance from the end of the turn's longest possible prompt (thinking or not) to `start`."""
        best = -1
        for variables in ({}, *_NO_THINKING) if index else ():
            try:
                prompt = self._draw(messages[:index], tools, add_generation_prompt=True, **variables).text
            except TemplateError:
                continue
            if len(prompt) <= start and drawn.text.startswith(prompt):
                best = max(best, len(prompt))
        if best >= 0:
            return start - best
        at = drawn.text.rfind(self._header, 0, start)
        previous = max((run[1] for run in drawn.runs if run[1] <= start), default=0)
        if not self._header or at < 0 or at + len(self._header) < previous:
            what = f"the template writes message {index + 1} (assistant) without the prompt that it gives a model"
            raise TemplateError(what, fix="use a template whose text agrees with its prompt")
        return start - at - len(self._header)

    def _ending(self, drawn: _Drawn, k: int, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> tuple[int, str]:
        """(where the turn of run `k` ends, its end marker): the first end marker that the template writes after it."""
        _, after = _around(drawn, k)
        at = drawn.runs[k][1]
        found = [(place, -len(text), text) for text in self._ends if (place := after.find(text)) >= 0]
        if found:
            place, _, text = min(found)
            space = after[:place]
            return at + place + len(text), space + text if space.isspace() else text
        alone = self._draw(messages[: drawn.runs[k][2] + 1], tools)  # what closes this turn when nothing follows
        closing = _common_prefix(after, alone.text[alone.runs[-1][1] :])
        return at + len(closing.rstrip()), ""


def renderer_for(tokenizer: Any, template_path: Path | None = None, *, override: bool = False, train_on: TrainOn = "all_assistant") -> Renderer:
    """The renderer of a tokenizer: its own template, or one of `self_model/template/` where it has none.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template_path: a template file. Where the tokenizer has a template too, both must write the same.
        override: use the file even where the tokenizer's own template writes something else.
        train_on: which tokens are learned.

    Raises:
        SopError: no template, two that differ, or one that cannot be proven.
    """
    own = _own_template(tokenizer)
    variables = dict(tokenizer.special_tokens_map)
    if template_path is None:
        if own is None:
            raise SopError("the tokenizer has no chat template", where=str(tokenizer.name_or_path), fix="set template_path, for example self_model/template/qwen2_chatml.json")
        sandbox.try_out(own, [families.PROBES["answer"]], variables)
        return Renderer(tokenizer, own, name="the tokenizer's own template", train_on=train_on)
    file = families.read(families.find(template_path))
    unlike = families.difference(file, own, variables) if own is not None else ""
    if own is not None and not unlike and not file.differs_on:
        return Renderer(tokenizer, own, name=f"{file.name} (equal to the tokenizer's own)", stop=file.stop, train_on=train_on)
    if unlike and not override:
        raise SopError(
            f"the template file and the tokenizer's own template write different texts\n  {unlike}", where=str(file.path),
            fix="leave template_path out to use the tokenizer's own, name the file of its family, or set template_override: true to retrain the format",
        )  # fmt: skip
    if not override:
        families.require_tokens(file, tokenizer)
    sandbox.try_out(file.source, [families.PROBES["answer"]], variables)
    if file.unverified and not file.verified:
        console.warn(f"the chat template {file.name} is unverified: {file.unverified}")
    name = file.name if own is None else f"{file.name} (instead of the tokenizer's own)"
    if own is not None and not unlike:
        name = f"{file.name} (equal to the tokenizer's own, but for {', '.join(file.differs_on)})"
    return Renderer(tokenizer, file.source, name=name, stop=file.stop, train_on=train_on, verified=bool(file.verified))


def _own_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return template or None


# --- pieces -------------------------------------------------------------------------------------------------------------------------------


def _tracked_message(index: int, message: Message) -> dict[str, Any]:
    """A message whose texts know where they came from; `role` stays plain because templates write it into control tokens."""
    base, out = 2 + index * len(_FIELDS), {}
    for key, value in message.items():
        if key in ("role", "_weight"):
            if key == "role":
                out[key] = value
            continue
        kind = 0 if key == "content" else 1 if key in _REASONING else 2 if key == "tool_calls" else 3
        out[key] = track_tree(value, leaf_mark(base + kind))
    return out


def _styled(message: Mapping[str, Any], style: str) -> dict[str, Any]:
    """A message whose tool calls are spelled in one of the ways that templates read."""
    import json

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


def _weight(message: Message) -> float:
    if message.get("train") is False:
        return 0.0
    weight = message.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise TemplateError(f"weight {weight!r} of a message is not a number of at least 0")
    return float(weight)


def _missing(message: Mapping[str, Any], index: int, runs: Sequence[tuple[int, int, int, str]]) -> tuple[str, ...]:
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


def _around(drawn: _Drawn, k: int) -> tuple[str, str]:
    """The template text right before and right after run `k`."""
    runs = drawn.runs
    before = drawn.text[runs[k - 1][1] if k else 0 : runs[k][0]]
    return before, drawn.text[runs[k][1] : runs[k + 1][0] if k + 1 < len(runs) else len(drawn.text)]


def _weights(text: str, starts: Sequence[int], ends: Sequence[int], turns: Sequence[Turn]) -> list[float]:
    """The weight of each token: that of its turn, 0 outside. A token that begins before a turn counts only if it holds more of it than white space."""
    weights = [0.0] * len(starts)
    for turn in turns:
        first, last = bisect_left(starts, turn.start), bisect_left(starts, turn.end)
        while first and ends[first - 1] > turn.start and text[turn.start : ends[first - 1]].strip():
            first -= 1
        weights[first:last] = [turn.weight] * (last - first)
    return weights


def _common_prefix(a: str, b: str) -> str:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return a[:n]
