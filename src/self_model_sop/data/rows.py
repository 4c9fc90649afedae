"""One row through reading, cleaning, personal data and filters: what comes out is kept, dropped or quarantined, with its reason.

Everything here depends on the row alone, so that rows can be worked on in any number of processes with the same result.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import filters, pii
from .characters import codepoints
from .clean import CleanConfig, cleaner
from .decontaminate import Choice, Overlap
from .filters import FilterConfig, PartConfig
from .fold import key_of
from .formats import DIALOGUE_KEYS, Row, RowError, detect, map_texts, missing_part, text_key, to_messages, to_preference, to_text, tools_of
from .records import dumps, parse_object
from .rl import RLConfig, to_rl

SHOWN = 200  # characters of a row in reports
DROPPED = frozenset({"unknown_role"})  # read errors that say something about the content, not about the file
INCOMPLETE = frozenset({"no_prompt", "no_answer", "no_chosen", "no_rejected", "empty_chosen", "empty_rejected"})  # the same of preference data


class Item(NamedTuple):
    """A record on its way: its file's number, its line, and what was read (JSON text, a row, or an error)."""

    file: int
    line: int
    content: str | Row | None
    error: str | None
    raw: str


class Outcome(NamedTuple):
    """What became of a row, or of one piece of it. `reason` is None where it is kept; `fault` marks a row that could not be read."""

    file: int
    line: int
    piece: int
    reason: str | None
    fault: bool
    text: str  # kept: the whole text, where near-duplicates are looked for; else the start of the row
    row: str = ""  # JSON
    key: bytes = b""


@dataclass
class Tally:
    """What a block saw besides its outcomes."""

    formats: Counter[tuple[int, str]] = field(default_factory=Counter)
    pii: Counter[str] = field(default_factory=Counter)
    changed: int = 0
    characters: int = 0


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Everything that decides about a row; built from the config, sent to workers."""

    set_name: str
    min_chars: int
    max_chars: int
    max_turns: int | None
    split_long: bool
    sentiment: bool
    text_fields: tuple[str, ...]
    columns: dict[str, str]
    clean: CleanConfig
    filters: FilterConfig
    pii: str
    pii_rules: tuple[str, ...]
    names: tuple[str, ...]  # file number -> name in `_source`
    want_text: bool
    items: tuple[str | Choice, ...] = ()  # evaluation items that no row may overlap
    parts: PartConfig = PartConfig()
    rl: RLConfig | None = None  # preference data: rows that only serve as prompts are welcome too

    def source(self, item: Item, piece: int = 0) -> str:
        """`<file>:<line>`, and `#<piece>` for the second and later pieces of a split document."""
        return f"{self.names[item.file]}:{item.line}" + (f"#{piece}" if piece else "")


class Judge:
    """Applies the rules to rows, one after the other."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._clean = {kind: cleaner(rules.clean, pretrain=kind) for kind in (True, False)}
        self._overlap = Overlap(rules.items) if rules.items else None
        self.tally = Tally()

    def block(self, items: Sequence[Item]) -> tuple[list[Outcome], Tally]:
        """The outcomes of a block in its order, and its tally."""
        self.tally = Tally()
        return [outcome for item in items for outcome in self.row(item)], self.tally

    def row(self, item: Item) -> list[Outcome]:
        """The outcomes of one row; more than one where a long document is split."""
        row, error = (item.content, item.error) if not isinstance(item.content, str) else parse_object(item.content)
        if error or not isinstance(row, dict):
            return [self._bad(item, error or "not_an_object", item.raw)]
        try:
            return self._readable(item, self._renamed(row))
        except RowError as wrong:
            shown = dumps(row)
            if wrong.reason in DROPPED or (self.rules.rl and wrong.reason in INCOMPLETE):
                return [self._out(item, 0, wrong.reason, shown)]
            return [self._bad(item, wrong.reason, shown)]
        except ValueError:  # what JSON cannot say: infinite numbers, bytes in a table
            return [self._bad(item, "not_json", str(row))]

    def _bad(self, item: Item, reason: str, raw: str) -> Outcome:
        return Outcome(item.file, item.line, 0, reason, True, self._shown(raw))

    def _out(self, item: Item, piece: int, reason: str, text: str) -> Outcome:
        return Outcome(item.file, item.line, piece, reason, False, self._shown(text))

    def _shown(self, text: str) -> str:
        """The start of a text for a report, without personal data."""
        text = text[:SHOWN].replace("\r", "").replace("\0", "\N{SYMBOL FOR NULL}")
        return text if self.rules.pii == "keep" else pii.mask(text, self.rules.pii_rules)[0]

    def _renamed(self, row: Row) -> Row:
        return {self.rules.columns.get(k, k): v for k, v in row.items()} if self.rules.columns else row

    def _readable(self, item: Item, row: Row) -> list[Outcome]:
        kind = detect(row)
        fields = self.rules.text_fields
        pretrain = bool(fields) or kind == "text"
        if kind is None and not fields:
            raise RowError((self.rules.rl and missing_part(row)) or "unknown_format")
        self.tally.formats[item.file, kind or "text"] += 1
        before = to_text(row, fields)
        hits: Counter[str] = Counter()
        row = map_texts(row, lambda text: self._one_text(text, self._clean[pretrain], hits), fields, programs=lambda data: self._one_program(data, hits))
        text = to_text(row, fields)
        self.tally.changed += text != before
        self.tally.characters += len(text)
        self.tally.pii += hits
        if fields:
            row = {**row, "text": text}
        if hits and self.rules.pii == "drop":
            return [self._out(item, 0, "personal_data", text)]
        reason = self._structure(row, kind)
        if reason:
            return [self._out(item, 0, reason, text)]
        pieces = self._pieces(text) if pretrain else [text]
        outcomes = []
        for n, piece in enumerate(pieces):
            part = row if len(pieces) == 1 else {**row, ("text" if fields else text_key(row) or "text"): piece}
            outcomes.append(self._decide(item, n, part, piece, pretrain))
        return outcomes

    def _one_text(self, text: str, clean: Any, hits: Counter[str]) -> str:
        text = clean(text)
        if self.rules.pii == "keep":
            return str(text)
        masked, found = pii.mask(text, self.rules.pii_rules)
        hits.update(found)
        return masked if self.rules.pii == "mask" else text

    def _one_program(self, data: Any, hits: Counter[str]) -> Any:
        """Data of a tool call or result: never cleaned, but personal data in it is personal data."""
        if self.rules.pii == "keep":
            return data
        masked = pii.mask_data(data, self.rules.pii_rules, hits)
        return masked if self.rules.pii == "mask" else data

    def _structure(self, row: Row, kind: str | None) -> str | None:
        """Faults of dialogues and preferences; rows of another kind than their set holds are errors."""
        rules, name = self.rules, self.rules.set_name
        if rules.rl and kind != "preference":
            return self._prompt(row, rules.rl)
        if name == "reward" or (kind == "preference" and name not in ("pretrain", "finetune")):
            return filters.preference(*to_preference(row), rules.parts)
        if name == "finetune" or (name != "pretrain" and kind in ("alpaca", "io", "sharegpt", "messages")):
            tools_of(row)
            messages = to_messages(row)
            return filters.dialogue(messages, rules.max_turns) or filters.refusal(messages, rules.filters)
        return None

    def _prompt(self, row: Row, config: RLConfig) -> str | None:
        """Why a row without a preference is no prompt either."""
        if not config.enabled:
            return "not_a_preference"
        try:
            to_rl(row, config)
        except RowError as wrong:
            return wrong.reason
        return None

    def _pieces(self, text: str) -> list[str]:
        return split_text(text, self.rules.max_chars, self.rules.min_chars) if self.rules.split_long and len(text) > self.rules.max_chars else [text]

    def _decide(self, item: Item, piece: int, row: Row, text: str, pretrain: bool) -> Outcome:
        codes = codepoints(text)
        reason = self._quality(text, codes, pretrain)
        if reason is None and self._overlap and next(self._overlap.find([text])) is not None:
            reason = "contaminated"
        if reason:
            return self._out(item, piece, reason, text)
        row.pop("_source", None)
        row["_source"] = self.rules.source(item, piece)
        return Outcome(item.file, item.line, piece, None, False, text if self.rules.want_text else "", dumps(row), _key(row, codes))

    def _quality(self, text: str, codes: Any, pretrain: bool) -> str | None:
        rules, config = self.rules, self.rules.filters
        if len(text) < rules.min_chars:
            return "too_short"
        if len(text) > rules.max_chars:
            return "too_long"
        count = filters.counts(codes)
        reason = filters.han_ratio(count, config) or filters.language(text, count, config)
        if reason is None and pretrain:
            lines = [line for raw in text.split("\n") if (line := raw.strip())]
            reason = (
                filters.boilerplate(text, config)
                or filters.symbols(count, config)
                or filters.line_shapes(lines, config)
                or filters.repetition(codes, lines, config.repetition)
            )
        return reason or (filters.sentiment(text) if rules.sentiment else None)


