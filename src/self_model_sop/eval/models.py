"""Opening a model for evaluation or chat: a folder, an adapter folder, or a hub id, checked against its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import DATA, ENVIRONMENT, SopError
from ..train.model import base_of, is_adapter

Device = Literal["auto", "cpu", "cuda"]


class Opened(NamedTuple):
    """A model in eval mode on its device, with its tokenizer."""

    model: Any
    tokenizer: Any


def open_model(source: str | Path, *, base: str | Path | None = None, dtype: str = "float32", device: Device = "auto") -> Opened:
    """Load a causal model and its tokenizer; of an adapter folder the base that it names, or `base`.

    Raises:
        SopError: where it does not load, is no causal model, or its tokenizer needs more rows than it has.
    """
    import torch

    from ..train import model as loading

    if device == "cuda" and not torch.cuda.is_available():
        raise SopError("no CUDA GPU is usable here", where="device", fix="device=cpu, or device=auto", code=ENVIRONMENT)
    if is_adapter(source):
        model, tokenizer = open_adapter(Path(source), base, dtype)
    elif base is not None:
        raise SopError("no adapter_config.json in this folder", where=str(source), fix="--adapter takes a folder that PEFT training wrote")
    else:
        kind = loading.kind_of(source)
        if kind != "causal":
            fix = "sop tokenizer mlm-loss --model_path ... for masked models" if kind == "masked" else "choose a causal model"
            raise SopError(f"this is a {kind} model; bits per byte and chat need a causal one", where=str(source), fix=fix)
        model, tokenizer = loading.load_model(source, dtype=dtype), loading.load_tokenizer(source)
    check_fit(model, tokenizer, str(source))
    wanted = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return Opened(model.to(wanted).eval(), tokenizer)


def open_adapter(folder: Path, base: str | Path | None, dtype: str) -> tuple[Any, Any]:
    """An adapter on its base model; the tokenizer is the one beside the adapter, where there is one.

    Raises:
        SopError: where the base is missing or the adapter is no safetensors file.
    """
    from ..train.model import load_model, load_tokenizer, put_adapter

    if not (folder / "adapter_model.safetensors").is_file():
        raise SopError("no adapter_model.safetensors in this folder", where=str(folder), fix="adapters must be safetensors; convert .bin files first", code=DATA)
    source = base or base_of(folder)
    tokenizer = load_tokenizer(folder if (folder / "tokenizer_config.json").is_file() else source)
    return put_adapter(load_model(source, dtype=dtype), folder), tokenizer


def check_fit(model: Any, tokenizer: Any, where: str) -> None:
    """Every id of the tokenizer has an embedding row.

    Raises:
        SopError: where the tokenizer is larger than the model.
    """
    rows, needed = model.get_input_embeddings().weight.shape[0], 1 + max(tokenizer.get_vocab().values())
    if needed > rows:
        what = f"the tokenizer needs {needed} embedding rows, the model has {rows}"
        raise SopError(what, where=where, fix="grow the model with `sop tokenizer resize`, or use the tokenizer that belongs to it", code=DATA)


def context_length(model: Any) -> int | None:
    """Positions that the model was made for, None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def free_memory() -> None:
    """Give the memory of a dropped model back before the next one is loaded."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def inputs_of(name: str, source: str | Path) -> Iterator[tuple[str, Path]]:
    """The local folders that decide a model's answers: its own, and an adapter's base."""
    if Path(source).exists():
        yield f"model {name}", Path(source)
    if is_adapter(source):
        base = Path(base_of(source))
        if base.exists():
            yield f"model {name} base", base
