"""Prompts with what their answers are judged by, for rollouts. Every row is counted: kept, or dropped with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import errors
from ..console import warn
from ..data import records
from ..data.formats import RowError
from ..data.rl import RLConfig, to_rl
from ..errors import SopError
from . import rewards
from .rewards import Part, Unscored


@dataclass(frozen=True)
class Prompt:
    """One prompt: its token ids (empty where none were asked for), the row that reward functions read, and where it came from."""

    ids: list[int]
    row: dict[str, Any]
    source: str


@dataclass
class Prompts:
    """The prompts of a file; `total = len(kept) + sum(dropped)`."""

    kept: list[Prompt] = field(default_factory=list)
    total: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.kept)

    def names(self, indices: Sequence[int]) -> list[str]:
        """Where prompts came from."""
        return [self.kept[i].source for i in indices]

    def spread(self, most: int) -> list[Prompt]:
        """At most so many of the prompts, evenly spread."""
        most = min(most, len(self.kept))
        return [self.kept[i * len(self.kept) // most] for i in range(most)]

    def counts(self) -> dict[str, Any]:
        """What a manifest shows."""
        return {"total": self.total, "kept": len(self.kept), "dropped": dict(sorted(self.dropped.items()))}


def read(path: Path, key: str, parts: Sequence[Part], renderer: Any = None, max_length: int | None = None) -> Prompts:
    """The prompts of a file (Parquet or JSONL; rows of verl's contract, or any with a question and its answer) that can be rendered and judged.

    Args:
        key: field that holds the chat messages.
        parts: each must be able to judge the ground truth; a row of which it cannot is dropped.
        renderer: gives the token ids; None: rows alone are read.
        max_length: tokens of a prompt; longer ones are dropped.

    Raises:
        SopError: exit 3 where no row is left.
    """
    found, reasons = Prompts(), []
    for source, row, reason in rows(path, key):
        found.total += 1
        prompt = None
        if row is not None:
            prompt, reason = _prompt(row, source, parts, renderer, max_length)
        if prompt is None:
            name, _, more = reason.partition(": ")
            found.dropped[name] += 1
            reasons.append(f"{source}: {name}{f' ({more})' if more else ''}")
        else:
            found.kept.append(prompt)
    if reasons:
        told = ", ".join(f"{name} {n:,}" for name, n in found.dropped.most_common())
        warn(f"{path.name}: {len(reasons):,} of {found.total:,} prompts are left out ({told}); first: {reasons[0]}")
    if not found.kept:
        why = f"none of its {found.total:,} rows fits; first: {reasons[0]}" if reasons else "it has no rows"
        raise SopError(f"no prompt to learn from: {why}", where=str(path), fix="write prompts with `sop data preference`, and choose rewards that fit them", code=errors.DATA)
    return found


def rows(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any] | None, str]]:
    """(source, row for reward functions or None, reason) of every record of a file."""
    from .corpus import source_of

    for record in records.read(path):
        source = source_of(record)
        if record.row is None:
            yield source, None, str(record.error)
            continue
        row = {**record.row, "prompt": record.row[key]} if key in record.row else record.row
        try:
            made = to_rl(row, RLConfig())
        except RowError as wrong:
            yield source, None, wrong.reason
            continue
        extra = row.get("extra_info")
        yield source, {**made, "ground_truth": made["reward_model"]["ground_truth"], "extra_info": extra if isinstance(extra, dict) else {}}, ""


def _prompt(row: dict[str, Any], source: str, parts: Sequence[Part], renderer: Any, max_length: int | None) -> tuple[Prompt | None, str]:
    from .template import TemplateError

    ids: list[int] = []
    if renderer is not None:
        try:
            ids = renderer.prompt(row["prompt"])
        except TemplateError as error:
            return None, f"template: {error.what}"
        if max_length is not None and len(ids) > max_length:
            return None, f"prompt_too_long: {len(ids):,} tokens"
    try:
        rewards.each(parts, str(row["ground_truth"]), row)
    except Unscored as error:
        return None, f"cannot_be_judged: {error}"
    return Prompt(ids, row, source), ""
