"""What models are measured on: documents, conversations and prompts out of files, the same ones for every model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..errors import DATA, SopError

T = TypeVar("T")


class Chosen(NamedTuple):
    """The items measured, how many there were, and why others could not be read (reason -> rows)."""

    items: list[Any]
    total: int
    unread: dict[str, int]


def documents(path: Path, text_fields: Sequence[str] = (), limit: int | None = None, max_chars: int | None = None) -> Chosen:
    """Texts of a file of any format (a .txt file: one document per line); with `limit` those with the smallest content hash, with `max_chars` the beginning of each."""
    from ..data.formats import to_text

    return _choose(path, lambda row: to_text(row, text_fields)[:max_chars], lambda text: text, limit, "texts")


def conversations(path: Path, limit: int | None = None, max_chars: int | None = None) -> Chosen:
    """Conversations (lists of messages) with an answer, out of a fine-tuning file, chosen in the same way; those longer than `max_chars` are left out: half an answer is none."""
    from ..data.formats import RowError, to_messages

    def answered(row: dict[str, Any]) -> list[dict[str, Any]]:
        messages = to_messages(row)
        if not any(m["role"] == "assistant" and (m.get("content") or m.get("tool_calls")) for m in messages):
            raise RowError("no_answer")
        if max_chars is not None and sum(len(str(m.get("content") or "")) for m in messages) > max_chars:
            raise RowError("longer_than_max_chars")
        return messages

    return _choose(path, answered, lambda messages: "\0".join(str(m.get("content")) for m in messages), limit, "conversations")


class Prompt(NamedTuple):
    """A question, and a reference answer where the file has one."""

    question: str
    reference: str | None = None


def prompts(given: Sequence[str], path: Path | None) -> list[Prompt]:
    """The prompts of the config, then those of a file: a line of text, or the first user turn of a row with the answer that follows it."""
    from ..data.formats import RowError, to_messages, to_text
    from ..data.records import read

    out = [Prompt(text) for text in given]
    for record in read(path) if path else ():
        if record.row is None:
            continue
        try:
            turns = [m for m in to_messages(record.row) if m["role"] != "system"]
            asked = next(i for i, m in enumerate(turns) if m["role"] == "user")
            answer = turns[asked + 1] if asked + 1 < len(turns) else None
            out.append(Prompt(turns[asked]["content"], answer["content"] or None if answer and answer["role"] == "assistant" else None))
        except (RowError, StopIteration):
            out.append(Prompt(to_text(record.row)))
    return out


def _choose(path: Path, take: Any, key: Any, limit: int | None, what: str) -> Chosen:
    from ..data.formats import RowError
    from ..data.records import read

    found: list[tuple[str, Any]] = []
    unread: Counter[str] = Counter()
    for record in read(path):
        if record.row is None:
            unread[record.error or "unreadable"] += 1
            continue
        try:
            item = take(record.row)
        except RowError as error:
            unread[error.reason] += 1
            continue
        if item:
            found.append((key(item), item))
        else:
            unread["empty"] += 1
    if not found:
        raise SopError(f"no {what} in this file", where=str(path), fix=f"reasons: {dict(unread)}" if unread else "the file is empty", code=DATA)
    total = len(found) + sum(unread.values())
    if limit is not None and limit < len(found):
        smallest = sorted(range(len(found)), key=lambda i: hashlib.sha256(found[i][0].encode("utf-8", "replace")).digest())[:limit]
        found = [found[i] for i in sorted(smallest)]
    return Chosen([item for _, item in found], total, dict(unread))
