"""What of a dialogue or preference row deduplication compares: everything, or the parts that are declared (`process.dedup_key`)."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import option
from ..errors import nearest
from .formats import Message, Row, to_messages, to_preference

ROLES = ("system", "user", "assistant", "tool")
DIALOGUE = (*ROLES, "first_user", "last_user", "last_assistant")
PREFERENCE = ("prompt", "chosen", "rejected")
_DIALOGUES = frozenset({"alpaca", "io", "sharegpt", "messages", "rl"})


@dataclass(frozen=True, kw_only=True)
class DedupKeyConfig:
    """`process.dedup_key:` the parts of a row that are compared, for equal and for nearly equal rows, and that decide on which side of the split it falls."""

    dialogue: tuple[str, ...] = option(ROLES, f"turns of a dialogue, instruction or question row that are compared; known: {', '.join(DIALOGUE)}")
    preference: tuple[str, ...] = option(PREFERENCE, f"parts of a preference row that are compared; known: {', '.join(PREFERENCE)}")


def problems(config: DedupKeyConfig) -> list[tuple[str, str, str]]:
    """What cannot work: (key, what, fix)."""
    found = []
    for name, given, known in (("dialogue", config.dialogue, DIALOGUE), ("preference", config.preference, PREFERENCE)):
        if not given:
            found.append((name, "names no part", f"known: {', '.join(known)}; to turn deduplication off: process.dedup, process.near_dedup"))
        for part in given:
            if part not in known:
                near = nearest(part, known)
                found.append((name, f"unknown part {part!r}", f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"))
    return found


def compared(row: Row, kind: str | None, config: DedupKeyConfig) -> str | None:
    """The text of the declared parts of a readable row, or None where its whole text is compared: by default, where a row of its kind has no parts, or none of those declared."""
    if kind == "preference" and not set(PREFERENCE) <= set(config.preference):
        parts = dict(zip(PREFERENCE, to_preference(row), strict=True))
        return _text([m for name in PREFERENCE if name in config.preference for m in parts[name]])
    if kind in _DIALOGUES and not set(ROLES) <= set(config.dialogue):
        messages = to_messages(row, kind)
        chosen = {i for i, m in enumerate(messages) if m["role"] in config.dialogue}
        for name, role, at in (("first_user", "user", 0), ("last_user", "user", -1), ("last_assistant", "assistant", -1)):
            places = [i for i, m in enumerate(messages) if m["role"] == role]
            if name in config.dialogue and places:
                chosen.add(places[at])
        return _text([messages[i] for i in sorted(chosen)])
    return None


def programs_too(kind: str | None, config: DedupKeyConfig) -> bool:
    """Whether tool calls and declarations must be equal too: where the turns that hold them are compared."""
    return "prompt" in config.preference if kind == "preference" else kind not in _DIALOGUES or "assistant" in config.dialogue


def _text(messages: list[Message]) -> str | None:
    return "\n".join(m["content"] for m in messages if m["content"]) or None
