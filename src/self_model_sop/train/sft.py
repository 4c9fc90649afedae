"""Supervised fine-tuning: LoRA and its relatives, or every weight, on the assistant's tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..artifact import Target
from ..config import option
from ..console import note
from ..stage import Artifact, Run, Stage
from ..tokenizer.settings import local
from . import families, preflight
from .adapters import PeftSettings, learning_rates
from .settings import Overlong, TrainConfig, here, paths


@dataclass(frozen=True, kw_only=True)
class SftData:
    """`data:` what is learned, and how it is laid into batches."""

    train_file: Path | tuple[Path, ...] = option(Path("data_process/final_data/finetune/train.jsonl"), "alpaca, sharegpt or messages rows; one file or several", path="input")
    eval_file: Path | None = option(None, "held-out rows; the loss on them is measured before and after", path="input")
    max_length: int = option(1024, "tokens of one conversation; longer ones are cut (counted and reported) or dropped")
    overlong: Overlong = option("truncate", "what happens to longer ones: truncate or drop")
    packing: bool = option(False, "fill rows of max_length with several conversations (best fit); they do not see one another")
    batching: Literal["compact", "padded", "padding_free"] = option("compact", "compact: short ones share the row of a long one; padded: one a row; padding_free: all in one row")
    workers: int | None = option(None, "processes that tokenise; none: every core where the files exceed 16 MiB", cosmetic=True)
    max_samples: int | None = option(None, "train on so many rows, chosen by content hash")
    max_eval_samples: int | None = option(None, "measure on so many rows, chosen by content hash")

    def __post_init__(self) -> None:
        if self.max_length < 8:
            raise ValueError("data.max_length must be at least 8")
        if self.workers is not None and self.workers < 1:
            raise ValueError("data.workers must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainConfig):
    """config/self_model_config/finetune.yaml"""

    template_path: str | None = option(
        None, "chat template for a tokenizer without one: a file, or a name of self_model/template; where the tokenizer has one, both must write the same", path="model"
    )
    template_override: bool = option(False, "use template_path even where the tokenizer's own template writes something else")
    train_on: Literal["all_assistant", "last", "full"] = option("all_assistant", "which tokens are learned: every assistant turn, the last one, or all text")
    data: SftData = option(factory=SftData)
    peft: PeftSettings = option(factory=PeftSettings)
    early_stopping_patience: int | None = option(None, "stop after so many evaluations without improvement (needs eval_strategy and load_best_model_at_end)")

    @property
    def sequence_length(self) -> tuple[str, int]:
        return "data.max_length", self.data.max_length


def build(run: Run[SftConfig]) -> dict[str, Any]:
    """Tokenise, train, and write model or adapter, tokenizer and record into the work folder; returns the stats."""
    from . import checkpoint, finish, ranks
    from .attempts import fitting

    done = finish.already(run.work)
    ranks.share(str(run.work) if done is None else None)
    if done is None:
        done = fitting(run.config, run.work, lambda config: _train(config, run.work))
        finish.seal(run.work, done)
    if not run.config.keep_checkpoints:
        checkpoint.clear(run.work / "checkpoints", everything=True)
    return done


def _train(config: SftConfig, work: Path) -> dict[str, Any]:
    from . import corpus, finish, ranks, trace
    from .loop import Phase, supervised_loss, train
    from .packing import Bins, Examples
    from .record import Record

    named = config.model_name_or_path
    with ranks.main_first():
        config, commit = here(config)
    prepared = prepare(config, work)
    record = Record(work)
    tokens, held_out = prepared.tokens, prepared.held_out
    dataset = Bins(tokens, config.data.max_length) if config.data.packing else Examples(tokens)
    evaluation = Examples(held_out, sorted(range(len(held_out)), key=lambda i: int(held_out.lengths[i]))) if held_out else None
    measure = _measured(prepared, evaluation, int(config.training_args.get("per_device_eval_batch_size", 8)), supervised_loss)
    before = None if config.sharded else finish.remembered(work, "eval_loss_before", measure)  # one device may not hold the model
    phase = Phase(
        name="sft", model=prepared.model, dataset=dataset, collator=prepared.collator, arguments=config.training_args, precision=prepared.precision, seed=config.seed,
        learning_rates=learning_rates(config.peft, config.training_args), evaluate=evaluation,
        name_of=tokens.names, reports=prepared.reports, patience=config.early_stopping_patience, deepspeed=config.deepspeed, fsdp=config.fsdp,
        stop_ids=prepared.renderer.stop_ids,
    )  # fmt: skip
    outcome = train(phase, work / "checkpoints", record)
    after = measure()
    stats = finish.stats(record, outcome, prepared.precision) | {
        "eval_loss_before": before, "eval_loss_after": after, "rows": corpus.counts(tokens.meta), "eval_rows": corpus.counts(held_out.meta) if held_out else None,
        "template": prepared.renderer.name, "adapter": config.peft.enabled, "trainable": prepared.trainable, "base_commit": commit,
    }  # fmt: skip
    trace.stop(prepared.reports)
    ranks.leave()
    if not ranks.is_main():
        return stats
    if not outcome["saved"]:
        finish.save_model(prepared.model, work, stop_ids=prepared.renderer.stop_ids)
    finish.save_tokenizer(prepared.tokenizer, work, prepared.renderer, config.tokenizer_source, config.model_name_or_path)
    if config.peft.enabled:
        finish.name_base(work, named, commit)
    finish.write_record(work, "Supervised fine-tuning", stats)
    return stats


def _measured(prepared: Prepared, evaluation: Any, batch_size: int, supervised_loss: Any) -> Any:
    def measure() -> float | None:
        if evaluation is None:
            return None
        loss, _ = supervised_loss(prepared.model, evaluation, prepared.collator, batch_size=batch_size, autocast=prepared.precision.autocast)
        return float(f"{loss:.6f}")

    return measure


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that training needs, loaded."""

    model: Any
    tokenizer: Any
    renderer: Any
    tokens: Any
    held_out: Any
    collator: Any
    precision: Any
    reports: Sequence[str]
    trainable: dict[str, int]


