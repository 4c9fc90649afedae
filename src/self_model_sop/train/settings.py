"""The keys that continued pretraining and fine-tuning share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..artifact import Target
from ..config import option
from ..errors import SopError
from ..hub import HubConfig, commit_of, resolve_model
from ..tokenizer.settings import local
from .arguments import ROLES
from .precision import Mode

Trace = Literal["none", "swanlab", "wandb", "tensorboard"]
Overlong = Literal["truncate", "drop"]


@dataclass(frozen=True, kw_only=True)
class RowData:
    """What `data:` says of rows that are rendered, whatever they hold."""

    max_length: int = option(1024, "tokens of one row; longer ones are cut (counted and reported) or dropped")
    overlong: Overlong = option("truncate", "what happens to longer ones: truncate or drop")
    workers: int | None = option(None, "processes that tokenise; none: every core where the files exceed 16 MiB", cosmetic=True)
    max_samples: int | None = option(None, "train on so many rows, chosen by content hash")
    max_eval_samples: int | None = option(None, "measure on so many rows, chosen by content hash")

    def __post_init__(self) -> None:
        if self.max_length < 8:
            raise ValueError("data.max_length must be at least 8")
        if self.workers is not None and self.workers < 1:
            raise ValueError("data.workers must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every training stage reads."""

    model_name_or_path: str = option(help="base model: folder or hub id", path="model")
    tokenizer_name_or_path: str | None = option(None, "none: the model's", path="model")
    precision: Mode = option("auto", "auto: what this machine computes fastest; fp32, bf16, fp16 insist")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = option("sdpa", "attention kernel")
    seed: int = option(42, "seed of initialisation, order and dropout")
    trace: Trace = option("none", "where the curves go, besides metrics.jsonl and report.html", flag="--trace", cosmetic=True)
    trace_project: str | None = option(None, "project name at the tracker; none: the one in config/trace_config", cosmetic=True)
    deepspeed: Path | None = option(None, "DeepSpeed JSON (config/self_model_config/deepspeed): weights and optimizer states spread over GPUs", flag="--deepspeed", path="input")
    fsdp: Path | None = option(None, "FSDP2 JSON (config/self_model_config/fsdp): the same through PyTorch itself", path="input")
    local_rank: int = option(-1, "set by launchers of the old kind; torchrun sets LOCAL_RANK", flag="--local_rank", cosmetic=True)
    auto_batch: bool = option(False, "out of memory: halve the batch, double the accumulation (same effective batch), say so and go on", cosmetic=True)
    token_cache: Path | None = option(None, "folder of tokenised data that runs share; none: $SOP_TOKEN_CACHE, else .cache/tokens of the project", path="output", cosmetic=True)
    token_cache_gib: float = option(20.0, "tokenised data used longest ago goes once all of it exceeds so many GiB", cosmetic=True)
    eval_overlap: Literal["refuse", "warn"] = option("refuse", "where held-out examples are in the training data too: stop before anything is trained, or say so", cosmetic=True)
    keep_checkpoints: bool = option(False, "leave the last training checkpoints in the output folder", cosmetic=True)
    training_args: dict[str, Any] = option(
        help="arguments of transformers.TrainingArguments; output_dir is where the result goes", factory=dict, check="self_model_sop.train.arguments:check", keys=ROLES
    )
    huggingface: HubConfig = option(factory=HubConfig)

    @property
    def tokenizer_source(self) -> str:
        return self.tokenizer_name_or_path or self.model_name_or_path

    @property
    def sharded(self) -> bool:
        """The weights are spread over several GPUs."""
        return bool(self.deepspeed or self.fsdp)

    @property
    def sequence_length(self) -> tuple[str, int]:
        """The key that sets how long a training sequence is, and its value in tokens."""
        raise NotImplementedError

    def target(self) -> Target:
        """The artifact folder.

        Raises:
            SopError: where training_args.output_dir is missing.
        """
        folder = self.training_args.get("output_dir")
        if not folder:
            raise SopError("missing key 'training_args.output_dir'", where="config", fix="for example: training_args.output_dir=self_model/checkpoints/run")
        return Target(Path(folder))


C = TypeVar("C", bound=TrainConfig)


def here(config: C) -> tuple[C, str | None]:
    """(The config with hub ids replaced by the folders of their snapshots, the commit of the model); local folders stay as they are, without a commit."""
    hub = config.huggingface
    model = resolve_model(config.model_name_or_path, hub)
    tokenizer = config.tokenizer_name_or_path
    if tokenizer is not None:  # of the model's own repository everything is there now
        tokenizer = str(model if tokenizer == config.model_name_or_path else resolve_model(tokenizer, hub, weights=False))
    commit = None if Path(config.model_name_or_path).is_dir() else commit_of(model)
    return dataclasses.replace(config, model_name_or_path=str(model), tokenizer_name_or_path=tokenizer), commit


def paths(value: Path | tuple[Path, ...] | None) -> tuple[Path, ...]:
    """One path, several or none as a tuple."""
    return () if value is None else (value,) if isinstance(value, Path) else value


def training_inputs(config: Any, data: Any = None) -> dict[str, Path | None]:
    """Every file and folder that decides what a training makes of `data` (none: of `config.data`)."""
    from . import families

    data = data or config.data
    files = paths(data.train_file)
    named = {"train" if len(files) == 1 else f"train_{i}": path for i, path in enumerate(files)}
    tokenizer = local(config.tokenizer_name_or_path) if config.tokenizer_name_or_path != config.model_name_or_path else None
    template = getattr(config, "template_path", None)  # pretraining renders nothing
    others = {"eval": data.eval_file, "template": families.find(template) if template else None, "deepspeed": config.deepspeed, "fsdp": config.fsdp}
    return {"model": local(config.model_name_or_path), "tokenizer": tokenizer, **named, **others}
