"""What a run will take, computed from config.json and file sizes without loading anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .adapters import PeftSettings
from .settings import TrainConfig


def lines(config: TrainConfig, *, peft: PeftSettings | None, files: Sequence[Path], length: int) -> list[str]:
    """The plan in words."""
    return [f"data: {', '.join(map(str, files))}", f"sequences of {length:,} tokens"]
