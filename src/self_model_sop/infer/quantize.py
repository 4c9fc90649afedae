"""What GPTQ and AWQ share: settings, checks before anything is loaded, calibration, the library's call, and the parity gate before anything is published."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import errors
from ..artifact import Target
from ..config import option
from ..console import note
from ..errors import SopError, missing_extra
from ..eval.models import Device
from ..stage import Artifact, Run
from ..train.adapters import EXPANSION
from . import calibration, exported, parity
from .parity import Kind, Parity

GROUP_SIZES = (128, 64, 32)  # and -1, one group per row: what vLLM's kernels read
KINDS: dict[int, Kind] = {4: "q4", 8: "q8"}
_LOG = ".library.log"
_SMALLEST = 16  # tokens in a sample
_KEPT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja",
    "generation_config.json", EXPANSION,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """`config/infer_config/gptq.yaml` and `awq.yaml`."""

    model_path: Path = option(Path("self_model/checkpoints/merged"), "folder of a full model", path="input", flag="--model_path")
    output_path: Path = option(Path("exports/quantized"), "folder of the quantised model", path="output", flag="--output_path")
    bits: int = option(4, "bits of a weight: 4 or 8 (AWQ: 4)", flag="--bits")
    group_size: int = option(128, "weights that share a scale: 128, 64, 32, or -1 for a whole row; must divide the layers' inputs", flag="--group_size")
    calib_data: tuple[Path, ...] = option((Path("data_process/final_data"),), "folders of sop data process, or files of any format", path="input", flag="--calib_data")
    calib_samples: int = option(128, "windows of calibration text", flag="--calib_samples")
    calib_seq_len: int = option(512, "tokens of each", flag="--calib_seq_len")
    seed: int = option(0, "which rows of the calibration text are taken")
    device: Device = option("auto", "where the model is quantised and measured; auto: a GPU where there is one", flag="--device")
    allow_divergence: bool = option(False, "publish also what is out of bounds, with that on record", flag="--allow_divergence")
    parity: Parity = option(factory=lambda: Parity(heldout=Path("data_process/final_data/pretrain/validation.jsonl")))


Quantise = Callable[[Config, Path, list[dict[str, Any]], Any, str], list[dict[str, Any]]]
"""(config, output folder, calibration, tokenizer, device) -> the library's record of each layer that it quantised."""


# --- before anything is loaded ---------------------------------------------------------------------------------------------------------------


def problems(config: Config, bits: Sequence[int]) -> Iterator[tuple[str, str, str]]:
    """What the settings alone and the headers of the weights say, without torch."""
    if config.bits not in bits:
        yield "bits", f"{config.bits} bits are not written here", "one of " + ", ".join(map(str, bits))
    if config.group_size not in (*GROUP_SIZES, -1):
        yield "group_size", f"{config.group_size} is no group size that vLLM reads", "one of " + ", ".join(map(str, (*GROUP_SIZES, -1)))
    if config.calib_samples < 1 or config.calib_seq_len < _SMALLEST:
        yield "calib_samples", f"needs at least 1 sample of at least {_SMALLEST} tokens", "the defaults are 128 samples of 512 tokens"
    heldout = config.parity.heldout
    if heldout is not None and any(path.exists() for path in config.calib_data):
        files = calibration.training_files([path for path in config.calib_data if path.exists()])
        if any(file.resolve() == heldout.resolve() for file in files):
            fix = "name another file: judged on the text that it was fitted to, a model looks far better than it is"
            yield "calib_data", "this is the text that the result is judged on (parity.heldout)", fix
    if config.model_path.is_dir():
        yield from _misfits(config)


def _misfits(config: Config) -> Iterator[tuple[str, str, str]]:
    folder = config.model_path
    found = list(exported.misfits(folder))
    yield from found
    if found:
        return
    if config.group_size > 0:
        widths = inputs_of_layers(folder)
        bad = sorted(n for n in widths if n % config.group_size)
        if bad:
            fitting = [size for size in GROUP_SIZES if not any(n % size for n in widths)]
            nearest = min(fitting, key=lambda size: abs(size - config.group_size), default=-1)
            yield "group_size", f"{config.group_size} does not divide the inputs of its layers ({', '.join(map(str, bad))})", f"--group_size {nearest}"


