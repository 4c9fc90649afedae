"""Which tokens of a dataset are learned, proven row by row: what `sop train lint` shows, and what every training checks before it begins.

The proof does not use the renderer's own account: the supervised tokens are decoded again and must be, turn by turn, the assistant texts of the messages
and the end marker; what the template writes in between (`<think>`, the frame of a tool call) is listed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from .. import console, errors
from ..data.formats import RowError, to_messages, tools_of
from ..errors import SopError
from .template import Rendered, Renderer, TemplateError, Turn

PREFLIGHT_ROWS = 256
MAX_CONNECTIVES = 200  # distinct template texts that are listed


@dataclass(frozen=True)
class Sample:
    """A conversation as pieces of text: (text, learned?, control token?)."""

    title: str
    pieces: tuple[tuple[str, bool, bool], ...]
    tokens: int
    learned: int


@dataclass
class LintReport:
    """What is learned of a dataset; `total = kept + sum(dropped)`.

    `truncated` rows lose tokens at `max_length`; `unproven` holds "row: why" of rows whose decoded supervised tokens are not the assistant's; `merged` counts
    turns whose leading white space shares a token with the template; `unended` turns have no end marker; `left_out` counts message fields that the
    template drops; `remarks` counts rows by what `Rendered.remarks` says.
    """

    template: str
    total: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    tokens: int = 0
    learned: int = 0
    turns: int = 0
    merged: int = 0
    unended: int = 0
    remarks: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    connectives: Counter[str] = field(default_factory=Counter)
    unproven: list[str] = field(default_factory=list)
    unproven_rows: int = 0
    notes: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def all_masked(self) -> int:
        """Rows of which nothing is learned."""
        return self.dropped["nothing_to_learn"] + self.dropped["nothing_to_learn_before_the_cut"]

    def require(self) -> LintReport:
        """The report itself, if there is something to learn and every row is proven.

        Raises:
            SopError: exit code 3.
        """
        if not self.learned:
            reasons = ", ".join(f"{k} {v:,}" for k, v in sorted(self.dropped.items())) or "the data has no rows"
            fix = "look at the roles of the rows, at train_on, and at data.max_length"
            raise SopError(f"no token would be learned ({reasons})", where=self.template, fix=fix, code=errors.DATA)
        if self.unproven:
            what = f"in {self.unproven_rows:,} of {self.kept:,} rows the learned tokens are not exactly the assistant's text; first: {self.unproven[0]}"
            raise SopError(what, where=self.template, fix="use a template of the model's family (template_path)", code=errors.DATA)
        return self


def check(
    renderer: Renderer, rows: Iterable[Mapping[str, Any] | None], *, max_length: int | None = None, overlong: str = "truncate", samples: int = 0, expected_rows: int | None = None,
    group: int = 1,
) -> LintReport:  # fmt: skip
    """Render rows (any dialogue format) and prove what is learned.

    Args:
        renderer: the run's renderer.
        rows: data rows; None for a line that could not be read.
        max_length: tokens at which rows are cut (or dropped, by `overlong`).
        samples: groups of `group` neighbours (1, or 2 for the answers of a pair) to keep for showing, spread evenly over `expected_rows`.
    """
    report = LintReport(renderer.name)
    every = max(1, (expected_rows or 1) // group // max(samples, 1))
    for number, row in enumerate(rows):
        report.total += 1
        if row is None:
            report.dropped["unreadable"] += 1
            continue
        reason, rendered, messages = _rendered(renderer, row)
        if rendered is None:
            report.dropped[reason] += 1
            continue
        reason = _cut(report, rendered, max_length, overlong)
        if reason:
            report.dropped[reason] += 1
            continue
        report.kept += 1
        name = str(row.get("_source", f"row {number + 1}"))
        _prove(report, renderer, name, messages, rendered)
        if len(report.samples) < samples * group and number // group // every >= len(report.samples) // group:
            report.samples.append(_sample(renderer, name, rendered, max_length))
    _remark(report, renderer)
    return report


def _rendered(renderer: Renderer, row: Mapping[str, Any]) -> tuple[str, Rendered | None, list[dict[str, Any]]]:
    try:
        messages = to_messages(dict(row))
        return "", renderer.render(messages, tools=tools_of(dict(row))), messages
    except RowError as error:
        return error.reason, None, []
    except TemplateError as error:
        if error.code == errors.USAGE:
            raise
        return "template_refuses", None, []


def _cut(report: LintReport, rendered: Rendered, max_length: int | None, overlong: str) -> str:
    """Count a row's tokens; answers why it is dropped, if it is. The first token is never learned: nothing predicts it."""
    if not any(rendered.supervised[1:]):
        return "nothing_to_learn"
    if max_length is not None and len(rendered.ids) > max_length:
        if overlong == "drop":
            return "too_long"
        if not any(rendered.supervised[1:max_length]):
            return "nothing_to_learn_before_the_cut"
        report.truncated += 1
    report.tokens += len(rendered.ids[:max_length])
    report.learned += sum(rendered.supervised[1:max_length])
    return ""


