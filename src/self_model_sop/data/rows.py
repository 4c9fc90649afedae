"""One row through reading, cleaning, personal data and filters: what comes out is kept, dropped or quarantined, with its reason.

Everything here depends on the row alone, so that rows can be worked on in any number of processes with the same result.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import filters, pii
from .batch import Batch
from .clean import CleanConfig, cleaner, unclean
from .decontaminate import Choice, Overlap
from .dedup_key import DedupKeyConfig, compared, programs_too
from .filters import FilterConfig, PartConfig
from .fold import keys_of
from .formats import DIALOGUE_KEYS, Row, RowError, detect, map_texts, missing_part, text_key, to_messages, to_preference, to_text, tools_of
from .perplexity import PerplexityFilter, level
from .records import dumps, parse_object
from .rl import RLConfig, to_rl

_PROGRAM_KEYS = frozenset({"tools", "functions", *DIALOGUE_KEYS})
SHOWN = 200  # characters of a row in reports
_WHOLE = DedupKeyConfig()
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
    perplexity: float | None = None  # of a text dropped for it


@dataclass
class Tally:
    """What a block saw besides its outcomes."""

    formats: Counter[tuple[int, str]] = field(default_factory=Counter)
    pii: Counter[str] = field(default_factory=Counter)
    perplexity: Counter[str] = field(default_factory=Counter)  # judged texts by level
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
    dedup_key: DedupKeyConfig = DedupKeyConfig()
    perplexity: PerplexityFilter | None = None
    rl: RLConfig | None = None  # preference data: rows that only serve as prompts are welcome too

    def source(self, item: Item, piece: int = 0) -> str:
        """`<file>:<line>`, and `#<piece>` for the second and later pieces of a split document."""
        return f"{self.names[item.file]}:{item.line}" + (f"#{piece}" if piece else "")


class _Open:
    """A readable row while its block is worked on: `texts` are its natural-language texts, before and after cleaning."""

    __slots__ = ("changed", "first", "hits", "item", "kind", "number", "pretrain", "programs", "row")

    def __init__(self, item: Item, row: Row, kind: str | None, pretrain: bool) -> None:
        self.item, self.row, self.kind, self.pretrain = item, row, kind, pretrain
        self.first = self.number = 0  # its texts in the list of the block
        self.programs = self.changed = False
        self.hits: Counter[str] | None = None


class _Piece(NamedTuple):
    """A row, or one piece of a split document, that the filters decide about."""

    of: _Open
    number: int
    row: Row
    text: str


class Judge:
    """Applies the rules to rows, many at once: most rows need little, and that is found out for all of them together."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._clean = {kind: cleaner(rules.clean, pretrain=kind) for kind in (True, False)}
        self._overlap = Overlap(rules.items) if rules.items else None
        self.tally = Tally()

    def row(self, item: Item) -> list[Outcome]:
        """The outcomes of one row; more than one where a long document is split."""
        return self.block([item])[0]

    def block(self, items: Sequence[Item]) -> tuple[list[Outcome], Tally]:
        """The outcomes of a block in its order, and its tally."""
        self.tally = Tally()
        read = [self._read(item) for item in items]
        rows = [r for r in read if isinstance(r, _Open)]
        texts = self._cleaned(rows)
        closed: list[Outcome | list[_Piece]] = [r if isinstance(r, Outcome) else self._pieces(r, texts) for r in read]
        pieces = [piece for c in closed if isinstance(c, list) for piece in c]
        decided = iter(self._decide(pieces))
        out: list[Outcome] = []
        for c in closed:
            out += [c] if isinstance(c, Outcome) else [next(decided) for _ in c]
        return out, self.tally

    # reading

    def _read(self, item: Item) -> _Open | Outcome:
        row, error = (item.content, item.error) if not isinstance(item.content, str) else parse_object(item.content)
        if error or not isinstance(row, dict):
            return self._bad(item, error or "not_an_object", item.raw or str(item.content))
        row = self._renamed(row)
        kind, fields = detect(row), bool(self.rules.text_fields)
        if kind is None and not fields:
            return self._unreadable(item, row, RowError((self.rules.rl and missing_part(row)) or "unknown_format"))
        return _Open(item, row, kind, fields or kind == "text")

    def _renamed(self, row: Row) -> Row:
        return {self.rules.columns.get(k, k): v for k, v in row.items()} if self.rules.columns else row

    def _unreadable(self, item: Item, row: Row, wrong: RowError) -> Outcome:
        try:
            shown = dumps(row)
        except ValueError:  # what JSON cannot say: infinite numbers, bytes in a table
            return self._bad(item, "not_json", str(row))
        if wrong.reason in DROPPED or (self.rules.rl and wrong.reason in INCOMPLETE):
            return self._out(item, 0, wrong.reason, shown)
        return self._bad(item, wrong.reason, shown)

    def _bad(self, item: Item, reason: str, raw: str) -> Outcome:
        return Outcome(item.file, item.line, 0, reason, True, self._shown(raw))

    def _out(self, item: Item, piece: int, reason: str, text: str) -> Outcome:
        return Outcome(item.file, item.line, piece, reason, False, self._shown(text))

    def _shown(self, text: str) -> str:
        """The start of a text for a report, without personal data."""
        text = text[:SHOWN].replace("\r", "").replace("\0", "\N{SYMBOL FOR NULL}")
        return text if self.rules.pii == "keep" else pii.mask(text, self.rules.pii_rules)[0]

    # cleaning

    def _cleaned(self, rows: Sequence[_Open]) -> list[str]:
        """The natural-language texts of all rows, clean and (where that is asked for) masked."""
        texts: list[str] = []
        for r in rows:
            r.first = len(texts)
            self._collect(r, texts)
            r.number = len(texts) - r.first
        owner = [r for r in rows for _ in range(r.number)]
        for kind in (True, False):
            self._clean_some([i for i, r in enumerate(owner) if r.pretrain is kind], texts, owner, kind)
        if self.rules.pii != "keep":
            for i, (masked, hits) in pii.mask_batch(Batch(texts), self.rules.pii_rules).items():
                self._hits(owner[i]).update(hits)
                if self.rules.pii == "mask":
                    texts[i] = masked
                    owner[i].changed = True
        return texts

    def _collect(self, r: _Open, texts: list[str]) -> None:
        if r.kind == "text" and not self.rules.text_fields and isinstance(text := r.row[text_key(r.row) or "text"], str) and "history" not in r.row:
            texts.append(text)
            return

        def take(text: str) -> str:
            texts.append(text)
            return text

        def program(data: Any) -> Any:
            r.programs = True
            return data

        map_texts(r.row, take, self.rules.text_fields, programs=program, kind=r.kind)

    def _clean_some(self, which: Sequence[int], texts: list[str], owner: Sequence[_Open], pretrain: bool) -> None:
        clean = self._clean[pretrain]
        for at in unclean(Batch([texts[i] for i in which]), self.rules.clean, pretrain=pretrain).nonzero()[0].tolist():
            i = which[at]
            text = clean(texts[i])
            if text != texts[i]:
                texts[i] = text
                owner[i].changed = True

    @staticmethod
    def _hits(r: _Open) -> Counter[str]:
        if r.hits is None:
            r.hits = Counter()
        return r.hits

    def _one_program(self, r: _Open, data: Any) -> Any:
        """Data of a tool call or result: never cleaned, but personal data in it is personal data."""
        if self.rules.pii == "keep":
            return data
        masked = pii.mask_data(data, self.rules.pii_rules, self._hits(r))
        return masked if self.rules.pii == "mask" else data

    # structure

    def _pieces(self, r: _Open, texts: Sequence[str]) -> list[_Piece] | Outcome:
        try:
            return self._readable(r, texts)
        except RowError as wrong:
            return self._unreadable(r.item, r.row, wrong)
        except ValueError:
            return self._bad(r.item, "not_json", str(r.row))

    def _readable(self, r: _Open, texts: Sequence[str]) -> list[_Piece] | Outcome:
        fields, row = self.rules.text_fields, r.row
        if r.changed or r.programs:
            new = iter(texts[r.first : r.first + r.number])
            row = map_texts(row, lambda _: next(new), fields, programs=lambda data: self._one_program(r, data), kind=r.kind)
        text = to_text(row, fields, r.kind)
        self.tally.formats[r.item.file, r.kind or "text"] += 1
        self.tally.changed += r.changed
        self.tally.characters += len(text)
        if r.hits:
            self.tally.pii.update(r.hits)
        if fields:
            row = {**row, "text": text}
        if r.hits and self.rules.pii == "drop":
            return self._out(r.item, 0, "personal_data", text)
        reason = self._structure(row, r.kind)
        if reason:
            return self._out(r.item, 0, reason, text)
        if not r.pretrain or not self.rules.split_long or len(text) <= self.rules.max_chars:
            return [_Piece(r, 0, row, text)]
        key = "text" if fields else text_key(row) or "text"
        return [_Piece(r, n, {**row, key: piece}, piece) for n, piece in enumerate(split_text(text, self.rules.max_chars, self.rules.min_chars))]

    def _structure(self, row: Row, kind: str | None) -> str | None:
        """Faults of dialogues and preferences; rows of another kind than their set holds are errors."""
        rules, name = self.rules, self.rules.set_name
        if rules.rl and kind != "preference":
            return self._prompt(row, rules.rl)
        if name == "reward" or (kind == "preference" and name not in ("pretrain", "finetune")):
            return filters.preference(*to_preference(row), rules.parts)
        if name == "finetune" or (name != "pretrain" and kind in ("alpaca", "io", "sharegpt", "messages")):
            tools_of(row)
            messages = to_messages(row, kind)
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

    # filters

    def _decide(self, pieces: Sequence[_Piece]) -> list[Outcome]:
        reasons: list[str | None] = [self._length(p.text) for p in pieces]
        fitting = [i for i, reason in enumerate(reasons) if reason is None]
        some = [pieces[i] for i in fitting]
        batch = Batch([p.text for p in some])
        for i, reason in zip(fitting, self._reasons(some, batch), strict=True):
            reasons[i] = reason
        if self._overlap:
            left = [i for i, reason in enumerate(reasons) if reason is None]
            for i, item in zip(left, self._overlap.find(pieces[i].text for i in left), strict=True):
                reasons[i] = None if item is None else "contaminated"
        high = self._unusual(pieces, reasons)
        keys, texts = self._keys(some, batch)
        key = dict(zip(fitting, zip(keys, texts, strict=True), strict=True))
        return [self._outcome(p, reason, *key.get(i, (b"", p.text)), high.get(i)) for i, (p, reason) in enumerate(zip(pieces, reasons, strict=True))]

    def _unusual(self, pieces: Sequence[_Piece], reasons: list[str | None]) -> dict[int, float]:
        """Mark pretraining texts of a high perplexity; returns those perplexities."""
        if self.rules.perplexity is None:
            return {}
        left = [i for i, reason in enumerate(reasons) if reason is None and pieces[i].of.pretrain]
        found = {}
        for i, value in zip(left, self.rules.perplexity.judge([pieces[i].text for i in left]), strict=True):
            if value is not None:
                self.tally.perplexity[level(value)] += 1
                if value > self.rules.perplexity.limit:
                    reasons[i], found[i] = "high_perplexity", value
        return found

    def _keys(self, pieces: Sequence[_Piece], batch: Batch) -> tuple[list[bytes], list[str]]:
        """The key of each piece for exact duplicates, and its text for near ones. `batch`: the whole texts."""
        config = self.rules.dedup_key
        declared = [compared(p.row, p.of.kind, config) for p in pieces] if config != _WHOLE else []
        texts = [p.text if text is None else text for p, text in zip(pieces, declared, strict=True)] if any(declared) else list(batch.texts)
        exact = [_programs(p.row) if programs_too(p.of.kind, config) else b"" for p in pieces]
        batch = Batch(texts) if any(declared) else batch
        return keys_of(batch.codes, batch.ends, exact), texts

    def _length(self, text: str) -> str | None:
        return "too_short" if len(text) < self.rules.min_chars else "too_long" if len(text) > self.rules.max_chars else None

    def _outcome(self, piece: _Piece, reason: str | None, key: bytes, text: str, perplexity: float | None) -> Outcome:
        item = piece.of.item
        if reason:
            return self._out(item, piece.number, reason, piece.text)._replace(perplexity=perplexity)
        row = piece.row
        row.pop("_source", None)
        row["_source"] = self.rules.source(item, piece.number)
        try:
            line = dumps(row)
        except ValueError:
            return self._bad(item, "not_json", str(row))
        return Outcome(item.file, item.line, piece.number, None, False, text if self.rules.want_text else "", line, key)

    def _reasons(self, pieces: Sequence[_Piece], batch: Batch) -> list[str | None]:
        """Why each piece is dropped, or None."""
        rules, config = self.rules, self.rules.filters
        counts = filters.counts_of(batch)
        notices = [phrase for phrase in config.boilerplate if phrase in batch.joined] if (batch.lengths < filters.NOTICE).any() else []
        repeats = filters.may_repeat(batch, config.repetition) if config.repetition.enabled and any(p.of.pretrain for p in pieces) else None
        out: list[str | None] = []
        for i, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
            text = piece.text
            reason = filters.han_ratio(count, config) or filters.language(text, count, config)
            if reason is None and piece.of.pretrain:
                lines = [line for raw in text.split("\n") if (line := raw.strip())] if "\n" in text else [text]
                reason = filters.boilerplate(text, notices) or filters.symbols(count, config) or filters.line_shapes(lines, config)
                if reason is None and repeats is not None and (len(lines) > 1 or repeats[i]):
                    codes = batch.codes[batch.starts[i] : batch.ends[i]]
                    reason = filters.repetition(codes, lines, config.repetition, ngrams=bool(repeats[i]))
            out.append(reason or (filters.sentiment(text) if rules.sentiment else None))
        return out


def _programs(row: Row) -> bytes:
    """What must be equal in exact duplicates beside the folded text: tool calls and tool declarations."""
    if _PROGRAM_KEYS.isdisjoint(row):
        return b""
    programs = [row[name] for name in ("tools", "functions") if row.get(name)]
    for name in DIALOGUE_KEYS:
        turns = row.get(name)
        programs += [t for t in turns if isinstance(t, dict) and (t.get("tool_calls") or t.get("from") == "function_call")] if isinstance(turns, list) else []
    return json.dumps(programs, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") if programs else b""


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
