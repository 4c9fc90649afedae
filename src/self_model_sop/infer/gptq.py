"""A trained model -> 4 (or 8) bits by GPTQ (Frantar et al. 2022, arXiv 2210.17323), through gptqmodel, on a CPU or a GPU; loads in transformers and vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import Target
from ..config import option
from ..stage import Artifact, Run, Stage, stage_main
from . import quantize


@dataclass(frozen=True, kw_only=True)
class Config(quantize.Config):
    """`config/infer_config/gptq.yaml`."""

    output_path: Path = option(Path("exports/model-gptq"), "folder of the quantised model", path="output", flag="--output_path")


def build(run: Run[Config]) -> dict[str, Any]:
    """Calibrate, quantise, reload, compare; returns the stats.

    Raises:
        SopError: exit 3 where the result answers too differently; exit 4 where gptqmodel is missing.
    """
    return quantize.build(run, _quantise)


def _quantise(config: quantize.Config, folder: Path, samples: list[dict[str, Any]], tokenizer: Any, device: str) -> list[dict[str, Any]]:
    """Symmetric, columns in their order, no rounding where calibration is thin: vLLM's kernels read nothing else, and rounding is not the algorithm."""
    from gptqmodel import GPTQConfig, GPTQModel

    settings = GPTQConfig(bits=config.bits, group_size=config.group_size, sym=True, desc_act=False, offload_to_disk=False, fallback=None)
    model = GPTQModel.load(str(config.model_path), settings, device=device, dtype=quantize.half(config.model_path, device), trust_remote_code=False)
    model.quantize(samples, batch_size=1, tokenizer=tokenizer)
    model.save(str(folder))
    return list(model.quant_log)


STAGE = Stage(
    name="infer.gptq", version=1, config=Config, output=lambda c: Target(c.output_path), build=build, apart=True, inputs=quantize.inputs,
    preflight=lambda c: list(quantize.problems(c, (4, 8))), plan=quantize.plan, summary=quantize.summary, next=lambda c: f"sop infer vllm model={c.output_path}",
)  # fmt: skip


def run(config: Config) -> Artifact:
    """Quantise (or find it up to date).

    Raises:
        SopError: with the exit code of the process.
    """
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop infer gptq`"""
    return stage_main(STAGE, argv)