# --- the proof ----------------------------------------------------------------------------------------------------------------------------


def _prove(report: LintReport, renderer: Renderer, name: str, messages: Sequence[Mapping[str, Any]], rendered: Rendered) -> None:
    report.remarks.update(rendered.remarks)
    if renderer.train_on == "full":
        if not all(rendered.supervised):
            _unproven(report, name, "a token is not learned although train_on is full")
        return
    learned = [[i for i, _ in group] for on, group in groupby(zip(rendered.ids, rendered.supervised, strict=True), key=lambda pair: pair[1]) if on]
    spoken = renderer.prepared(messages)
    turns = [turn for turn in rendered.turns if turn.weight > 0]
    wanted = _wanted(messages, renderer.train_on)
    if [turn.message for turn in turns] != wanted or len(learned) != len(turns):
        _unproven(report, name, f"{len(learned)} stretches of learned tokens for {len(wanted)} assistant turns")
        return
    for ids, turn in zip(learned, turns, strict=True):
        report.turns += 1
        report.unended += not turn.end_marker
        report.left_out.update(turn.missing)
        why = _turn_problem(report, _decode(renderer, ids), _decode(renderer, ids[:1]), spoken[turn.message], turn)
        if why:
            _unproven(report, name, f"message {turn.message + 1}: {why}")
            return


def _wanted(messages: Sequence[Mapping[str, Any]], train_on: str) -> list[int]:
    """Indices of the assistant turns that are to be learned."""
    said = [i for i, m in enumerate(messages) if m["role"] == "assistant" and any(_pieces(m))]
    if train_on == "last":
        said = said[-1:]
    return [i for i in said if messages[i].get("train") is not False and messages[i].get("weight", 1.0) > 0]


def _turn_problem(report: LintReport, learned: str, first: str, message: Mapping[str, Any], turn: Turn) -> str:
    """Why the decoded tokens (the first of them: `first`) are not the turn's text and its end marker; "" where they are."""
    marker = turn.end_marker
    if not learned.endswith(marker):
        return f"ends with {learned[-20:]!r} instead of {marker!r}"
    body, content = learned[: len(learned) - len(marker)], message.get("content") or ""
    plain = not message.get("tool_calls") and not message.get("reasoning_content") and "</think>" not in content
    if turn.opening and body.startswith(turn.opening):
        body = body[len(turn.opening) :]
        _connect(report, turn.opening)
    if plain and any(body == right for right in (content, content.strip(), content.rstrip(), content.lstrip())):
        return ""
    if plain and body.lstrip() in (content.lstrip(), content.strip()) and (content.rstrip().endswith(body.rstrip()) or first.strip()):
        report.merged += 1  # white space before the answer shares a token with the template, or with the answer's first word
        return ""
    at = 0
    for spellings in _pieces(message):
        places = [(body.find(text, at), text) for text in spellings]
        found = min(((place, text) for place, text in places if place >= 0), default=None)
        if found is None:
            return f"learned text {body[:60]!r} lacks {spellings[0][:60]!r}"
        _connect(report, body[at : found[0]])
        at = found[0] + len(found[1])
    _connect(report, body[at:])
    return f"learned text {body[:60]!r} is not {content[:60]!r}" if plain else ""


