"""Text in other scripts, written for this project: what an extension must not change, or whose changes it must report."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

NAMES = ("english", "code", "numbers", "japanese", "korean", "cyrillic", "emoji", "fullwidth", "mixed", "traditional")


@cache
def lines(name: str) -> tuple[str, ...]:
    """The lines of one text of the set, blank ones left out."""
    text = files(__package__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.split("\n") if line.strip())
