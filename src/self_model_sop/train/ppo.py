"""PPO with a critic, by verl. TRL has no PPO any more; what it has instead is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import errors
from ..errors import SopError
from ..stage import Artifact, Run, Stage, stage_main
from . import grpo, rlhf
from .finish import disk
from .rlhf import RlhfConfig

_CHOICES = "write engine: verl (PPO on CUDA GPUs), or algorithm: grpo or rloo with `sop train grpo` (no critic; engine: trl, on one machine, CPUs too)"


def _preflight(config: RlhfConfig) -> list[rlhf.Finding]:
    if config.algorithm == "ppo" and config.engine == "trl":
        return [("engine", "TRL no longer has PPO", _CHOICES)]
    return grpo.findings(config, "ppo")


def build(run: Run[RlhfConfig]) -> dict[str, Any]:
    """Let verl do it in its own environment.

    Raises:
        SopError: on engine trl, which names the choices.
    """
    if run.config.engine != "verl":
        raise SopError("TRL no longer has PPO", where="engine", fix=_CHOICES, code=errors.USAGE)
    return grpo.build(run)


STAGE = Stage(
    name="train.ppo", version=1, config=RlhfConfig, output=RlhfConfig.target, build=build, disk=disk, inputs=grpo.inputs, preflight=_preflight, plan=grpo.plan, uses=grpo.USES,
    summary=grpo.summary, next=grpo.following, resumable=True, apart=True,
)  # fmt: skip


def run(config: RlhfConfig) -> Artifact:
    """Train with PPO (or find it up to date)."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop train ppo`"""
    return stage_main(STAGE, argv)
