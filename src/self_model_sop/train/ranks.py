"""One training on several processes (torchrun): rank 0 holds the lock, tokenises, writes and publishes; the others follow it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .. import errors
from ..stage import Stage, guarded, load_for, parse_arguments, stage_main

C = TypeVar("C")
T = TypeVar("T")


def world() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on rank 0, and outside a distributed run."""
    return os.environ.get("RANK", "0") == "0"


def main(stage: Stage[C], train: Callable[[C, Path], Any], argv: Sequence[str] | None) -> int:
    """The command line of a training stage: the whole stage on rank 0, only the training on the others."""
    if is_main():
        return stage_main(stage, argv)
    return guarded(lambda: _follow(stage, train, list(sys.argv[1:] if argv is None else argv)))


def _follow(stage: Stage[C], train: Callable[[C, Path], Any], argv: list[str]) -> int:
    args, settings = parse_arguments(stage, argv)
    config = load_for(stage, args.config, settings).config
    if args.dry_run or not (args.overwrite or stage.why(config)):
        return errors.OK
    from ..hub import configure

    configure(config)
    work = share(None)
    if work is not None:
        train(config, Path(work))
    return errors.OK


def share(value: T | None) -> T | None:
    """What rank 0 gives, on every rank (collective)."""
    if world() == 1:
        return value
    import torch.distributed as dist

    _begin()
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _begin() -> None:
    """Join the process group as the trainer would: gloo on CPUs, nccl on GPUs."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Leave the process group together (collective), so that no rank is torn down while another still talks to it."""
    if world() > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def sums(values: Sequence[int]) -> list[int]:
    """Each number added up over all ranks (collective)."""
    if world() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor)
    return [int(v) for v in tensor]


def barrier() -> None:
    """Wait until every rank is here (collective)."""
    if world() > 1:
        import torch.distributed as dist

        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 does the block first, the others find its result on disk."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()
