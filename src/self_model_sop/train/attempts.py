"""Out of memory, wherever it happens: the cheapest fixes in words, or (auto_batch) the same training in smaller pieces."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .. import errors
from ..artifact import write_atomic
from ..console import note
from ..errors import SopError
from . import ranks
from .settings import TrainConfig

C = TypeVar("C", bound=TrainConfig)
T = TypeVar("T")
_BATCH, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


class OutOfMemory(SopError):
    """The machine's or the GPU's memory is too small for the run as it is set."""


def fitting(config: C, work: Path, attempt: Callable[[C], T]) -> T:
    """`attempt(config)`; with `auto_batch`, again with half the batch and twice the accumulation until it fits. What fitted is remembered in `work`.

    Raises:
        OutOfMemory: exit code 4, with the three cheapest fixes.
    """
    memory = work / ".batch.json"
    if memory.is_file():
        config = _with(config, json.loads(memory.read_text(encoding="utf-8")))
    while True:
        try:
            with guarded(config):
                return attempt(config)
        except OutOfMemory as error:
            smaller = halved(config.training_args)
            if not config.auto_batch or smaller is None or ranks.world() > 1:  # one rank alone cannot start again
                raise
            note(f"{error.what}; auto_batch: {_BATCH} {smaller[_BATCH]}, {_ACCUMULATION} {smaller[_ACCUMULATION]} (the same effective batch)")
        _free()
        config = _with(config, smaller)
        write_atomic(memory, json.dumps(smaller))


def halved(arguments: Mapping[str, Any]) -> dict[str, int] | None:
    """Half the batch and twice the accumulation (an odd batch goes to single rows); None where the batch is one row already."""
    batch, steps = int(arguments.get(_BATCH, 8)), int(arguments.get(_ACCUMULATION, 1))
    if batch == 1:
        return None
    return {_BATCH: batch // 2, _ACCUMULATION: steps * 2} if batch % 2 == 0 else {_BATCH: 1, _ACCUMULATION: steps * batch}


def _with(config: C, arguments: Mapping[str, int]) -> C:
    return dataclasses.replace(config, training_args={**config.training_args, **arguments})


@contextlib.contextmanager
def guarded(config: TrainConfig) -> Iterator[None]:
    """Out of memory on either device as one error with the cheapest fixes first."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text):
            raise
        raise OutOfMemory(f"out of memory: {text.splitlines()[0] if text else 'allocation failed'}", fix="\n       ".join(fixes(config)[:3]), code=errors.ENVIRONMENT) from error


def fixes(config: TrainConfig) -> list[str]:
    """What helps, the cheapest first."""
    smaller = halved(config.training_args)
    found = []
    if smaller:
        found.append(f"training_args.{_BATCH}={smaller[_BATCH]} training_args.{_ACCUMULATION}={smaller[_ACCUMULATION]} (the same result; auto_batch=true does it by itself)")
    if not config.training_args.get("gradient_checkpointing") and not config.training_args.get("activation_checkpointing"):
        found.append("training_args.gradient_checkpointing=true (about 30 % slower, a fraction of the activations)")
    peft = getattr(config, "peft", None)
    if peft is not None and not peft.enabled:
        found.append("peft.enabled=true (gradients and optimizer states for the adapter only)")
    key, length = config.sequence_length
    found.append(f"{key}={length // 2} (shorter sequences; now {length:,} tokens)")
    return [*found, "a smaller model"]


def _free() -> None:
    """Drop what the failed attempt still holds."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
