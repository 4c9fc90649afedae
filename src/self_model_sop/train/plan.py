"""What a run will take: parameters, tokens, steps, memory by part, disk, time; from config.json, safetensors headers and file sizes, nothing loaded."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..console import human_seconds
from . import machine
from .adapters import EXPANSION, PeftSettings, new_rows
from .preflight import read_json, weight_shapes
from .settings import TrainConfig, paths

GIB = 1 << 30
_PROCESS = 600 << 20  # interpreter, libraries and their buffers
_CAST = 0.68  # bytes of activations under autocast, as a share of those in fp32: norms, softmax and the residual stream stay fp32
Phase = tuple[str, str, Mapping[str, Any]]  # name, what is trained, its training_args


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory. Numbers of weights; `layers`, `hidden`, `intermediate`, `heads`, `vocabulary` as in its config; `keys`: width of its keys."""

    parameters: int
    embedding: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    keys: int
    vocabulary: int
    bytes_on_disk: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a training by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    rest: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.rest


def shape_of(folder: str | Path) -> Shape | None:
    """The shape of a local model folder; None for a hub id or an unknown architecture."""
    config, weights = read_json(folder, "config.json"), weight_shapes(folder)
    if not config or not weights:
        return None
    config = config.get("text_config") or config
    sizes = {name: _product(shape) for name, (shape, _) in weights.items()}
    embedding = max((n for name, n in sizes.items() if "embed" in name or "wte" in name), default=0)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    if not hidden or not layers:
        return None
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    keys = int(config.get("num_key_value_heads") or heads) * int(config.get("head_dim") or hidden // heads)
    return Shape(
        sum(sizes.values()), embedding, layers, hidden, int(config.get("intermediate_size") or 4 * hidden), heads, keys, int(config.get("vocab_size") or 0),
        sum(p.stat().st_size for p in Path(folder).glob("*.safetensors")),
    )  # fmt: skip


def _product(shape: Sequence[int]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def trainable(shape: Shape, train: str, peft: PeftSettings | None, rows: int, folder: str | Path) -> int:
    """How many weights get a gradient."""
    if train == "new_rows":
        return rows * shape.hidden
    if train == "embeddings":
        return shape.embedding
    if peft is None or not peft.enabled:
        return shape.parameters
    wanted = peft.target_modules
    matrices = {n: s for n, (s, _) in weight_shapes(folder).items() if len(s) == 2 and n.endswith(".weight") and "embed" not in n and "lm_head" not in n}
    adapted = [s for n, s in matrices.items() if isinstance(wanted, str) or n.removesuffix(".weight").rsplit(".", 1)[-1] in wanted]
    return sum(peft.lora_r * (s[0] + s[1]) for s in adapted) + (rows * shape.hidden if peft.new_rows != "freeze" else 0)


@dataclass(frozen=True)
class Rows:
    """How training rows look: `length` tokens at most; `packed`: several texts in one, told apart by a mask; `one`: the whole batch in one row; `share`: part of the tokens
    that is learned; `eager` attention; `each`: rows of one example (a pair has two); `steps`, where they are known; `compared`: with the states of a teacher."""

    length: int
    packed: bool = False
    one: bool = False
    share: float = 1.0
    eager: bool = False
    each: int = 1
    steps: int | None = None
    compared: bool = False


def memory(shape: Shape, learned: int, arguments: Mapping[str, Any], rows: Rows, *, peft: PeftSettings | None, half: bool) -> Memory:
    """Bytes that a training takes at its peak, which is where a backward pass begins or where the optimizer steps.

    What a layer keeps for its backward pass was counted with torch's saved-tensor hooks on Llama layers (`benchmarks/training/memory.py --saved`).

    Args:
        shape: the model.
        learned: weights with a gradient.
        arguments: training_args.
        rows: what a row of the batch looks like.
        peft: adapter settings; frozen layers keep their inputs only where an adapter needs them.
        half: computing in bf16 or fp16 (autocast over fp32 weights).
    """
    tokens = int(arguments.get("per_device_train_batch_size", 8)) * rows.length * rows.each
    each = _kept(shape, rows, tokens if rows.one else rows.length, peft, frozen=learned < shape.parameters / 2)
    checkpointed = arguments.get("gradient_checkpointing") or arguments.get("activation_checkpointing")
    floats = shape.layers * shape.hidden + each if checkpointed else shape.layers * each
    activations = int(tokens * (floats + (6 if rows.compared else 3) * shape.hidden) * 4 * (_CAST if half else 1))
    logits = int(tokens * rows.share * shape.vocabulary * 4 * 3)  # themselves, their logarithm, and its gradient
    copies = shape.parameters * 2 if half else 0  # autocast keeps a cast copy of each weight during a pass
    stored = shape.parameters * (1 if peft and peft.qlora else 4)
    # gradients grow while activations are given back: of the two only the larger counts
    gradients = max(learned * 4 - activations - logits, 0)
    return Memory(stored, gradients, learned * 8, activations, logits, copies + _PROCESS)


def _kept(shape: Shape, rows: Rows, width: int, peft: PeftSettings | None, *, frozen: bool) -> int:
    """Floats that one layer keeps of one token, in a row of `width` tokens, for its backward pass."""
    keys = shape.hidden if rows.packed else shape.keys  # with a mask, keys and values are repeated for every head
    attention = 2 * keys + (width if rows.packed else 0) + (2 * shape.heads * width if rows.eager else 0)
    if not frozen:
        return 8 * shape.hidden + 4 * shape.intermediate + attention
    if peft is None or not peft.enabled:
        return 4 * shape.hidden + 3 * shape.intermediate + attention
    wide = isinstance(peft.target_modules, str) or bool({"down_proj", "gate_proj", "up_proj"} & set(peft.target_modules))
    return (6 if wide else 5) * shape.hidden + (4 if wide else 3) * shape.intermediate + attention


def lines(config: TrainConfig, phases: Sequence[Phase], files: Sequence[Path], *, peft: PeftSettings | None, layout: Rows, distilled: Sequence[str] = ()) -> list[str]:
    """The plan in words; phases named in `distilled` have a teacher, which reads every token in its base pieces, forward only and without the output layer."""
    shape = shape_of(config.model_name_or_path)
    if shape is None:
        return [f"model: {config.model_name_or_path} is not here yet (or of an unknown shape): no estimate of memory and time"]
    rows = len(new_rows(config.tokenizer_source, config.model_name_or_path) or ())
    tokens, length, half = _tokens(files), layout.length, _half(config)
    out = [f"model: {shape.parameters:,} weights" + (f", {rows:,} new vocabulary rows" if rows else "")]
    out.append(f"data: {_size(files)}, about {tokens:,} tokens, sequences of at most {length:,}")
    speed = None if machine.gpus() else machine.training_flops(half=half)
    largest, fitting, longer = 0, "", _longer(config.tokenizer_source, config.model_name_or_path) if distilled else None
    for name, train, arguments in phases:
        taught = name in distilled
        layout = dataclasses.replace(layout, compared=taught)
        learned, each = trainable(shape, train, peft, rows, config.model_name_or_path), _tokens_per_step(arguments, length) * layout.each
        steps = layout.steps or _steps(arguments, tokens, length)
        parts = memory(shape, learned, arguments, layout, peft=peft, half=half)
        if parts.total > largest:
            largest = parts.total
            fitting = _nearest(shape, learned, arguments, layout, peft=peft, half=half)
        work = min(steps * each, round(float(arguments.get("num_train_epochs", 3)) * tokens) if int(arguments.get("max_steps", -1)) < 1 else steps * each)
        seconds = work * shape.parameters * (4 if learned < shape.parameters / 2 else 6) + taught * work * (longer or 1) * 2 * (shape.parameters - shape.embedding)
        time_here = f", about {human_seconds(seconds / speed)} on this machine when it is idle" if speed else ""
        out.append(f"{name}: trains {learned:,} weights ({learned / shape.parameters:.2%}), {steps:,} steps of at most {each:,} tokens{time_here}")
        if taught:
            counted = " (in the time above)" if speed else ""
            out.append(f"  its teacher reads {f'about {longer:.1f}' if longer else 'at least 1'} base tokens for each of them, forward only{counted}")
        out.append("  memory: " + ", ".join(f"{key} {value / GIB:.2f}" for key, value in vars(parts).items()) + f" = {parts.total / GIB:.1f} GiB")
    return [*out, *_against_machine(config, largest, fitting)]


def _longer(*folders: str | Path) -> float | None:
    """Base tokens for one of the extended tokenizer, as its expansion measured on held-out text; None where it left no curve."""
    records = (read_json(folder, EXPANSION) for folder in folders)
    reduction = next((record["curve"][-1]["reduction"] for record in records if record and record.get("curve")), None)
    return None if reduction is None else 1 / (1 - reduction)


def disk(config: TrainConfig) -> int:
    """Bytes that a training may write: checkpoints of what it trains (fp32, with two moments), and the result beside them. 0 where the model is not here yet."""
    shape, peft = shape_of(config.model_name_or_path), getattr(config, "peft", None)
    if shape is None:
        return 0
    rows = len(new_rows(config.tokenizer_source, config.model_name_or_path) or ()) if peft else 0
    return trainable(shape, "all", peft, rows, config.model_name_or_path) * 4 * (3 * _checkpoints(config) + 1)


def _checkpoints(config: TrainConfig) -> int:
    """How many lie there at most: one more than are kept, while it is written; at least the one that a signal asks for."""
    data: Any = vars(config)["data"]  # of another kind in each stage
    arguments, files = config.training_args, [f for f in paths(data.train_file) if f.exists()]
    steps = max((phase.max_steps or 0 for phase in getattr(config, "phases", ())), default=0) or _steps(arguments, _tokens(files), config.sequence_length[1])
    every = float(arguments.get("save_steps", 500))
    made = int(steps / every if every >= 1 else 1 / max(every, 0.01))  # below 1: a share of the steps
    return max(min(made, int(arguments.get("save_total_limit") or 2) + 1 + bool(arguments.get("load_best_model_at_end"))), 1)


def _nearest(shape: Shape, learned: int, arguments: Mapping[str, Any], layout: Rows, *, peft: PeftSettings | None, half: bool) -> str:
    """The setting nearest to this one that fits into the machine's memory, as keys of training_args: smaller batches first, then gradient checkpointing; "" where none does."""
    from .attempts import halved

    have, tried = _memory_here(), dict(arguments)
    for extra in ({}, {"gradient_checkpointing": True}):
        tried = {**arguments, **extra}
        while True:
            need = memory(shape, learned, tried, layout, peft=peft, half=half).total
            if need <= have:
                changed = {k: v for k, v in tried.items() if arguments.get(k) != v}
                return " ".join(f"training_args.{k}={str(v).lower()}" for k, v in changed.items()) + f" ({need / GIB:.1f} GiB)"
            smaller = halved(tried)
            if smaller is None:
                break
            tried |= smaller
    return ""


def _memory_here() -> int:
    return min((d.memory for d in machine.gpus()), default=machine.memory_available())


def _half(config: TrainConfig) -> bool:
    """Whether the run will compute in bf16 or fp16 (the same choice as precision.choose, without torch)."""
    if config.precision != "auto":
        return config.precision != "fp32"
    return bool(machine.gpus()) or bool(machine.cpu_bf16())


def _against_machine(config: TrainConfig, need: int, fitting: str) -> Iterator[str]:
    devices, have = machine.gpus(), _memory_here()
    what = f"{len(devices)} x {devices[0].name}, {have / GIB:.1f} GiB each" if devices else f"{machine.cores()} CPU cores, {have / GIB:.1f} GiB of memory free"
    yield f"this machine: {what}" + ("" if need <= have else f" - too little for {need / GIB:.1f} GiB")
    if need > have:
        from .attempts import fixes

        yield f"  nearest setting that fits: {fitting or 'none with smaller batches and gradient checkpointing'}"
        yield from (f"  try {fix}" for fix in fixes(config)[:3])
    folder = config.target().folder
    while not folder.exists():
        folder = folder.parent
    writes, free = disk(config), shutil.disk_usage(folder).free
    yield f"disk: at most {writes / GIB:.1f} GiB while training, {free / GIB:.1f} GiB free" + ("" if writes * 1.2 <= free else " - too little")


def _tokens_per_step(arguments: Mapping[str, Any], length: int) -> int:
    return int(arguments.get("per_device_train_batch_size", 8)) * int(arguments.get("gradient_accumulation_steps", 1)) * length


def _steps(arguments: Mapping[str, Any], tokens: int, length: int) -> int:
    if int(arguments.get("max_steps", -1)) > 0:
        return int(arguments["max_steps"])
    return max(round(float(arguments.get("num_train_epochs", 3)) * tokens / _tokens_per_step(arguments, length)), 1)


def _tokens(files: Sequence[Path]) -> int:
    """About one token for 3 bytes of text, Chinese or English; a file's JSON frame taken into account by a tenth."""
    return int(sum(_bytes(f) for f in files) * 0.9 / 3)


def learned_share(files: Sequence[Path], rows: int = 200) -> float:
    """About which part of the tokens is the assistant's: by characters, of the first rows."""
    from ..data import records
    from ..data.formats import RowError, to_messages

    own = every = 1
    for record in islice(records.read(files), rows):
        try:
            messages = to_messages(record.row) if record.row is not None else []
        except RowError:
            continue
        lengths = [(len(str(message.get("content") or "")), message["role"] == "assistant") for message in messages]
        own, every = own + sum(n for n, mine in lengths if mine), every + sum(n for n, _ in lengths)
    return own / every


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())


def _size(files: Sequence[Path]) -> str:
    return f"{sum(_bytes(f) for f in files) / (1 << 20):.1f} MiB in {len(files)} file(s)"
