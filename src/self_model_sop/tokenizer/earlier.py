"""Stages that stand on the artifacts of earlier ones, and make those first where they are absent or stale."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .. import console
from ..stage import Artifact, Stage
from .settings import TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerStage(Stage[TokenizerConfig]):
    """A stage of the tokenizer's chain.

    Args:
        earlier: config -> the stages it stands on, in order. They run first (an up-to-date one returns at once), so that each documented
            command works on a fresh checkout. What they leave below `work_dir` is theirs alone and is replaced where it is stale.
    """

    earlier: Callable[[TokenizerConfig], Iterable[Stage[TokenizerConfig]]] = lambda config: ()
    apart: bool = True  # loading a tokenizer loads torch, after which a pipeline could put nothing into a process of its own

    def run(self, config: TokenizerConfig, *, overwrite: bool = False, pipeline: str | None = None, again: bool = False) -> Artifact:
        for stage in self.earlier(config):
            done = stage.run(config, overwrite=True, pipeline=pipeline)
            if not done.skipped:
                console.note(f"{stage.name}: done in {console.human_seconds(done.manifest['seconds'])} -> {done.target}")
        return super().run(config, overwrite=overwrite, pipeline=pipeline, again=again)
