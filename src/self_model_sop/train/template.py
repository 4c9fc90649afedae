"""One rendering of a conversation: messages -> text -> ids -> which tokens are learned, in one pass.

Training, evaluation, chat, serving and export all render here. The text is what the tokenizer's own Jinja template writes and the ids are those of
`apply_chat_template`; which characters came from which message is tracked through the template, so the mask of every assistant turn is exact for any
template, with or without `{% generation %}`.

Learned of an assistant turn: everything from the end of its prompt (what the template writes before the model speaks) to its end marker, that included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from .. import console
from ..errors import SopError
from . import families, sandbox
from .conversation import FIELDS, REASONING, Drawn, Message, Turn, around, common_prefix, missing_fields, spell_calls, token_weights, track_message, weight_of
from .encoding import Encoder, ensure_pad
from .sandbox import TemplateError
from .tracked import leaf_mark, leaf_number, marks_of, track_tree

__all__ = ["Rendered", "Renderer", "TemplateError", "Turn", "ensure_pad", "renderer_for"]

TrainOn = Literal["all_assistant", "last", "full"]
ROLES = frozenset({"system", "user", "assistant", "tool"})
_RUN = re.compile(r"([^\0])\1*", re.DOTALL)
_NO_THINKING: tuple[dict[str, Any], ...] = ({"enable_thinking": False}, {"thinking": False})


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
        self._header, self._ends, self._as_trained = self._learn(tuple(stop))

    # --- what others call ----------------------------------------------------------------------------------------------------------------

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's end markers, and the tokenizer's end token."""
        texts = [*self._ends, *([self.tokenizer.eos_token] if self.tokenizer.eos_token else [])]
        ids = [self.tokenizer.convert_tokens_to_ids(t) for t in texts if t in self.encoder.control]
        return list(dict.fromkeys(i for i in ids if i is not None))

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the ids and the mask besides the tokenizer; a template that writes the date, the date."""
        today = date.today().isoformat() if "strftime_now" in self.template else None
        return {"template": self.template, "ends": self._ends, "train_on": self.train_on, "today": today}

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
        weights = [1.0] * len(encoded.ids) if self.train_on == "full" else token_weights(drawn.text, encoded.starts, encoded.ends, turns)
        return Rendered(drawn.text, encoded.ids, [w > 0 for w in weights], weights, tuple(turns), frozenset(self._remarks(drawn, messages, tools, encoded.spelled)))

    def _remarks(self, drawn: Drawn, messages: Sequence[Message], tools: Sequence[Any] | None, spelled: bool) -> Iterator[str]:
        written = {run[2] for run in drawn.runs}
        if spelled:
            yield "spelled"
        if tools and -1 not in written:
            yield "tools_left_out"
        if self._call_style == "text" and any(message.get("tool_calls") for message in messages):
            yield "calls_as_text"
        yield from (f"{m['role']}_left_out" for i, m in enumerate(messages) if i not in written and m["role"] != "assistant" and m.get("content"))

    def prompt(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, **variables: Any) -> list[int]:
        """Ids of a conversation up to where the model speaks: what stands before an answer in training.

        `variables` go to the template. For a family that writes an empty thought before answers without reasoning (Qwen3), that thought belongs to the
        prompt unless `enable_thinking=True` is given.
        """
        drawn = self._asked(messages, tools, variables)
        return self.encoder.encode(drawn.text, drawn.data).ids

    def prompt_text(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, **variables: Any) -> str:
        """The text that `prompt` gives the ids of."""
        return self._asked(messages, tools, variables).text

    def _asked(self, messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]) -> Drawn:
        return self._draw(self._prepare(messages), tools, add_generation_prompt=True, **{**self._as_trained, **variables})

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

    def _draw(self, messages: Sequence[Message], tools: Sequence[Any] | None, **variables: Any) -> Drawn:
        values = {"documents": None, "add_generation_prompt": False, **self._variables, **variables}
        values["messages"] = [track_message(i, message) for i, message in enumerate(messages)]
        values["tools"] = track_tree(list(tools), leaf_mark(1)) if tools else None
        text = sandbox.render(self.template, values)
        marks = marks_of(text)
        drawn = Drawn(str.__str__(text))
        for match in _RUN.finditer(marks):
            number = leaf_number(match.group(1))
            if number < 0:
                raise TemplateError("the template mixes the text of several messages in a way that cannot be followed", fix="use a template that writes each message by itself")
            message, kind = divmod(number - 2, len(FIELDS)) if number > 1 else (-1, 3)
            drawn.runs.append((match.start(), match.end(), message, FIELDS[kind]))
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
            reasoning = next((new[k] for k in REASONING if k in new), None)
            if reasoning:
                new = {**new, "thinking": reasoning, "reasoning_content": reasoning}
            prepared.append(new)
        if any(message.get("tool_calls") for message in prepared):
            style = self._style()
            prepared = [spell_calls(message, style) if message.get("tool_calls") else message for message in prepared]
        for new, message in zip(prepared, messages, strict=True):
            new["_weight"] = weight_of(message)
        return prepared

    def _style(self) -> str:
        """How this template wants tool calls: the first spelling that it writes out completely."""
        if self._call_style is None:
            call = {"type": "function", "function": {"name": "probe_name", "arguments": {"probe_key": "probe_value"}}}
            calling = {"role": "assistant", "content": "", "tool_calls": [call]}
            talk: list[dict[str, Any]] = [{"role": "user", "content": "u"}, calling, {"role": "tool", "content": "r", "name": "probe_name"}]
            for style in ("object", "string", "object_null", "string_null"):
                try:
                    drawn = self._draw([m if "tool_calls" not in m else spell_calls(m, style) for m in talk], None)
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

    def _learn(self, stop: tuple[str, ...]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
        """(what stands before an answer, what may end it, template variables of the prompt that an answer without reasoning follows), from a question and an answer.

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
        before, after = around(drawn, drawn.runs.index(answer))
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
        prompts = [(self._draw(talk[:1], None, add_generation_prompt=True, **variables).text, variables) for variables in ({}, *_NO_THINKING)]
        fitting = [(text, variables) for text, variables in prompts if drawn.text.startswith(text)]
        return header, ends, max(fitting, key=lambda found: len(found[0]), default=("", {}))[1]

    def _first_control(self, literal: str) -> str:
        """`literal` up to and including its first control token; "" where it has none."""
        found = [(at + len(t), -len(t)) for t in self.encoder.control if (at := literal.find(t)) >= 0]
        first = min(((end + negative, end) for end, negative in found), default=None)
        return literal[: first[1]].lstrip() if first else ""

    def _turns(self, drawn: Drawn, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> list[Turn]:
        """The assistant turns of a drawn conversation."""
        runs, turns = drawn.runs, []
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for k, run in enumerate(runs):
            if run[3] != "other":  # a name in the head of a turn is context
                first.setdefault(run[2], k)
                last[run[2]] = k
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            missing = missing_fields(message, i, runs[first[i] : last[i] + 1] if i in first else [])
            if i not in first:
                if missing:
                    raise TemplateError(f"the template leaves out message {i + 1} (assistant: {', '.join(missing)})", fix="use a template that writes it")
                continue  # an empty answer: nothing to learn
            a, b = first[i], last[i]
            if any(run[2] != i for run in runs[a : b + 1]):
                raise TemplateError(f"the template weaves message {i + 1} into others", fix="use a template that writes each message by itself")
            start = runs[a][0] - self._opening(drawn, a, messages, tools)
            end, marker = self._ending(drawn, b, messages, tools)
            turns.append(Turn(i, start, end, marker, float(message["_weight"]), missing, drawn.text[start : runs[a][0]]))
        if self.train_on == "last" and turns:
            turns = turns[-1:]
        return turns

    def _opening(self, drawn: Drawn, k: int, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> int:
        """How many characters of template text before run `k` the model itself would write: `<think>`, or the start of a tool call."""
        before, _ = around(drawn, k)
        named = k > 0 and drawn.runs[k - 1][2] == drawn.runs[k][2]  # a name ends the head of this turn
        if named or (self._header and before.endswith(self._header)):
            return 0
        index, start = drawn.runs[k][2], drawn.runs[k][0]
        key = (before, drawn.runs[k][3], messages[index - 1]["role"] if index else "")
        if key not in self._prompt_lengths:
            self._prompt_lengths[key] = self._prompt_gap(drawn, start, index, messages, tools)
        return self._prompt_lengths[key]

    def _prompt_gap(self, drawn: Drawn, start: int, index: int, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> int:
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

    def _ending(self, drawn: Drawn, k: int, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> tuple[int, str]:
        """(where the turn of run `k` ends, its end marker): the first end marker that the template writes after it."""
        _, after = around(drawn, k)
        at = drawn.runs[k][1]
        found = [(place, -len(text), text) for text in self._ends if (place := after.find(text)) >= 0]
        if found:
            place, _, text = min(found)
            space = after[:place]
            return at + place + len(text), space + text if space.isspace() else text
        alone = self._draw(messages[: drawn.runs[k][2] + 1], tools)  # what closes this turn when nothing follows
        closing = common_prefix(after, alone.text[alone.runs[-1][1] :])
        return at + len(closing.rstrip()), ""


def renderer_for(tokenizer: Any, template_path: str | Path | None = None, *, override: bool = False, train_on: TrainOn = "all_assistant") -> Renderer:
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
