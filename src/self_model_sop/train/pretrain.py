"""Continued pretraining: first the new rows of an expanded vocabulary alone, then the model, on packed documents that do not see one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import option
from ..stage import Artifact, Stage
from . import preflight
from .finish import building, disk
from .settings import TrainConfig, here, paths, training_inputs


@dataclass(frozen=True, kw_only=True)
class PretrainData:
    """`data:` which text, and how it is cut into blocks."""

    train_file: Path | tuple[Path, ...] = option(Path("data_process/final_data/pretrain/train.jsonl"), "text rows; one file, folder, or several", path="input")
    eval_file: Path | None = option(None, "held-out text; the loss on it is measured before and after", path="input")
    text_fields: tuple[str, ...] = option((), "fields to read; empty: the text of the recognised format")
    block_size: int = option(1024, "tokens of one block; on a CPU, shorter blocks in larger batches are faster")
    document_end: str = option("auto", "token that closes a document; auto: <|endoftext|> or <|end_of_text|> where the vocabulary has it, else eos")
    mix: dict[str, float] = option(help="file name -> how often it is read in one pass (2: twice, 0.5: half of it); 1 where not named", factory=dict)
    replay_file: Path | None = option(None, "general text mixed in against forgetting", path="input")
    replay_share: float = option(0.0, "share of the tokens taken from replay_file, 0 to below 1")
    max_tokens: int | None = option(None, "read at most so many tokens in one pass")
    max_samples: int | None = option(None, "read so many rows, chosen by content hash")
    max_eval_samples: int | None = option(None, "measure on so many rows, chosen by content hash")

    def __post_init__(self) -> None:
        if self.block_size < 8:
            raise ValueError("data.block_size must be at least 8")
        if not 0 <= self.replay_share < 1:
            raise ValueError("data.replay_share must be in [0, 1)")
        if any(weight < 0 for weight in self.mix.values()):
            raise ValueError("data.mix: a weight is negative")


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """One entry of `phases:`; what is not set here is taken from training_args."""

    name: str = option(help="a name for logs and checkpoints")
    train: Literal["new_rows", "embeddings", "all"] = option("all", "new_rows: only what the expansion appended; embeddings: input and output; all: every weight")
    objective: Literal["next_token", "distill"] = option("next_token", "distill: new rows learn to give the hidden states that their tokens' old pieces give (arXiv 2505.20133)")
    next_token_weight: float = option(0.03, "weight of the next-token loss beside the distance of the states (objective distill)")
    max_steps: int | None = option(None, "optimiser steps")
    num_train_epochs: float | None = option(None, "passes over the data")
    learning_rate: float | None = option(None, "peak learning rate")
    embedding_learning_rate: float | None = option(None, "learning rate of the embeddings where everything trains")
    warmup_steps: float | None = option(None, "steps of linear warm-up; below 1: a share")
    lr_scheduler_type: str | None = option(None, "schedule")
    new_rows_epsilon: float | Literal["auto"] = option("auto", "Adam's epsilon where new rows alone are trained; auto: 1 / learned tokens of a step (docs/training.md)")

    def __post_init__(self) -> None:
        if self.next_token_weight < 0:
            raise ValueError("phases: next_token_weight is negative")
        if self.new_rows_epsilon != "auto" and self.new_rows_epsilon <= 0:
            raise ValueError("phases: new_rows_epsilon must be above 0")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """config/self_model_config/pretrain.yaml"""

    objective: Literal["auto", "causal", "mlm"] = option("auto", "next token, or masked token; auto: by the model")
    mlm_probability: float = option(0.15, "share of tokens that are masked (objective mlm)")
    data: PretrainData = option(factory=PretrainData)
    phases: tuple[PhaseSettings, ...] = option((PhaseSettings(name="full"),), "what is trained, one after the other")

    @property
    def sequence_length(self) -> tuple[str, int]:
        return "data.block_size", self.data.block_size


def _train(config: PretrainConfig, work: Path) -> dict[str, Any]:
    from . import finish, ranks
    from .phases import run_phases
    from .record import Record
    from .textdata import prepare

    with ranks.main_first():
        config, commit = here(config)
    preflight.insist(preflight.distill(config))  # of a hub id this is known only now
    prepared = prepare(config, work)
    record = Record(work)
    before = None if config.sharded else finish.remembered(work, "eval_loss_before", prepared.measure)  # one device may not hold the model
    outcome = run_phases(config, prepared, work, record)
    stats = finish.stats(record, outcome, prepared.precision) | {
        "eval_loss_before": before, "eval_loss_after": prepared.measure(), "objective": prepared.objective, "phases": outcome["phases"], "rows": prepared.rows,
        "trainable": outcome["trainable"], "base_commit": commit,
    }  # fmt: skip
    return finish.leave(
        work, stats, title="Continued pretraining", model=prepared.model, tokenizer=prepared.tokenizer, renderer=None, config=config, outcome=outcome, reports=prepared.reports
    )


def _summary(artifact: Artifact) -> list[str]:
    from .finish import curve

    stats = artifact.stats
    lines = [curve(stats)]
    if stats.get("eval_loss_before") is not None:
        lines.append(f"held-out loss {stats['eval_loss_before']:.3f} -> {stats['eval_loss_after']:.3f} nats per token")
    return [*lines, f"curves: {artifact.path / 'report.html'}"]


def _next(config: PretrainConfig) -> str:
    return f"sop train sft model_name_or_path={config.training_args['output_dir']} tokenizer_name_or_path=null"


def plan(config: PretrainConfig) -> Sequence[str]:
    """What `--dry-run` prints."""
    from .phases import overrides
    from .plan import Rows, lines

    phases = [(p.name, p.train, {**config.training_args, **overrides(p)}) for p in config.phases]
    distilled = [p.name for p in config.phases if p.objective == "distill"]
    layout = Rows(config.data.block_size, packed=True, eager=config.attn_implementation == "eager")
    return lines(config, phases, [*paths(config.data.train_file), *paths(config.data.replay_file)], peft=None, layout=layout, distilled=distilled)


STAGE = Stage(
    name="train.pretrain", version=2, config=PretrainConfig, output=TrainConfig.target, build=building(_train), disk=disk,
    inputs=lambda c: {**training_inputs(c), "replay": c.data.replay_file}, preflight=preflight.pretrain, plan=plan,
    summary=_summary, next=_next, resumable=True, apart=True,
)  # fmt: skip


def run(config: PretrainConfig) -> Artifact:
    """Pretrain further (or find it up to date)."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop train pretrain`"""
    from . import ranks

    return ranks.main(STAGE, _train, argv)
