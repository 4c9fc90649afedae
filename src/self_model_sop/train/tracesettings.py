"""`config/trace_config/<backend>.yaml`: the tracker's settings. No key ever lives there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import load, option


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """What a tracker needs besides its key, which comes from the environment alone."""

    project: str = option("self-model-sop", "project name; a stage's trace_project goes before it")
    mode: Literal["auto", "online", "offline"] = option("auto", "auto: online where the key is in the environment, else offline")
    log_dir: str = option("runs/trace", "where offline runs are written, relative to the project root")


def load_settings(backend: str, root: Path) -> TraceSettings:
    """The settings of a tracker; defaults where there is no file."""
    path = root / "config" / "trace_config" / f"{backend}.yaml"
    return load(TraceSettings, path if path.is_file() else None).config
