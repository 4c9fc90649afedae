"""The phases of continued pretraining, each resumable, each going on in the data where the one before stopped."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import note, warn
from ..errors import SopError
from . import adapters, checkpoint, distill, ranks
from .loop import Phase, train
from .packing import Ordered
from .record import Record
from .setup import count

if TYPE_CHECKING:
    from .pretrain import PhaseSettings, PretrainConfig
    from .textdata import Prepared

_WEIGHTS = "trained.safetensors"


def run_phases(config: PretrainConfig, prepared: Prepared, work: Path, record: Record) -> dict[str, Any]:
    """Run what is not done yet; `prepared.model` is the trained model at the end."""
    root = work / "checkpoints"
    done: list[dict[str, Any]] = []
    seen = 0
    for number, settings in enumerate(config.phases):
        if settings.train == "new_rows" and not prepared.new_rows:
            warn(f"phase {settings.name}: the vocabulary was not expanded (no {adapters.EXPANSION}), nothing to train; skipped")
            continue
        kept = root / f"phase-{number}-{settings.name}"
        arguments = {**config.training_args, **overrides(settings)}
        items = _items(arguments, len(prepared.dataset))
        last = number == len(config.phases) - 1
        wrapped, trainable = _select(prepared, settings)
        if kept.is_dir() and not checkpoint.problems(kept):
            note(f"{settings.name}: done before")
            marker = json.loads((kept / checkpoint.MARKER).read_text(encoding="utf-8"))
            outcome = marker["outcome"]
            record.restore(marker)
            _load_trained(wrapped, kept)
        else:
            phase = Phase(
                name=settings.name, model=wrapped, dataset=Ordered(prepared.dataset, config.seed, seen, items),
                collator=distill.collator_for(prepared) if settings.objective == "distill" else prepared.collator, next_token_weight=settings.next_token_weight,
                pull=settings.next_token_weight if settings.objective == "distill" else 1 / config.mlm_probability if prepared.objective == "mlm" else 1.0,
                arguments={**arguments, "num_train_epochs": 1}, precision=prepared.precision, seed=config.seed + number, sequential=True,
                groups=_groups(prepared.model, settings),
                name_of=prepared.tokens.names, reports=prepared.reports, deepspeed=config.deepspeed, fsdp=config.fsdp,
            )  # fmt: skip
            outcome = {**train(phase, root, record), "name": settings.name, **trainable}
            del outcome["model"]  # kept as JSON; the model is `wrapped`
            if not last:
                if ranks.is_main():
                    _keep(wrapped, kept, settings.name, outcome, record)
                ranks.barrier()
        prepared.model = wrapped.merge_and_unload() if settings.train == "new_rows" else wrapped
        seen += items
        done.append(outcome)
    if not done:
        raise SopError("no phase has anything to train", where="phases", fix="expand the vocabulary first, or add a phase with train: all")
    resumed = next((p["resumed_from"] for p in reversed(done) if p["resumed_from"]), None)
    of_last = {"saved": done[-1]["saved"], "batch": done[-1]["batch"]}
    return {**of_last, "steps": sum(p["steps"] for p in done), "resumed_from": resumed, "phases": done, "trainable": count(prepared.model)}


def overrides(settings: PhaseSettings) -> dict[str, Any]:
    """The training_args that a phase sets for itself."""
    names = ("max_steps", "num_train_epochs", "learning_rate", "warmup_steps", "lr_scheduler_type")
    return {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}


def _groups(model: Any, settings: PhaseSettings) -> dict[str, adapters.Group]:
    if settings.train == "new_rows":
        return {adapters.NEW_ROWS: adapters.Group(epsilon=settings.new_rows_epsilon)}
    return dict.fromkeys(adapters.embedding_names(model), adapters.Group(settings.embedding_learning_rate))


def _items(arguments: dict[str, Any], available: int) -> int:
    """How many blocks a phase reads on all processes together."""
    each = int(arguments.get("per_device_train_batch_size", 8)) * int(arguments.get("gradient_accumulation_steps", 1)) * ranks.world()
    steps = int(arguments.get("max_steps", -1))
    return steps * each if steps > 0 else math.ceil(float(arguments.get("num_train_epochs", 3)) * available)


def _select(prepared: Prepared, settings: PhaseSettings) -> tuple[Any, dict[str, int]]:
    """The model with only what the phase trains requiring a gradient."""
    model = prepared.model
    if settings.train == "new_rows":
        assert prepared.new_rows is not None
        model = adapters.attach_rows(model, prepared.new_rows)
    else:
        names = adapters.embedding_names(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(settings.train == "all" or any(name.startswith(n) for n in names))
    counts = count(model)
    note(f"{settings.name}: trains {counts['trainable']:,} of {counts['total']:,} weights")
    return model, counts


def _keep(model: Any, folder: Path, name: str, outcome: dict[str, Any], record: Record) -> None:
    """The result of a phase, so that a kill in the next one does not cost it; then its step checkpoints may go."""
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({n: p.detach().contiguous().cpu() for n, p in model.named_parameters() if p.requires_grad}, folder / _WEIGHTS)
    checkpoint.mark_complete(folder, phase=name, step=outcome["steps"], outcome=outcome, **record.totals())
    checkpoint.clear(folder.parent)


def _load_trained(model: Any, folder: Path) -> None:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / _WEIGHTS), strict=False)
