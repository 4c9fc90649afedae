"""Which number format a run computes in, and why. The weights that are trained stay fp32."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from . import machine

Mode = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Precision:
    """`fp32`, `bf16` or `fp16` (the latter two: autocast), and the reason in words."""

    mode: Literal["fp32", "bf16", "fp16"]
    reason: str

    @property
    def flags(self) -> dict[str, bool]:
        """What transformers.TrainingArguments gets."""
        return {"fp16": self.mode == "fp16", "bf16": self.mode == "bf16"}

    def autocast(self) -> AbstractContextManager[Any]:
        """The same arithmetic outside the trainer, so that losses before and after it compare."""
        import torch

        if self.mode == "fp32":
            return nullcontext()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        scope: AbstractContextManager[Any] = torch.autocast(device, torch.bfloat16 if self.mode == "bf16" else torch.float16)
        return scope


def choose(wanted: Mode, training_args: Mapping[str, Any]) -> Precision:
    """The format for this machine. `wanted` goes before the documented flags `fp16` and `bf16` of training_args."""
    import torch

    flagged: Mode = "bf16" if training_args.get("bf16") else "fp16" if training_args.get("fp16") else "auto"
    asked = wanted if wanted != "auto" else flagged
    if training_args.get("use_cpu") or not torch.cuda.is_available():
        return _on_cpu(asked)
    name = torch.cuda.get_device_name(0)
    if asked == "fp16":
        return Precision("fp16", f"asked for; {name}")
    if asked == "fp32":
        return Precision("fp32", f"asked for; {name}")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision("bf16", f"{'asked for; ' if asked == 'bf16' else ''}{name} computes in it")
    return Precision("fp16", f"{name} has no bf16" + (", which was asked for" if asked == "bf16" else ""))


def _on_cpu(asked: Mode) -> Precision:
    unit = machine.cpu_bf16()
    if asked == "fp32":
        return Precision("fp32", "asked for")
    if asked == "bf16":
        return Precision("bf16", "asked for" + ("" if unit else "; this CPU has no instructions for it, fp32 is faster here"))
    fell_back = "fp16 was asked for, which a CPU does not train in; " if asked == "fp16" else ""
    if unit:
        return Precision("bf16", fell_back + f"this CPU multiplies bf16 matrices about twice as fast ({unit})")
    return Precision("fp32", fell_back + "this CPU has no instructions for bf16, which would be 2 to 3 times slower")
