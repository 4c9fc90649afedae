"""Adapter -> full model, written only where the merged model is proven to answer as base plus adapter does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import errors
from ..artifact import Target
from ..config import option
from ..console import note
from ..errors import SopError
from ..hub import HubConfig
from ..infer import parity
from ..infer.parity import Parity
from ..stage import Artifact, Run, Stage, stage_main
from ..tokenizer.settings import local
from .model import base_of, is_adapter
from .preflight import read_json

# Largest relative difference of the logits after the cast that is rounding and nothing else: about 16 units in the last place.
_CAST_BOUND = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1.5e-1}
_SCRATCH = ".scratch"
_KINDS: dict[str, parity.Kind] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """config/self_model_config/merge.yaml"""

    adapter: Path = option(Path("self_model/checkpoints/finetune"), "folder of the adapter", path="input", flag="--adapter")
    base_model: str | None = option(None, "folder or hub id; none: the one that the adapter names", path="model", flag="--base_model")
    output_dir: Path = option(Path("self_model/checkpoints/merged"), "the full model goes here", path="output", flag="--output_dir")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "of the written weights; auto: the base model's")
    tolerance: float = option(1e-4, "largest relative difference of merged and adapter logits, in fp32 before any cast")
    probe: tuple[str, ...] = option(
        ("高血压患者应当按时服药，定期测量血压。", "The quick brown fox jumps over the lazy dog.", "def main(argv):\n    return 0"), "texts that both models are compared on"
    )
    max_new_tokens: int = option(24, "length of the generation check")
    parity: Parity = option(factory=lambda: Parity(prompts=8, tokens=16, lines=200))
    allow_divergence: bool = option(False, "publish also what is out of the bounds of parity, with that on record", flag="--allow_divergence")
    huggingface: HubConfig = option(factory=HubConfig)


def build(run: Run[MergeConfig]) -> dict[str, Any]:
    """Merge in fp32, compare, cast, write, reload, generate; returns the stats.

    Raises:
        SopError: exit 3 where nothing changed, or merged and adapter logits differ.
    """
    import torch

    from . import finish, setup
    from .adapters import EXPANSION
    from .model import base_folder, load_model, load_tokenizer

    setup.quiet()
    config = run.config
    tokenizer = load_tokenizer(config.adapter)
    model = load_model(config.base_model or base_folder(config.adapter, config.huggingface), config.huggingface, dtype="float32")
    stored = _stored_dtype(model) if config.dtype == "auto" else config.dtype
    batches = _probes(tokenizer, config)
    reference, merged, wanted, stats = _merged(model, tokenizer, batches, run)
    for parameter in merged.parameters():  # not .to(): buffers such as the rotary frequencies stay fp32, as they will when the model is loaded
        parameter.data = parameter.data.to(getattr(torch, stored))
    after_cast = _difference(_logits(merged, batches), wanted)
    if after_cast > _CAST_BOUND[stored]:
        what = f"after the cast to {stored} the logits differ by {after_cast:.2g} relative"
        raise SopError(what, where=str(config.adapter), fix="write dtype: float32 or bfloat16", code=errors.DATA)
    finish.save_model(merged, run.work)
    for name in ("generation_config.json", EXPANSION):
        if (config.adapter / name).is_file():
            shutil.copyfile(config.adapter / name, run.work / name)
    tokenizer.save_pretrained(run.work)
    answer, report = _reloaded(run, merged, tokenizer, batches, stored, reference)
    note(f"relative difference of logits: merged to adapter {stats['relative_difference']:.1e}, cast to {stored} {after_cast:.1e}, adapter to base {stats['adapter_effect']:.1e}")
    stats |= {"relative_difference_after_cast": after_cast, "dtype": stored, "parameters": setup.count(merged)["total"]}
    return {**stats, "generation": answer, "parity": parity.numbers(report)}


def _merged(model: Any, tokenizer: Any, batches: Sequence[Any], run: Run[MergeConfig]) -> tuple[parity.Reference, Any, list[Any], dict[str, Any]]:
    """(what base plus adapter say, the merged model in fp32, logits of base plus adapter, what changed); refuses where the two do not agree."""
    from ..infer.torch_side import TorchSide, new_texts, reference_of
    from .model import put_adapter

    config = run.config
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    plain = _logits(model, batches)
    wrapped = put_adapter(model, config.adapter).eval()
    wanted = _logits(wrapped, batches)
    reference = reference_of(TorchSide(wrapped, tokenizer, "base with adapter"), config.parity, run.work / _SCRATCH, new_texts(config.adapter, tokenizer))
    changes = _merge(wrapped)
    merged = wrapped.merge_and_unload()
    difference = _difference(_logits(merged, batches), wanted)
    _refuse(config, changes, difference)
    if tied and merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        raise SopError("merging broke the tie of input and output embeddings", where=str(config.adapter), fix="please report this", code=errors.BUG)
    return reference, merged, wanted, {**changes, "relative_difference": difference, "adapter_effect": _difference(wanted, plain), "tied": tied}


def _base(config: MergeConfig) -> str:
    if not (config.adapter / "adapter_config.json").is_file():
        raise SopError("this folder holds no adapter (no adapter_config.json)", where=str(config.adapter), fix="point `adapter` to the output of `sop train sft`")
    return config.base_model or base_of(config.adapter)


def _stored_dtype(model: Any) -> str:
    """The dtype that the checkpoint on disk has, by its config."""
    import transformers

    stored = transformers.AutoConfig.from_pretrained(model.name_or_path, trust_remote_code=False).dtype
    name = str(stored or "float32").replace("torch.", "")
    return name if name in _CAST_BOUND else "float32"


def _probes(tokenizer: Any, config: MergeConfig) -> list[Any]:
    """Token ids `[1, tokens]` of each probe text, and of every new row of an expanded vocabulary (at most 256 of them)."""
    import torch

    from .adapters import new_rows

    found = [torch.tensor([ids]) for ids in tokenizer(list(config.probe))["input_ids"] if ids]
    rows = new_rows(config.adapter)
    if rows:
        found.append(torch.tensor([list(rows)[:: max(len(rows) // 256, 1)][:256]]))
    return found


def _logits(model: Any, batches: Sequence[Any]) -> list[Any]:
    import torch

    with torch.no_grad():
        return [model(input_ids=ids, use_cache=False).logits.float() for ids in batches]


def _difference(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Largest absolute difference over all probes, relative to the largest logit."""
    import torch

    if any(not bool(torch.isfinite(a).all()) for a in found):
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) / max(float(b.abs().max()) for b in wanted)