def _connect(report: LintReport, text: str) -> None:
    if text and (text in report.connectives or len(report.connectives) < MAX_CONNECTIVES):
        report.connectives[text] += 1


def _pieces(message: Mapping[str, Any]) -> Iterator[list[str]]:
    """What an assistant turn says, in the order in which templates write it; of each piece the spellings that are right."""
    reasoning, content = message.get("reasoning_content") or "", message.get("content") or ""
    if not reasoning and "</think>" in content:
        reasoning, _, content = content.removeprefix("<think>").rpartition("</think>")
    yield from ([text.strip()] for text in (reasoning, content) if text.strip())
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        yield [function["name"]]
        yield [arguments] if isinstance(arguments, str) else [json.dumps(arguments, ensure_ascii=False), json.dumps(arguments)]


def _decode(renderer: Renderer, ids: list[int]) -> str:
    return str(renderer.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _unproven(report: LintReport, name: str, why: str) -> None:
    report.unproven_rows += 1
    if len(report.unproven) < 20:
        report.unproven.append(f"{name}: {why}")


_REMARKS = {
    "spelled": "text that looks like a control token is encoded as plain text",
    "calls_as_text": "the template has no format for tool calls; they are written as JSON text",
    "tools_left_out": "the template does not show the declared tools to the model",
}


def _remark(report: LintReport, renderer: Renderer) -> None:
    """Things that are right but worth knowing."""
    remarks = {
        "the template is unverified: no tokenizer of its family was at hand to prove it": not renderer.verified,
        f"{report.unended:,} turns have no end marker in this template: the model does not learn to stop there": report.unended,
        f"{report.merged:,} turns begin or end with white space that shares a token with the template": report.merged,
        f"{report.truncated:,} rows are cut at data.max_length": report.truncated,
        **{f"the template leaves out {name} of {count:,} assistant turns, wholly or in part": count for name, count in report.left_out.items()},
    }
    report.notes += [text for text, applies in remarks.items() if applies]
    for name, count in report.remarks.items():
        said = _REMARKS.get(name) or f"the template does not write the text of a message of role {name.partition('_')[0]}"
        report.notes.append(f"{count:,} rows: {said}")


def _sample(renderer: Renderer, name: str, rendered: Rendered, max_length: int | None) -> Sample:
    control, pieces = renderer.encoder.control_ids, []
    marked = [(i, s, i in control) for i, s in zip(rendered.ids[:max_length], rendered.supervised[:max_length], strict=True)]
    for (learned, special), group in groupby(marked, key=lambda item: item[1:]):
        pieces.append((_decode(renderer, [i for i, _, _ in group]), learned, special))
    return Sample(name, tuple(pieces), len(marked), sum(s for _, s, _ in marked))


# --- before a run -------------------------------------------------------------------------------------------------------------------------


def preflight(renderer: Renderer, files: Sequence[Path], *, max_length: int | None = None, rows: int = PREFLIGHT_ROWS) -> LintReport:
    """Check the first rows of a run's data before anything is tokenised, and say what is worth knowing (that something is learned at all, the tokenising of every row checks).

    Raises:
        SopError: where something else than the assistant's text would be learned (exit 3).
    """
    report = check(renderer, islice(rows_of(files), rows), max_length=max_length)
    for remark in report.notes:
        console.note(f"first {report.total:,} rows: {remark}")
    return report.require() if report.unproven else report


def rows_of(files: Sequence[Path]) -> Iterator[dict[str, Any] | None]:
    """The rows of some files, each with its source; None for a line that could not be read."""
    from ..data.records import read

    for record in read(files):
        if record.row is None:
            yield None
        else:
            yield record.row if "_source" in record.row else {**record.row, "_source": f"{Path(record.file).name}:{record.line}"}
