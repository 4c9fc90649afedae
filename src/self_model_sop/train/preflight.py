"""What is found wrong before anything heavy is imported: config.json, the names in the safetensors header and the tokenizer's vocabulary are read, nothing else."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import errors
from ..errors import SopError
from . import families
from .adapters import EXPANSION, new_rows
from .ranks import world

if TYPE_CHECKING:
    from .adapters import PeftSettings
    from .pretrain import PretrainConfig
    from .settings import TrainConfig
    from .sft import SftConfig

Finding = tuple[str, str, str]


def sft(config: SftConfig) -> list[Finding]:
    """Cross-field rules of fine-tuning."""
    found = [*shared(config, config.data.eval_file), *targets(config.model_name_or_path, config.peft)]
    if config.early_stopping_patience and (not config.training_args.get("load_best_model_at_end") or config.training_args.get("eval_strategy", "no") == "no"):
        found.append(("early_stopping_patience", "needs training_args.eval_strategy and training_args.load_best_model_at_end", ""))
    return [*found, *template(config.template_path, override=config.template_override)]


def targets(model: str, peft: PeftSettings) -> Iterator[Finding]:
    """Layers that are to get an adapter and that a local model does not have."""
    names = weight_names(model) if peft.enabled and not isinstance(peft.target_modules, str) else []
    missing = [t for t in peft.target_modules if names and not any(n.endswith((f".{t}.weight", f"{t}.weight")) for n in names)]
    if missing:
        layers = sorted({n.removesuffix(".weight").rsplit(".", 1)[-1] for n in names if n.endswith(".weight") and "norm" not in n})
        yield "peft.target_modules", f"the model has no layer named {', '.join(missing)}", f"its layers: {', '.join(layers)}; or write all-linear"


def template(path: str | None, *, override: bool) -> Iterator[Finding]:
    """A template file that is not there, or an override without one."""
    if path:
        try:
            families.find(path)
        except SopError as error:
            yield "template_path", f"{error.what}: {path}", error.fix or ""
    if override and not path:
        yield "template_override", "there is no template_path to use", "set template_path, or leave template_override out"


def pretrain(config: PretrainConfig) -> list[Finding]:
    """Cross-field rules of continued pretraining."""
    model = read_json(config.model_name_or_path, "config.json")
    found = shared(config, config.data.eval_file)
    masked = any(str(name).endswith(("ForMaskedLM", "ForPreTraining")) for name in (model or {}).get("architectures") or [])
    if model and masked != (config.objective == "mlm") and config.objective != "auto":
        found.append(("objective", f"{config.objective} does not fit {', '.join(model.get('architectures') or [])}", "write objective: auto"))
    if config.fsdp and any(phase.train == "new_rows" for phase in config.phases):
        found.append(("fsdp", "cannot train single rows of an embedding", "train the new rows on one GPU (it is a short phase), or with deepspeed"))
    if config.sharded and len(config.phases) > 1:
        found.append(("phases", "several phases, but with fsdp or deepspeed a run has one", "make each phase a run of its own, the next one from the output of the one before"))
    for i, phase in enumerate(config.phases):
        if phase.max_steps is None and phase.num_train_epochs is None and not config.training_args.keys() & {"max_steps", "num_train_epochs"}:
            found.append(("phases", f"phase {i + 1} ({phase.name}) has neither max_steps nor num_train_epochs", "set one of them"))
    found += distill(config)
    names = [phase.name for phase in config.phases]
    if len(set(names)) < len(names):
        found.append(("phases", "two phases have the same name", "give each its own"))
    if config.data.replay_share and not config.data.replay_file:
        found.append(("data.replay_share", "there is no data.replay_file to take it from", ""))
    return found


def distill(config: PretrainConfig) -> list[Finding]:
    """What keeps phases from distilling; of a model that is not here yet nothing is said."""
    wanted = [(f"phases.{i}.objective", phase) for i, phase in enumerate(config.phases) if phase.objective == "distill"]
    found = [(key, f"distill trains new rows alone, not {phase.train}", "write train: new_rows, or objective: next_token") for key, phase in wanted if phase.train != "new_rows"]
    model = read_json(config.model_name_or_path, "config.json")
    for key, _ in wanted:
        if config.objective == "mlm" or (model and kind_said(model) == "masked"):
            found.append((key, f"distill is for causal models, not {', '.join((model or {}).get('architectures') or []) or 'objective: mlm'}", "write objective: next_token"))
        elif model and not new_rows(config.tokenizer_source, config.model_name_or_path):
            what = f"distill needs an expanded vocabulary, and there is no {EXPANSION} beside the tokenizer"
            found.append((key, what, "expand it first: sop tokenizer extend, sop tokenizer resize"))
        if config.sharded:
            found.append((key, "distill runs the body of the model by itself, which has not been tried with sharded weights", "leave `deepspeed` and `fsdp` out"))
    return found


def insist(found: Sequence[Finding]) -> None:
    """Stop at the first finding.

    Raises:
        SopError: where there is one.
    """
    for key, what, fix in found:
        raise SopError(what, where=key, fix=fix)


def shared(config: TrainConfig, eval_file: Path | None) -> list[Finding]:
    """The rules of every training stage."""
    key, length = config.sequence_length
    return [*_common(config), *_length(key, length, read_json(config.model_name_or_path, "config.json")), *_evaluation(config, eval_file)]


def machine(config: TrainConfig, *, qlora: bool) -> None:
    """What this machine lacks for the run.

    Raises:
        SopError: exit code 4, with what to install or change.
    """
    import importlib.util

    import torch

    if qlora and not torch.cuda.is_available():
        what = "peft.qlora needs a CUDA GPU, and there is none here"
        raise SopError(what, fix="set peft.qlora: false (LoRA with full-precision base weights runs on a CPU)", code=errors.ENVIRONMENT)
    if qlora and importlib.util.find_spec("bitsandbytes") is None:
        raise errors.missing_extra("bitsandbytes", "qlora")
    if config.fsdp and world() < 2:
        fix = "start it with torchrun on at least two GPUs, or leave `fsdp` out"
        raise SopError("fsdp: the weights would not be sharded here (this is a single process)", where=str(config.fsdp), fix=fix, code=errors.ENVIRONMENT)
    if config.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise SopError("the package 'deepspeed' is not installed", fix="pip install -r envs/deepspeed.txt; or leave `deepspeed` out", code=errors.ENVIRONMENT)
    needed = {
        "training_args.use_liger_kernel": ("liger_kernel", "liger-kernel", bool(config.training_args.get("use_liger_kernel")), "leave it out"),
        "attn_implementation": ("flash_attn", "flash-attn", config.attn_implementation == "flash_attention_2", "write sdpa"),
    }
    for key, (module, package, asked, instead) in needed.items():
        if asked and not torch.cuda.is_available():
            raise SopError(f"{package} needs a CUDA GPU, and there is none here", where=key, fix=instead, code=errors.ENVIRONMENT)
        if asked and importlib.util.find_spec(module) is None:
            raise SopError(f"the package {package!r} is not installed", where=key, fix=f"pip install {package}; or {instead}", code=errors.ENVIRONMENT)


def _common(config: TrainConfig) -> Iterator[Finding]:
    arguments = config.training_args
    if not arguments.get("output_dir"):
        yield "training_args.output_dir", "missing: where does the result go?", "for example: output_dir: self_model/checkpoints/run"
    if arguments.get("fp16") and arguments.get("bf16"):
        yield "training_args.bf16", "fp16 and bf16 are both on", "keep one"
    yield from _sharding(config)
    source = config.tokenizer_source
    rows, highest = embedding_rows(config.model_name_or_path), highest_id(source)
    if rows is not None and highest is not None and highest >= rows:
        key = "tokenizer_name_or_path" if config.tokenizer_name_or_path else "model_name_or_path"
        fix = "grow the embedding first (sop tokenizer resize), or use the tokenizer that belongs to the model"
        yield key, f"the tokenizer has id {highest:,}, the model's embedding only {rows:,} rows", fix
    if (Path(config.model_name_or_path) / "adapter_config.json").is_file() and not (Path(config.model_name_or_path) / "config.json").is_file():
        yield "model_name_or_path", "this folder holds an adapter, not a model", "merge it first: sop train merge adapter=..."


def _sharding(config: TrainConfig) -> Iterator[Finding]:
    """What in the files of FSDP and DeepSpeed would lose the result or contradict the run."""
    if config.fsdp and config.deepspeed:
        yield "fsdp", "fsdp and deepspeed are both set", "keep one"
    for key, path in (("fsdp", config.fsdp), ("deepspeed", config.deepspeed)):
        if path is None or not path.is_file():
            continue
        settings = read_json(path.parent, path.name)
        if settings is None:
            yield key, f"no JSON object in {path.name}", f"see config/self_model_config/{key}"
        elif key == "fsdp" and str(settings.get("state_dict_type", "FULL_STATE_DICT")) != "FULL_STATE_DICT":
            yield key, f"state_dict_type {settings['state_dict_type']} would leave the result in pieces", "write FULL_STATE_DICT"
        elif key == "deepspeed":
            yield from ((key, *found) for found in _deepspeed(settings, config.training_args))


# Where DeepSpeed's file and training_args say the same thing: (key of the file, argument, its default).
_SAID_TWICE = (
    ("train_micro_batch_size_per_gpu", "per_device_train_batch_size", 8),
    ("gradient_accumulation_steps", "gradient_accumulation_steps", 1),
    ("gradient_clipping", "max_grad_norm", 1.0),
)


def _deepspeed(settings: dict[str, Any], arguments: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(What is wrong, fix) of a DeepSpeed file. What stands there against training_args stops the libraries late, or (what is left out) is decided by their defaults."""
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if settings.keys() & {"scheduler", "optimizer"}:
        yield "an optimizer or scheduler in this file would silently go before training_args", "leave both out: training_args has learning_rate, optim, lr_scheduler_type"
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        yield f"zero_optimization.stage is {stage!r}: nothing would be sharded", "write 1, 2 or 3, or leave `deepspeed` out"
    if stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):  # type: ignore[union-attr]
        yield "with ZeRO 3 the result could not be written", "set zero_optimization.stage3_gather_16bit_weights_on_model_save: true"
    for key, argument, default in _SAID_TWICE:
        mine, wanted = settings.get(key), arguments.get(argument, default)
        if mine != "auto" and mine != wanted:
            yield f"{key} is {mine!r}, training_args.{argument} {wanted!r}", f'write "{key}": "auto": training_args decides'
    if settings.get("train_batch_size", "auto") != "auto":
        yield f"train_batch_size is {settings['train_batch_size']!r}, but it follows from training_args and the number of processes", 'write "auto"'
    for name in ("bf16", "fp16"):
        part = settings.get(name)
        if isinstance(part, dict) and part.get("enabled", "auto") != "auto":
            yield f"{name}.enabled is {part['enabled']!r}, but `precision` decides", 'write "auto"'


