"""`training_args:` checked against the installed transformers.TrainingArguments, read from its source text so that nothing heavy is imported."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

Finding = tuple[str, str, str]

# The role of single keys: paths never enter a fingerprint, and these change nothing in the trained weights.
ROLES = {
    "output_dir": "output",
    **dict.fromkeys(
        ["logging_steps", "logging_first_step", "logging_strategy", "save_total_limit", "save_steps", "save_strategy", "run_name", "project", "log_level", "disable_tqdm",
         "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers", "report_to", "ddp_timeout"],
        "cosmetic",
    ),
}  # fmt: skip

# Keys that this project decides itself.
OURS = {
    "report_to": "use the top-level key `trace: swanlab | wandb | tensorboard | none`",
    "resume_from_checkpoint": "leave it out: a run resumes from its last complete checkpoint by itself",
    "deepspeed": "use the top-level key `deepspeed: <file>`",
    "fsdp": "use the top-level key `fsdp: <file>`, for example config/self_model_config/fsdp/fsdp2.json",
    "fsdp_config": "use the top-level key `fsdp: <file>`, for example config/self_model_config/fsdp/fsdp2.json",
    "local_rank": "leave it out: torchrun sets it",
    "push_to_hub": "leave it out: publishing is a step of its own",
    "hub_token": "leave it out: the hub's client reads HF_TOKEN from the environment",
    "train_sampling_strategy": "leave it out: data.batching: compact leaves next to no padding in a random order",
    "length_column_name": "leave it out",
    "label_names": "leave it out",
    "remove_unused_columns": "leave it out: batches hold exactly what the model needs",
    "logging_nan_inf_filter": "leave it out: a loss that is not finite stops the run",
    "seed": "use the top-level key `seed`",
    "auto_find_batch_size": "leave it out: it changes the effective batch size silently",
    "use_legacy_prediction_loop": "leave it out",
    "do_train": "leave it out: the command says what is done",
    "do_eval": "leave it out: give `data.eval_file`",
    "do_predict": "leave it out: use `sop eval compare`",
}

# Removed (or renamed) between transformers 4.x and 5.23, with what to write instead.
REMOVED = {
    "evaluation_strategy": "write eval_strategy",
    "overwrite_output_dir": "leave it out; pass --overwrite on the command line to replace an artifact",
    "no_cuda": "write use_cpu: true",
    "use_mps_device": "leave it out: MPS is used where it is there",
    "save_safetensors": "leave it out: weights are always safetensors",
    "per_gpu_train_batch_size": "write per_device_train_batch_size",
    "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
    "warmup_ratio": "write warmup_steps: a number below 1 is a share of all steps",
    "group_by_length": "leave it out: data.batching: compact leaves next to no padding in a random order",
    "logging_dir": "leave it out: the tracker's files go where config/trace_config says",
    "half_precision_backend": "leave it out",
    "fp16_backend": "leave it out",
    "fp16_opt_level": "leave it out: apex is no longer supported",
    "adafactor": "write optim: adafactor",
    "include_tokens_per_second": "leave it out: metrics.jsonl always has tokens_per_s",
    "include_inputs_for_metrics": "write include_for_metrics: [inputs]",
    "push_to_hub_token": "leave it out: the hub's client reads HF_TOKEN from the environment",
    "push_to_hub_model_id": "write hub_model_id",
    "push_to_hub_organization": "write hub_model_id: organisation/name",
    "fsdp_min_num_params": "put min_num_params into the file of the top-level key `fsdp`",
    "fsdp_transformer_layer_cls_to_wrap": "put transformer_layer_cls_to_wrap into the file of the top-level key `fsdp`",
    "jit_mode_eval": "leave it out",
    "use_ipex": "leave it out",
    "torchdynamo": "write torch_compile_backend",
    "ray_scope": "leave it out",
    "past_index": "leave it out",
    "mp_parameters": "leave it out",
    "tpu_num_cores": "leave it out",
    "tpu_metrics_debug": "write debug: tpu_metrics_debug",
    "dispatch_batches": "write accelerator_config: {dispatch_batches: ...}",
    "split_batches": "write accelerator_config: {split_batches: ...}",
    "sharded_ddp": "use the top-level key `fsdp: <file>`",
    "xpu_backend": "write ddp_backend",
    "debug_mode": "write debug",
}


class Argument(NamedTuple):
    """One field of TrainingArguments: the plain types that it takes, and its choices where they are known."""

    types: frozenset[str]
    choices: tuple[str, ...]


_PLAIN = {"int": "int", "float": "float", "bool": "bool", "str": "str", "None": "None", "dict": "map", "Dict": "map", "list": "list", "List": "list", "tuple": "list"}
_ACCEPTS = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "map": (dict,), "list": (list, tuple), "None": (type(None),)}


def _source(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(package)
    return Path(spec.origin).parent / file


def known() -> dict[str, Argument]:
    """Every field of the installed TrainingArguments, by name. Nothing of transformers is imported (its source is parsed, about 0.1 s)."""
    return fields_of("transformers", "training_args.py", "TrainingArguments")


@lru_cache(maxsize=16)
def fields_of(package: str, file: str, name: str) -> dict[str, Argument]:
    """The fields that class `name` itself declares in a file of an installed package, by name; the package is read, not imported."""
    module = ast.parse(_source(package, file).read_text(encoding="utf-8"))
    choices = {**_enumerations(ast.parse(_source("transformers", "trainer_utils.py").read_text(encoding="utf-8"))), **_enumerations(module)}
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        node.target.id: Argument(*_types(node.annotation, choices))
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
    }


@lru_cache(maxsize=16)
def compared_with(package: str, file: str, name: str) -> tuple[str, ...]:
    """The texts that a file of an installed package compares a variable or attribute `name` with (`name == "text"`), in their order."""
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse(_source(package, file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and name in (getattr(node.left, "id", None), getattr(node.left, "attr", None)) and isinstance(node.ops[0], ast.Eq):
            found |= {c.value: None for c in node.comparators if isinstance(c, ast.Constant) and isinstance(c.value, str)}
    return tuple(found)


def _enumerations(module: ast.Module) -> dict[str, tuple[str, ...]]:
    found = {}
    for node in module.body:
        if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in node.bases):
            values = (item.value.value for item in node.body if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant))
            found[node.name] = tuple(v for v in values if isinstance(v, str))
    return found


def _types(annotation: ast.expr, enumerations: Mapping[str, tuple[str, ...]]) -> tuple[frozenset[str], tuple[str, ...]]:
    names = {node.id for node in _unions(annotation)}
    choices = tuple(value for name in sorted(names) for value in enumerations.get(name, ()))
    types = {_PLAIN[name] for name in names if name in _PLAIN} | ({"str"} if choices else set())
    return frozenset(types), choices


def _unions(node: ast.expr) -> Iterator[ast.Name]:
    """The alternatives of `A | B`, `Optional[A]`, `Union[A, B]`; what stands in other brackets is left out."""
    if isinstance(node, ast.BinOp):
        yield from _unions(node.left)
        yield from _unions(node.right)
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in ("Optional", "Union"):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for part in inner:
            yield from _unions(part)
        if node.value.id == "Optional":
            yield ast.Name("None")
    elif isinstance(node, ast.Subscript):
        yield from _unions(node.value)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield from _unions(ast.parse(node.value, mode="eval").body)
        else:
            yield ast.Name("None")
    elif isinstance(node, ast.Name):
        yield node


def check(given: Any) -> list[Finding]:
    """What is wrong with a `training_args` map: [(key, what is wrong, fix)]."""
    if not isinstance(given, Mapping):
        return [("", "expected keys and values", "for example: training_args: {num_train_epochs: 1}")]
    found = []
    for key, value in given.items():
        problem = _check_one(str(key), value)
        if problem:
            found.append((str(key), *problem))
    return found


def _check_one(key: str, value: Any) -> tuple[str, str] | None:
    fields = known()
    if key in OURS:
        return "not set here", OURS[key]
    if key not in fields:
        if key in REMOVED:
            return "removed from transformers.TrainingArguments", REMOVED[key]
        names = [name for name in fields if name not in OURS]
        near = difflib.get_close_matches(key, [*names, *REMOVED], 1, cutoff=0.6)
        if near and near[0] in REMOVED:
            return "unknown key of transformers.TrainingArguments", f"did you mean {near[0]!r}? It was removed: {REMOVED[near[0]]}"
        return "unknown key of transformers.TrainingArguments", f"did you mean {near[0]!r}?" if near else ""
    return problem(fields[key], value) or _range(key, value)


def problem(argument: Argument, value: Any) -> tuple[str, str] | None:
    """(What is wrong with the type or choice of a value, fix), if anything is."""
    if argument.types and not _fits(value, argument.types):
        return f"expected {' or '.join(sorted(argument.types - {'None'}))}, got {value!r}", "write true or false" if argument.types <= {"bool", "None"} else ""
    if argument.choices and isinstance(value, str) and value not in argument.choices:
        near = difflib.get_close_matches(value, argument.choices, 1)
        return f"{value!r} is none of {', '.join(argument.choices[:12])}" + (", ..." if len(argument.choices) > 12 else ""), f"did you mean {near[0]!r}?" if near else ""
    return None


def _fits(value: Any, types: frozenset[str]) -> bool:
    if isinstance(value, bool):
        return "bool" in types
    if isinstance(value, float) and value.is_integer() and "int" in types:
        return True  # `1e3` steps
    return any(isinstance(value, _ACCEPTS[t]) for t in types)


_AT_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 0, "num_train_epochs": 0, "weight_decay": 0,
    "max_grad_norm": 0, "warmup_steps": 0, "logging_steps": 0, "save_steps": 0, "eval_steps": 0, "dataloader_num_workers": 0,
}  # fmt: skip


def _range(key: str, value: Any) -> tuple[str, str] | None:
    least = _AT_LEAST.get(key)
    if least is not None and isinstance(value, (int, float)) and not isinstance(value, bool) and value < least:
        return f"must be at least {least}, got {value!r}", ""
    return None
