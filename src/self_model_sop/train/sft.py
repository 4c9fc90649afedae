"""Supervised fine-tuning: LoRA and its relatives, or every weight, on the assistant's tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import option
from ..console import note
from ..stage import Artifact, Stage
from . import preflight
from .adapters import PeftSettings, optimizer_groups
from .finish import building, disk
from .settings import RowData, TrainConfig, here, paths, training_inputs


@dataclass(frozen=True, kw_only=True)
class SftData(RowData):
    """`data:` what is learned, and how it is laid into batches."""

    train_file: Path | tuple[Path, ...] = option(Path("data_process/final_data/finetune/train.jsonl"), "alpaca, sharegpt or messages rows; one file or several", path="input")
    eval_file: Path | None = option(None, "held-out rows; the loss on them is measured before and after", path="input")
    packing: bool = option(False, "fill rows of max_length with several conversations (best fit); they do not see one another")
    batching: Literal["compact", "padded", "padding_free"] = option("compact", "compact: short ones share the row of a long one; padded: one a row; padding_free: all in one row")


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


def _train(config: SftConfig, work: Path) -> dict[str, Any]:
    from . import corpus, finish, ranks
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
        groups=optimizer_groups(config.peft, config.training_args), evaluate=evaluation,
        name_of=tokens.names, reports=prepared.reports, patience=config.early_stopping_patience, deepspeed=config.deepspeed, fsdp=config.fsdp,
        stop_ids=prepared.renderer.stop_ids,
    )  # fmt: skip
    outcome = train(phase, work / "checkpoints", record)
    after = measure()
    stats = finish.stats(record, outcome, prepared.precision) | {
        "eval_loss_before": before, "eval_loss_after": after, "rows": corpus.counts(tokens.meta), "eval_rows": corpus.counts(held_out.meta) if held_out else None,
        "template": prepared.renderer.name, "adapter": config.peft.enabled, "trainable": prepared.trainable, "base_commit": commit,
    }  # fmt: skip
    base = (named, commit) if config.peft.enabled else None
    return finish.leave(
        work, stats, title="Supervised fine-tuning", model=prepared.model, tokenizer=prepared.tokenizer, renderer=prepared.renderer, config=config, outcome=outcome,
        reports=prepared.reports, base=base,
    )  # fmt: skip


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
    from . import cache, corpus, precision, proof, trace
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
    proof.preflight(renderer, paths(config.data.train_file), max_length=config.data.max_length)
    limits: dict[str, Any] = {"max_length": config.data.max_length, "overlong": config.data.overlong, "workers": config.data.workers}
    store = cache.of(config)
    tokens = corpus.conversations(paths(config.data.train_file), store, renderer, max_samples=config.data.max_samples, **limits)
    held_out = None
    if config.data.eval_file:
        held_out = corpus.conversations([config.data.eval_file], store, renderer, max_samples=config.data.max_eval_samples, **limits)
    corpus.keep_apart(tokens, held_out, config.eval_overlap)
    model, trainable = load_for_training(config, tokenizer, config.peft, chosen)
    layout: Any = "padded" if config.data.packing else {"padding_free": "flat"}.get(config.data.batching, config.data.batching)
    collator = CausalCollator(tokenizer.convert_tokens_to_ids(pad), layout, keep_for(model, config.training_args), weighted=bool(tokens.meta["weighted"]))
    return Prepared(
        model=model, tokenizer=tokenizer, renderer=renderer, tokens=tokens, held_out=held_out, collator=collator, precision=chosen,
        reports=trace.start(config.trace, config.trace_project, work), trainable=trainable,
    )  # fmt: skip


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
    name="train.sft", version=1, config=SftConfig, output=TrainConfig.target, build=building(_train), disk=disk, inputs=training_inputs, preflight=preflight.sft, plan=plan,
    summary=_summary, next=_next, resumable=True, apart=True,
)  # fmt: skip


def run(config: SftConfig) -> Artifact:
    """Fine-tune (or find it up to date)."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop train sft`"""
    from . import ranks

    return ranks.main(STAGE, _train, argv)