def _length(key: str, length: int, model: dict[str, Any] | None) -> Iterator[Finding]:
    limit = (model or {}).get("max_position_embeddings")
    if isinstance(limit, int) and length > limit:
        yield key, f"{length:,} tokens, but the model reads at most {limit:,}", f"set it to {limit} or less"


def _evaluation(config: TrainConfig, eval_file: Path | None) -> Iterator[Finding]:
    arguments = config.training_args
    strategy = arguments.get("eval_strategy", "no")
    if strategy != "no" and eval_file is None:
        yield "training_args.eval_strategy", f"{strategy}, but there is no data.eval_file", "set data.eval_file, or eval_strategy: 'no'"
    if arguments.get("load_best_model_at_end"):
        if strategy == "no":
            yield "training_args.load_best_model_at_end", "needs eval_strategy", "set eval_strategy: steps or epoch"
        elif arguments.get("save_strategy", "steps") not in (strategy, "best"):
            yield "training_args.load_best_model_at_end", f"save_strategy ({arguments.get('save_strategy', 'steps')}) must equal eval_strategy ({strategy})", ""
        elif strategy == "steps" and int(arguments.get("save_steps", 500)) % int(arguments.get("eval_steps") or arguments.get("logging_steps", 500)):
            yield "training_args.save_steps", "must be a multiple of eval_steps, so that the best model is one that was saved", ""


