"""What a finished training leaves in its folder: weights, tokenizer, record, stats; sealed so that a kill before publishing loses nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..artifact import write_atomic
from ..stage import Run
from . import machine, ranks
from .adapters import EXPANSION
from .precision import Precision
from .record import Record, losses, write_curves
from .settings import TrainConfig

_SEAL = ".trained.json"
BASE = "base.json"
_UNIT = "nats per supervised token"
C = TypeVar("C", bound=TrainConfig)


def building(train: Callable[[C, Path], dict[str, Any]]) -> Callable[[Run[C]], dict[str, Any]]:
    """`train` as the `build` of a stage: sealed before it is published, checkpoints cleared afterwards."""

    def build(run: Run[C]) -> dict[str, Any]:
        from . import checkpoint
        from .attempts import fitting

        done = already(run.work)
        ranks.share(str(run.work) if done is None else None)
        if done is None:
            done = fitting(run.config, run.work, lambda config: train(config, run.work))
            seal(run.work, done)
        if not run.config.keep_checkpoints:
            checkpoint.clear(run.work / "checkpoints", everything=True)
        return done

    return build


def disk(config: TrainConfig) -> int:
    """Bytes that a training may write (see plan.disk)."""
    from . import plan

    return plan.disk(config)


def already(work: Path) -> dict[str, Any] | None:
    """The stats of a training that was finished but not published (a kill in between), or None."""
    path = work / _SEAL
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def seal(work: Path, stats: dict[str, Any]) -> None:
    """Training is over and everything is written. Checkpoints may go now."""
    write_atomic(work / _SEAL, json.dumps(stats))


def remembered(work: Path, name: str, measure: Callable[[], Any]) -> Any:
    """A value measured before training; a resumed run takes the first measurement."""
    path = work / f".{name}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    value = measure()
    if ranks.is_main():
        write_atomic(path, json.dumps(value))
    return value


def stats(record: Record, outcome: dict[str, Any], precision: Precision) -> dict[str, Any]:
    """The numbers that the manifest and the summary of a pipeline show."""
    curve = losses(record.lines())
    totals = record.totals()
    return {
        "train_loss_first": round(curve[0][1], 6) if curve else None, "train_loss_last": round(curve[-1][1], 6) if curve else None, "steps": outcome["steps"],
        "tokens": totals["tokens"], "supervised_tokens": totals["supervised"], "supervised_share": round(totals["supervised"] / max(totals["tokens"], 1), 4),
        "train_seconds": round(totals["seconds"], 2), "tokens_per_s": round(totals["tokens"] / max(totals["seconds"], 1e-9), 1), "peak_memory_mib": machine.peak_mib(),
        "batch": outcome["batch"], "precision": precision.mode, "precision_reason": precision.reason, "resumed_from": outcome["resumed_from"],
    }  # fmt: skip


def curve(numbers: Mapping[str, Any]) -> str:
    """The training in one line, for the summary."""
    first, last = (f"{numbers[k]:.3f}" if numbers[k] is not None else "?" for k in ("train_loss_first", "train_loss_last"))
    return f"training loss {first} -> {last} in {numbers['steps']} steps, {numbers['tokens']:,} tokens ({numbers['tokens_per_s']:,.0f}/s)"


def leave(
    work: Path, stats: dict[str, Any], *, title: str, model: Any, tokenizer: Any, renderer: Any, config: Any, outcome: Mapping[str, Any], reports: Sequence[str],
    base: tuple[str, str | None] | None = None, loss: str = _UNIT,
) -> dict[str, Any]:  # fmt: skip
    """The end of every training: trackers closed, ranks parted, and on the first rank model, tokenizer and record written; returns `stats`.

    Args:
        config: the training's config, for where its tokenizer came from.
        outcome: what the loop says; of sharded weights it has written the model itself.
        base: name and commit of the base model, where `model` is an adapter.
        loss: what the curve shows.
    """
    from . import trace

    trace.stop(reports)
    ranks.leave()
    if ranks.is_main():
        if not outcome["saved"]:
            save_model(model, work, stop_ids=renderer.stop_ids if renderer else None)
        save_tokenizer(tokenizer, work, renderer, config.tokenizer_source, config.model_name_or_path)
        if base is not None:
            name_base(work, *base)
        write_record(work, title, stats, loss=loss)
    return stats


def save_model(model: Any, work: Path, *, stop_ids: list[int] | None = None, weights: Mapping[str, Any] | None = None) -> None:
    """Model or adapter as safetensors. `stop_ids` go into the generation config, so that a chat ends where the template says; `weights` stand for sharded ones."""
    config = getattr(model, "generation_config", None)
    if config is not None and stop_ids:
        config.eos_token_id = stop_ids if len(stop_ids) > 1 else stop_ids[0]
    model.config.use_cache = True
    if weights is not None:  # gathered copies of tied weights are told apart by their names alone
        weights = {name: tensor for name, tensor in weights.items() if name not in getattr(model, "all_tied_weights_keys", {})}
    model.save_pretrained(work, **({"state_dict": weights} if weights is not None else {}))
    if hasattr(model, "peft_config") and config is not None:
        config.save_pretrained(work)
    (work / "README.md").unlink(missing_ok=True)  # peft's stub; a model card is a step of its own


def save_tokenizer(tokenizer: Any, work: Path, renderer: Any, *sources: str | Path) -> None:
    """The tokenizer with the template that was trained with, and the record of its expansion."""
    if renderer is not None:
        tokenizer.chat_template = renderer.template
    tokenizer.save_pretrained(work)
    for source in sources:
        if (Path(source) / EXPANSION).is_file():
            shutil.copyfile(Path(source) / EXPANSION, work / EXPANSION)
            return


def name_base(work: Path, base: str, commit: str | None) -> None:
    """Where an adapter's base model lies: a folder also relative to the adapter, so that a moved project still finds it; a model of the hub by its id and `commit`."""
    local = Path(base).exists()
    write_atomic(work / BASE, json.dumps({"base": os.path.relpath(base, work.parent) if local else base}) + "\n")
    if not local:
        path = work / "adapter_config.json"
        named = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base, "revision": commit}
        write_atomic(path, json.dumps(named, indent=2, sort_keys=True) + "\n")


def write_record(work: Path, title: str, numbers: dict[str, Any], *, loss: str = _UNIT) -> None:
    """loss.png and report.html; `loss` is the unit of the curves."""
    shown = {k: v for k, v in numbers.items() if v is not None and not isinstance(v, dict)}
    write_curves(work, title, shown, loss)
