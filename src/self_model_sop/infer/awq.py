"""A trained model -> 4 bits by AWQ (Lin et al. 2023, arXiv 2306.00978), through gptqmodel; loads in transformers and vLLM.

AWQ tries many scales for every group of layers, each time running the layers again on the calibration text: work for a GPU. Without one it is refused unless it is
asked for by name (`device=cpu`); then the same search runs, slowly. Packing rounded weights into AWQ's file format would be quick, and would not be AWQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import errors
from ..artifact import Target
from ..config import option
from ..errors import SopError
from ..stage import Artifact, Run, Stage, stage_main
from . import quantize


@dataclass(frozen=True, kw_only=True)
class Config(quantize.Config):
    """`config/infer_config/awq.yaml`."""

    output_path: Path = option(Path("exports/model-awq"), "folder of the quantised model", path="output", flag="--output_path")


def build(run: Run[Config]) -> dict[str, Any]:
    """Calibrate, quantise, reload, compare; returns the stats.

    Raises:
        SopError: exit 3 where the result answers too differently; exit 4 without a GPU (unless device=cpu), or where gptqmodel is missing.
    """
    need_gpu(run.config)
    return quantize.build(run, _quantise)


def need_gpu(config: quantize.Config) -> None:
    """Refuse to begin hours of work that nobody asked for (exit 4)."""
    if config.device == "auto" and quantize.device_of(config) == "cpu":
        raise SopError(
            "AWQ searches the scales of every layer by running it again and again on the calibration text, and there is no CUDA GPU here", where="device",
            fix="run it on a machine with a GPU; or sop infer gptq, which needs none; or --device cpu: the same search, many times slower", code=errors.ENVIRONMENT,
        )  # fmt: skip


def _quantise(config: quantize.Config, folder: Path, samples: list[dict[str, Any]], tokenizer: Any, device: str) -> list[dict[str, Any]]:
    """With zero points, as AWQ's paper and vLLM's kernels have them; on a CPU by the kernel of plain torch operations, the only one that runs there."""
    from gptqmodel import BACKEND, AWQConfig, GPTQModel

    settings = AWQConfig(bits=config.bits, group_size=config.group_size, sym=False, offload_to_disk=False, fallback=None)
    model = GPTQModel.load(str(config.model_path), settings, device=device, dtype=quantize.half(config.model_path, device), trust_remote_code=False)
    model.quantize(samples, batch_size=1, tokenizer=tokenizer, backend=BACKEND.AWQ_TORCH if device == "cpu" else BACKEND.AUTO)
    model.save(str(folder))
    return list(model.quant_log)


STAGE = Stage(
    name="infer.awq", version=1, config=Config, output=lambda c: Target(c.output_path), build=build, apart=True, inputs=quantize.inputs,
    preflight=lambda c: list(quantize.problems(c, (4,))), plan=quantize.plan, summary=quantize.summary, next=lambda c: f"sop infer vllm model={c.output_path}",
)  # fmt: skip


def run(config: Config) -> Artifact:
    """Quantise (or find it up to date).

    Raises:
        SopError: with the exit code of the process.
    """
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop infer awq`"""
    return stage_main(STAGE, argv)