def _key(row: Row, codes: Any) -> bytes:
    """What exact duplicates share: the folded text, and all that is no text (tool calls, tool declarations), which must be equal."""
    programs = [row[name] for name in ("tools", "functions") if row.get(name)]
    for name in DIALOGUE_KEYS:
        turns = row.get(name)
        programs += [t for t in turns if isinstance(t, dict) and (t.get("tool_calls") or t.get("from") == "function_call")] if isinstance(turns, list) else []
    return key_of(codes, dumps({"": programs}).encode() if programs else b"")


def split_text(text: str, most: int, least: int) -> list[str]:
    """A long text in pieces of at most `most` characters, cut at the largest border there is: paragraph, line, sentence, else anywhere.

    Nothing is lost but the whitespace at the cuts; a last piece shorter than `least` joins the one before where it fits.
    """
    pieces: list[str] = []
    rest = text
    while len(rest) > most:
        cut = next((at for at in (_last(rest, mark, most) for mark in ("\n\n", "\n", "。", "！", "？", ". ")) if at > most // 4), most)
        pieces.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    if rest and len(rest) < least and pieces and len(pieces[-1]) + len(rest) + 1 <= most:
        pieces[-1] += "\n" + rest
    elif rest:
        pieces.append(rest)
    return pieces


def _last(text: str, mark: str, most: int) -> int:
    """Where the last `mark` within `most` characters ends, or -1."""
    at = text.rfind(mark, 0, most)
    return at + len(mark) if at >= 0 else -1


# --- in worker processes ------------------------------------------------------------------------------------------------------------------

_judge: Judge | None = None


def start_worker(rules: Rules) -> None:
    """Build the judge of a worker process, which ends with its parent: a killed parent cannot tell it to."""
    global _judge
    _judge = Judge(rules)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (multiprocessing.connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def work(items: Sequence[Item]) -> tuple[list[Outcome], Tally]:
    """A block, in a worker process."""
    assert _judge is not None
    return _judge.block(items)
