"""What source and export are compared on: conversations, passages, and lines that are hard to tokenise. Written for this; shipped with the package."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

_SEED = 20240917


@dataclass(frozen=True)
class Probes:
    """Conversations that end with a user's turn, passages, and lines for the tokenizers."""

    conversations: tuple[tuple[dict[str, Any], ...], ...]
    passages: tuple[str, ...]
    lines: tuple[str, ...]


def shipped(prompts: int, lines: int, words: Sequence[str] = ()) -> Probes:
    """The probe set that ships with the package: Chinese, medical, legal, English, code, numbers, mixed.

    Args:
        prompts: so many of its conversations.
        lines: so many lines mixed from its fragments and `words`, the same ones every time.
        words: more fragments, such as the texts of new tokens; each is a line of its own too.
    """
    stored = json.loads(resources.files(__package__).joinpath("probes.json").read_text(encoding="utf-8"))
    fragments = [*stored["fragments"], *words]
    draw = random.Random(_SEED)
    sentences = [part for text in stored["texts"] for part in text.replace("。", "。\n").split("\n") if part]
    mixed = ["".join(draw.choice(fragments if draw.random() < 0.8 else sentences) for _ in range(draw.randint(1, 9))) for _ in range(lines)]
    return Probes(tuple(tuple(c) for c in stored["conversations"][:prompts]), tuple(stored["texts"]), (*mixed, *words))
