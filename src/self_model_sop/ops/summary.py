"""What a run led to, read from the manifests only: printed, and written as `summary.md` and `summary.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import console
from ..stage import Artifact

if TYPE_CHECKING:
    from .pipeline import Pipeline


def conclude(pipeline: Pipeline, done: Sequence[Artifact], seconds: float) -> None:
    """Print the summary of a finished pipeline."""
    total = sum(a.manifest["seconds"] for a in done)
    console.say(f"{pipeline.name}: {len(done)} stages, {console.human_seconds(total)} of work, this run {console.human_seconds(seconds)}")