def inputs_of_layers(folder: Path) -> set[int]:
    """Input sizes of the linear layers that will be quantised (not of embeddings and the output layer), from the headers of the weights."""
    shapes = {name: shape for file in sorted(folder.glob("*.safetensors")) for name, shape in _shapes(file).items()}
    return {shape[1] for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight") and _in_a_layer(name)}


def _in_a_layer(name: str) -> bool:
    """Layers of a transformer are numbered; embeddings, the output layer and what chooses experts are not quantised."""
    return any(part.isdigit() for part in name.split(".")) and not name.endswith((".gate.weight", ".router.weight"))


def _shapes(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of a safetensors file (8 bytes of length, then JSON), nothing else read."""
    try:
        with file.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise SopError("this is no safetensors file", where=str(file), fix="save the model again", code=errors.DATA) from error


def need_library() -> None:
    """Refuse where gptqmodel, or what transformers loads its models with, is missing (exit 4)."""
    for package in ("gptqmodel", "optimum"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "quantize")


def device_of(config: Config) -> str:
    """`cuda` or `cpu`.

    Raises:
        SopError: exit 4 where a GPU is asked for and none is usable.
    """
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise SopError("no CUDA GPU is usable here", where="device", fix="device=cpu, or device=auto", code=errors.ENVIRONMENT)
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def half(folder: Path, device: str) -> str:
    """The dtype of what is not quantised: bfloat16, which holds any weight that was trained; float16 where the source has it and the device multiplies it (CPUs emulate it)."""
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "float16" if device == "cuda" and (named.get("dtype") or named.get("torch_dtype")) == "float16" else "bfloat16"


# --- building ---------------------------------------------------------------------------------------------------------------------------------------


def build(run: Run[Any], quantise: Quantise) -> dict[str, Any]:
    """Ask the source, calibrate and quantise, load the result with transformers, compare; returns the stats.

    Raises:
        SopError: exit 3 where the result answers too differently; exit 4 where the library is missing.
    """
    from ..eval.models import free_memory, open_model
    from ..train import setup
    from .torch_side import TorchSide, new_texts, reference_of

    config: Config = run.config
    device = device_of(config)
    need_library()
    setup.quiet()
    scratch = run.work / ".scratch"
    scratch.mkdir()
    with _library(scratch / _LOG):
        model, tokenizer = open_model(config.model_path, device=config.device)
        _check_window(model, config)
        files = calibration.training_files(config.calib_data)
        chosen = calibration.collect(files, tokenizer, samples=config.calib_samples, length=config.calib_seq_len, seed=config.seed, heldout=config.parity.heldout)
        reference = reference_of(TorchSide(model, tokenizer, "source"), config.parity, scratch / "reference", new_texts(config.model_path, tokenizer))
        del model
        free_memory()
        note(f"quantising to {config.bits} bits on {device}, calibrated on {chosen.facts['tokens']:,} tokens of {chosen.facts['rows_used']:,} rows")
        samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in chosen.samples]
        with _explained():
            _logs_to(scratch)
            layers = quantise(config, run.work, samples, tokenizer, device)
            free_memory()
            _tidy(config.model_path, run.work)
            model, tokenizer = open_model(run.work, dtype="auto" if device == "cuda" else "float32", device=config.device)
        side = TorchSide(model, tokenizer, "export")
        measured = parity.measure(reference, side, config.parity.margin)
        asked = reference.asked[0]
        answer = tokenizer.decode(side.answers([asked.prompt], len(asked.answer))[0])
    shutil.rmtree(scratch)
    report = _enforced(run, measured)
    return {
        "bits": config.bits, "group_size": config.group_size, "calibration": chosen.facts, **_layers(run.work, layers),
        "bytes": exported.weights_bytes(run.work), "source_bytes": exported.weights_bytes(config.model_path), "answer": {"prompt": asked.text, "text": answer},
        "parity": parity.numbers(report),
    }  # fmt: skip


def _enforced(run: Run[Any], measured: dict[str, Any]) -> dict[str, Any]:
    config: Config = run.config
    bound = getattr(config.parity.bounds, KINDS[config.bits])
    failed = Target(config.output_path).hidden(parity.FAILED)
    fix = "nothing was published; more or other calibration text, a smaller --group_size or --bits 8 keep more, --allow_divergence publishes it with this on record"
    return parity.enforce(measured, bound, report=run.work / parity.REPORT, failed=failed, allow=config.allow_divergence, fix=fix)


def _check_window(model: Any, config: Config) -> None:
    from ..eval.models import context_length

    limit = context_length(model)
    if limit is not None and config.calib_seq_len > limit:
        raise SopError(f"the model reads at most {limit:,} tokens", where="calib_seq_len", fix=f"--calib_seq_len {limit}")


@contextlib.contextmanager
def _library(log: Path) -> Iterator[None]:
    """gptqmodel's surroundings: its progress and tables go to a file.

    Its pools want two workers at least; without the setting for its packing loop it would call a C++ compiler in the middle of the work.
    """
    from ..train import machine

    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, machine.cores())))
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with log.open("w", encoding="utf-8") as f, contextlib.redirect_stdout(f):
            yield
    finally:
        logging.disable(before)


def _logs_to(folder: Path) -> None:
    """gptqmodel writes a log into `logs` of the working directory, which is the user's; this constant of it is the only way to another place."""
    from gptqmodel.looper import loop_processor

    loop_processor._PROJECT_LOG_DIR = folder


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """The library's errors as ours: what it cannot do it says in many types."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, RuntimeError, AttributeError, ImportError, LookupError) as error:
        said = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        what = f"gptqmodel cannot quantise or load this model: {said}"
        if "out of memory" in said:
            raise SopError(what, fix="a smaller --calib_seq_len, or a machine with more memory", code=errors.ENVIRONMENT) from error
        raise SopError(what, fix="is its architecture one that gptqmodel knows? sop infer gguf exports by another way", code=errors.DATA) from error


def _tidy(source: Path, work: Path) -> None:
    """Tokenizer, template and generation settings byte for byte as they are beside the source; the library's timings are no part of a model."""
    for name in _KEPT:
        (work / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, work / name)
    (work / "quant_log.csv").unlink(missing_ok=True)


def _layers(folder: Path, log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many layers were quantised and how well, by the library's own record.

    Raises:
        SopError: where embeddings or the output layer were quantised too: an expanded vocabulary must stay as it was trained.
    """
    names = [name.removesuffix(".qweight") for file in sorted(folder.glob("*.safetensors")) for name in _shapes(file) if name.endswith(".qweight")]
    strangers = [name for name in names if not _in_a_layer(name)]
    if strangers or not names:
        what = f"these were quantised too: {', '.join(strangers)}" if strangers else "no layer was quantised"
        raise SopError(what, where=str(folder), fix="please report this", code=errors.BUG)
    losses = []
    for entry in log:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            losses.append((float(entry["loss"]), f"{entry['layer']}.{entry['module']}"))
    usable = [pair for pair in losses if math.isfinite(pair[0])]
    return {"layers": len(names), "largest_layer_loss": dict(zip(("loss", "layer"), max(usable), strict=True)) if usable else None}


# --- what the stages are made of ------------------------------------------------------------------------------------------------------------------


def inputs(config: Config) -> dict[str, Path | None]:
    """The model, each file of calibration text, and the held-out text."""
    files = calibration.training_files(config.calib_data)
    return {"model": config.model_path, **{f"calibration {i}": path for i, path in enumerate(files)}, "heldout": config.parity.heldout}


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    calibrated = f"calibrated on {config.calib_samples} x {config.calib_seq_len} tokens of {', '.join(map(str, config.calib_data))}"
    missing = [] if importlib.util.find_spec("gptqmodel") else ["gptqmodel is not installed: pip install 'self-model-sop[quantize]'"]
    return [f"{config.model_path} -> {config.output_path}: {config.bits} bits, groups of {config.group_size}", calibrated, *missing]


def summary(artifact: Artifact) -> list[str]:
    """Size, calibration and parity, one line each."""
    stats = artifact.stats
    found = stats["calibration"]
    return [
        f"{stats['layers']} layers in {stats['bits']} bits: {stats['bytes'] / 2**20:,.0f} MiB (source {stats['source_bytes'] / 2**20:,.0f} MiB)",
        f"calibrated on {found['tokens']:,} tokens: {found['passages']} passages, {found['conversations']} conversations", parity.line(stats["parity"]),
    ]  # fmt: skip
