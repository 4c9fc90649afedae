"""What training on preference pairs has in common, from the files to the artifact: for a reward model and for DPO and its kin."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import note
from ..hub import resolve_model
from ..stage import Artifact
from . import preflight
from .rlhf import RlhfConfig
from .settings import here, paths


def located(config: RlhfConfig) -> tuple[RlhfConfig, str | None]:
    """(The config with hub ids replaced by folders, the commit of the model); a reference that is the model itself is none."""
    from . import ranks

    named = config.ref_model_name_or_path
    with ranks.main_first():
        reference = None if named in (None, config.model_name_or_path) else str(resolve_model(str(named), config.huggingface))
        config, commit = here(config)
    return dataclasses.replace(config, ref_model_name_or_path=reference), commit


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything before the trainer: `rows` are those of an expansion of the vocabulary that train; the model has no adapter yet."""

    model: Any
    rows: range | None
    tokenizer: Any
    renderer: Any
    pairs: Any
    held_out: Any
    precision: Any
    pad_id: int
    reports: Sequence[str]


def prepare(config: RlhfConfig, work: Path, **options: Any) -> Prepared:
    """Tokenise first (cheap, and where most mistakes show), then load the model; `options` go to `load_model`."""
    import os

    import datasets

    from . import cache, pairs, precision, trace
    from .corpus import keep_apart
    from .model import load_tokenizer
    from .setup import load_bare, place, quiet
    from .template import ensure_pad, renderer_for

    quiet()
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"  # TRL's own bar
    chosen = precision.choose(config.precision, config.training_args)
    note(f"precision: {chosen.mode} ({chosen.reason})")
    preflight.machine(config, qlora=config.peft.qlora)
    tokenizer = load_tokenizer(config.tokenizer_source)
    pad = ensure_pad(tokenizer)
    renderer = renderer_for(tokenizer, config.template_path, override=config.template_override, train_on="last")
    pairs.prove(renderer, paths(config.data.train_file))
    limits = pairs.Limits(config.data.max_length, config.data.overlong, whole=config.method == "reward")
    store, held_out = cache.of(config), None
    found = pairs.read(paths(config.data.train_file), store, renderer, limits, max_samples=config.data.max_samples, workers=config.data.workers)
    if config.data.eval_file:
        held_out = pairs.read([config.data.eval_file], store, renderer, limits, max_samples=config.data.max_eval_samples, workers=config.data.workers)
    keep_apart(found, held_out, config.eval_overlap)
    model, rows = load_bare(config, tokenizer, config.peft, chosen, **options)
    place(model, config)
    return Prepared(
        model=model, rows=rows if config.peft.new_rows != "freeze" else None, tokenizer=tokenizer, renderer=renderer, pairs=found, held_out=held_out, precision=chosen,
        pad_id=int(tokenizer.convert_tokens_to_ids(pad)), reports=trace.start(config.trace, config.trace_project, work),
    )  # fmt: skip


def batches(prepared: Prepared, size: int) -> Iterator[tuple[list[int], Any, Any, Any]]:
    """Both answers of the held-out pairs, the shortest first, in batches of at most `size` texts.

    Yields:
        (places `2 * pair + (0 chosen, 1 rejected)`, ids `[n, width]`, attention mask of the same shape, where each answer begins `[n]`).
    """
    import torch

    rows = prepared.held_out.dataset
    texts = [(len(row["prompt_ids"]), row["prompt_ids"] + row[f"{part}_ids"]) for row in rows for part in ("chosen", "rejected")]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][1]))
    device = next(prepared.model.parameters()).device
    for first in range(0, len(order), size):
        places = order[first : first + size]
        width = max(len(texts[i][1]) for i in places)
        ids = torch.tensor([texts[i][1] + [prepared.pad_id] * (width - len(texts[i][1])) for i in places], device=device)
        mask = torch.tensor([[1] * len(texts[i][1]) + [0] * (width - len(texts[i][1])) for i in places], device=device)
        yield places, ids, mask, torch.tensor([texts[i][0] for i in places], device=device)


def measured(model: Any, prepared: Prepared, size: int, value: Callable[[Any, Any, Any, Any], Any]) -> list[list[float]]:
    """`value(model, ids, mask, starts)` `[n]` of both answers of every held-out pair: `[pairs][chosen, rejected]`."""
    import torch

    found = [[0.0, 0.0] for _ in range(len(prepared.held_out))]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for places, ids, mask, starts in batches(prepared, size):
            with prepared.precision.autocast():
                values = value(model, ids, mask, starts)
            for place, number in zip(places, values.tolist(), strict=True):
                found[place // 2][place % 2] = float(f"{number:.7g}")
    model.train(was_training)
    return found


def compared(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(Share of pairs whose chosen value is the larger one, a tie counting half; mean difference chosen - rejected)."""
    won = sum(1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0 for chosen, rejected in values)
    difference = sum(chosen - rejected for chosen, rejected in values)
    return round(won / len(values), 4), float(f"{difference / len(values):.5g}")


# --- what both stages tell about themselves -----------------------------------------------------------------------------------------------------

USES = (
    "model_name_or_path", "tokenizer_name_or_path", "precision", "attn_implementation", "seed", "trace", "trace_project", "deepspeed", "fsdp", "local_rank", "auto_batch",
    "keep_checkpoints", "eval_overlap", "token_cache", "token_cache_gib", "training_args", "huggingface", "algorithm", "engine", "template_path", "template_override", "data",
    "peft", "trl",
)  # fmt: skip


def plan(config: RlhfConfig) -> list[str]:
    """What `--dry-run` prints: two rows a pair, and how many steps the pairs make."""
    from .plan import Rows, lines

    files = paths(config.data.train_file)
    arguments = config.training_args
    effective = int(arguments.get("per_device_train_batch_size", 8)) * int(arguments.get("gradient_accumulation_steps", 1))
    rows = _rows(files) if config.data.max_samples is None else min(_rows(files), config.data.max_samples)
    given = int(arguments.get("max_steps", -1))
    steps = given if given > 0 else max(math.ceil(rows / effective * float(arguments.get("num_train_epochs", 3))), 1)
    layout = Rows(config.data.max_length, eager=config.attn_implementation == "eager", each=2, steps=steps)
    return [f"{config.method}: {rows:,} pairs, a step takes {effective}", *lines(config, [(config.method, "all", arguments)], files, peft=config.peft, layout=layout)]


def _rows(files: Sequence[Path]) -> int:
    from ..data import records

    return sum(1 for _ in records.read(files))


def interval(stats: Mapping[str, Any]) -> tuple[float, float]:
    """95 % interval (Wilson) of the accuracy on held-out pairs after a training."""
    from ..eval.accuracy import wilson

    pairs = stats["eval_rows"]["kept"]
    return wilson(stats["eval_accuracy_after"] * pairs, pairs)


def summary(artifact: Artifact) -> list[str]:
    """The training in one line, what became of the held-out pairs in another."""
    from .finish import curve

    stats: Mapping[str, Any] = artifact.stats
    lines = [curve(stats)]
    if stats.get("eval_accuracy_after") is not None:
        accuracy, margin = (f"{stats[f'eval_{key}_before']:.3f} -> {stats[f'eval_{key}_after']:.3f}" for key in ("accuracy", "margin"))
        low, high = interval(stats)
        nothing = ", so chance alone could do it" if low <= 0.5 <= high else ""
        lines.append(f"held-out pairs ({stats['eval_rows']['kept']:,}): accuracy {accuracy} (95 %: {low:.3f} to {high:.3f}{nothing})  margin {margin}")
    return [*lines, f"curves: {artifact.path / 'report.html'}"]