def _merge(wrapped: Any) -> dict[str, Any]:
    """Merge layer by layer; what changed, and by how much."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = changed = 0
    largest = 0.0
    seen: set[int] = set()
    for module in wrapped.modules():
        if not isinstance(module, BaseTunerLayer) or id(module.get_base_layer().weight) in seen:
            continue  # an output layer tied to the embedding is the same weight again
        weight = module.get_base_layer().weight
        seen.add(id(weight))
        before = weight.detach().clone()
        module.merge(safe_merge=True)
        moved = float((module.get_base_layer().weight.detach() - before).abs().max())
        layers, changed, largest = layers + 1, changed + (moved > 0), max(largest, moved)
    return {"layers": layers, "changed_layers": changed, "largest_change": largest}


def _refuse(config: MergeConfig, changes: dict[str, Any], difference: float) -> None:
    if not changes["changed_layers"]:
        raise SopError("merging changed no weight: the adapter was never trained", where=str(config.adapter), fix="train it first; nothing was written", code=errors.DATA)
    if not difference <= config.tolerance:
        raise SopError(
            f"merged and adapter logits differ by {difference:.2g} relative (at most {config.tolerance:g})", where=str(config.adapter),
            fix="is `base_model` the model that the adapter was trained on? Nothing was written", code=errors.DATA,
        )  # fmt: skip


def _reloaded(run: Run[MergeConfig], merged: Any, tokenizer: Any, batches: Sequence[Any], dtype: str, reference: parity.Reference) -> tuple[dict[str, str], dict[str, Any]]:
    """Load what was written, compare it bit for bit with the model in memory and through the parity gate with base plus adapter, and let it speak."""
    import torch

    from ..infer.torch_side import TorchSide
    from .model import load_model, load_tokenizer

    config, folder = run.config, run.work
    again = load_model(folder, dtype=dtype)
    if _difference(_logits(again, batches), _logits(merged, batches)) > 0:
        raise SopError("the written model answers differently from the one in memory", where=str(folder), fix="check the disk; nothing was published", code=errors.DATA)
    measured = parity.measure(reference, TorchSide(again, load_tokenizer(folder), "merged"), config.parity.margin)
    shutil.rmtree(folder / _SCRATCH)
    bound = getattr(config.parity.bounds, _KINDS[dtype])
    report = parity.enforce(measured, bound, report=folder / parity.REPORT, failed=_output(config).hidden(parity.FAILED), allow=config.allow_divergence)
    prompt = batches[0][:, : max(batches[0].shape[1] // 2, 1)]
    with torch.no_grad():
        out = again.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=config.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)
    return {"prompt": tokenizer.decode(prompt[0]), "answer": tokenizer.decode(out[0, prompt.shape[1] :])}, report


def _preflight(config: MergeConfig) -> list[tuple[str, str, str]]:
    if config.adapter.is_dir() and not is_adapter(config.adapter):
        return [("adapter", "this folder holds no adapter", "point to the output of `sop train sft` with peft.enabled: true")]
    if (read_json(config.adapter, "adapter_config.json") or {}).get("task_type") == "SEQ_CLS":
        return [("adapter", "this is the adapter of a reward model, whose head this command would lose", "train it with merge: true, which merges it itself")]
    if config.tolerance <= 0:
        return [("tolerance", "must be above 0", "")]
    return []


def _output(config: MergeConfig) -> Target:
    return Target(config.output_dir)


def _inputs(config: MergeConfig) -> dict[str, Path | None]:
    return {"adapter": config.adapter, "base": local(_base(config)), "heldout": config.parity.heldout}


def _summary(artifact: Artifact) -> list[str]:
    stats = artifact.stats
    changed = f"{stats['changed_layers']} of {stats['layers']} adapted layers changed"
    return [f"{changed}; merged and adapter logits differ by {stats['relative_difference']:.1e} relative; written as {stats['dtype']}", parity.line(stats["parity"])]


def _next(config: MergeConfig) -> str:
    return f"sop infer chat model={config.output_dir}"


STAGE = Stage(name="train.merge", version=2, config=MergeConfig, output=_output, build=build, apart=True, inputs=_inputs, preflight=_preflight, summary=_summary, next=_next)


def run(config: MergeConfig) -> Artifact:
    """Merge (or find it up to date)."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop train merge`"""
    return stage_main(STAGE, argv)