# --- reading a model folder without loading it -------------------------------------------------------------------------------------------------


def weight_shapes(folder: str | Path) -> dict[str, tuple[list[int], str]]:
    """Name -> (shape, dtype) of every tensor in a folder's safetensors files, from their headers; empty where there are none."""
    found: dict[str, tuple[list[int], str]] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as f:
            head = f.read(8)
            size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 0 < size <= 100 << 20:
                raise SopError("not a safetensors file", where=str(path), fix="fetch the model again", code=errors.DATA)
            try:
                header = json.loads(f.read(size))
            except ValueError:
                raise SopError("the header of this safetensors file is damaged", where=str(path), fix="fetch the model again", code=errors.DATA) from None
        found |= {name: (entry["shape"], entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
    return found


def weight_names(folder: str | Path) -> list[str]:
    """Names of the weights of a local model folder."""
    return list(weight_shapes(folder))


def embedding_rows(folder: str | Path) -> int | None:
    """Rows of the input embedding of a local model folder, or None where that cannot be told."""
    shapes = weight_shapes(folder)
    names = [n for n in shapes if n.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight"))]
    return shapes[names[0]][0][0] if names else None


def highest_id(folder: str | Path) -> int | None:
    """The highest token id of a local `tokenizer.json`, or None where there is none."""
    tokenizer = read_json(folder, "tokenizer.json")
    if not tokenizer:
        return None
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
    return max([*(i for i in ids if isinstance(i, int)), *(t["id"] for t in tokenizer.get("added_tokens", []))], default=None)


def kind_said(config: Mapping[str, Any]) -> Literal["causal", "masked", "seq2seq"] | None:
    """The kind of model that the contents of a `config.json` name; None where they name no language-model head."""
    names = [str(name) for name in config.get("architectures") or []]
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    if any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names):
        return "masked"
    return "causal" if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names) else None


def read_json(folder: str | Path, name: str) -> dict[str, Any] | None:
    """A JSON object in a local folder, or None where it is missing or no object."""
    try:
        loaded = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return loaded if isinstance(loaded, dict) else None