def prepare(config: SftConfig, work: Path) -> Prepared:
    """Tokenise first (cheap, and where most mistakes show), then load the model and attach the adapter."""
    from . import corpus, lint, precision, ranks, trace
    from .batches import CausalCollator
    from .model import load_tokenizer
    from .setup import keep_for, load_for_training, quiet
    from .template import ensure_pad, renderer_for

    quiet()
    chosen = precision.choose(config.precision, config.training_args)
    note(f"precision: {chosen.mode} ({chosen.reason})")
    preflight.machine(config, qlora=config.peft.qlora)
    tokenizer = load_tokenizer(config.tokenizer_source)
    pad = ensure_pad(tokenizer)
    renderer = renderer_for(tokenizer, config.template_path, override=config.template_override, train_on=config.train_on)
    lint.preflight(renderer, paths(config.data.train_file), max_length=config.data.max_length)
    limits: dict[str, Any] = {"max_length": config.data.max_length, "overlong": config.data.overlong, "workers": config.data.workers}
    with ranks.main_first():
        tokens = corpus.conversations(paths(config.data.train_file), work / ".tokens" / "train", renderer, max_samples=config.data.max_samples, **limits)
        held_out = None
        if config.data.eval_file:
            held_out = corpus.conversations([config.data.eval_file], work / ".tokens" / "eval", renderer, max_samples=config.data.max_eval_samples, **limits)
    model, trainable = load_for_training(config, tokenizer, config.peft, chosen)
    layout: Any = "padded" if config.data.packing else {"padding_free": "flat"}.get(config.data.batching, config.data.batching)
    collator = CausalCollator(tokenizer.convert_tokens_to_ids(pad), layout, keep_for(model, config.training_args), weighted=bool(tokens.meta["weighted"]))
    return Prepared(
        model=model, tokenizer=tokenizer, renderer=renderer, tokens=tokens, held_out=held_out, collator=collator, precision=chosen,
        reports=trace.start(config.trace, config.trace_project, work), trainable=trainable,
    )  # fmt: skip


def _output(config: SftConfig) -> Target:
    return config.target()


def _inputs(config: SftConfig) -> dict[str, Path | None]:
    files = paths(config.data.train_file)
    named = {"train" if len(files) == 1 else f"train_{i}": path for i, path in enumerate(files)}
    tokenizer = local(config.tokenizer_name_or_path) if config.tokenizer_name_or_path != config.model_name_or_path else None
    template = families.find(config.template_path) if config.template_path else None
    others = {"eval": config.data.eval_file, "template": template, "deepspeed": config.deepspeed, "fsdp": config.fsdp}
    return {"model": local(config.model_name_or_path), "tokenizer": tokenizer, **named, **others}


def _summary(artifact: Artifact) -> list[str]:
    from .finish import curve

    stats = artifact.stats
    lines = [curve(stats)]
    if stats.get("eval_loss_before") is not None:
        before, after = stats["eval_loss_before"], stats["eval_loss_after"]
        lines.append(f"held-out loss on assistant tokens {before:.3f} -> {after:.3f} nats ({after / before - 1:+.1%})")
    return [*lines, f"curves: {artifact.path / 'report.html'}"]


def _next(config: SftConfig) -> str:
    folder = config.training_args["output_dir"]
    return f"sop train merge adapter={folder}" if config.peft.enabled else f"sop infer chat model={folder}"


def plan(config: SftConfig) -> Sequence[str]:
    """What `--dry-run` prints."""
    from .plan import Rows, learned_share, lines

    files = paths(config.data.train_file)
    batching = "packed" if config.data.packing else config.data.batching
    share = 1.0 if config.train_on == "full" else learned_share(files)
    eager = config.attn_implementation == "eager"
    layout = Rows(config.data.max_length, packed=batching != "padded", one=batching == "padding_free", share=share, eager=eager)
    return lines(config, [("sft", "all", config.training_args)], files, peft=config.peft, layout=layout)


STAGE = Stage(
    name="train.sft", version=1, config=SftConfig, output=_output, build=build, inputs=_inputs, preflight=preflight.sft, plan=plan, summary=_summary, next=_next,
    resumable=True, apart=True,
)  # fmt: skip


def run(config: SftConfig) -> Artifact:
    """Fine-tune (or find it up to date)."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop train sft`"""
    from . import ranks

    return ranks.main(STAGE, _train, argv)
