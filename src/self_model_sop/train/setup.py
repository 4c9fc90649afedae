"""Model, adapter and what is trainable, ready for the loop."""

from __future__ import annotations

import inspect
import os
from typing import Any, Literal

from .. import errors
from ..console import note
from ..errors import SopError
from . import adapters
from .adapters import PeftSettings
from .model import load_model, read_config
from .precision import Precision
from .settings import TrainConfig


def quiet() -> None:
    """The libraries' own bars and notices off; what a user needs to know, this project says itself."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="(torch|peft|transformers|accelerate)")


def load_for_training(config: TrainConfig, tokenizer: Any, peft: PeftSettings | None, precision: Precision) -> tuple[Any, dict[str, int]]:
    """(model, {trainable, total, new_rows}); every weight trains unless `peft` is enabled. Seeded, since adapters start at random.

    Raises:
        SopError: where tokenizer and model do not fit together.
    """
    model, rows = load_bare(config, tokenizer, peft, precision)
    if peft and peft.enabled:
        model = adapters.attach(model, peft, rows if peft.new_rows != "freeze" else None)
    place(model, config)
    return model, told(model, rows if peft is None or peft.new_rows != "freeze" else None)


def load_bare(config: TrainConfig, tokenizer: Any, peft: PeftSettings | None, precision: Precision, **options: Any) -> tuple[Any, range | None]:
    """(The model ready for an adapter or for full training, the rows that an expansion appended). Seeded.

    Raises:
        SopError: where tokenizer and model do not fit together.
    """
    import torch
    import transformers

    check_length(config)
    transformers.set_seed(config.seed)
    options = {"attn_implementation": config.attn_implementation, **options}
    dtype = "float32"
    if peft and peft.qlora:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16 if precision.mode == "bf16" else torch.float16
        )
    elif peft and peft.enabled and precision.mode == "bf16" and torch.cuda.is_available():
        dtype = "bfloat16"  # frozen base weights; the adapter stays fp32
    model = load_model(config.model_name_or_path, dtype=dtype, **options)
    make_saveable(model)
    rows = adapters.new_rows(config.tokenizer_source, config.model_name_or_path)
    fits(tokenizer, model, rows, config)
    if peft and peft.qlora:
        import peft as library

        model = library.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if peft and peft.enabled and config.fsdp and rows and peft.new_rows != "freeze":
        fix = "use deepspeed instead of fsdp, or one GPU; peft.new_rows: freeze trains the adapter alone"
        raise SopError("fsdp cannot train single rows of an embedding beside an adapter (torch 2.13 cannot shard them)", where="fsdp", fix=fix)
    return model, rows


def told(model: Any, rows: range | None) -> dict[str, int]:
    """{trainable, total, new_rows} of a model that is ready, said in one line."""
    counts = count(model)
    counts["new_rows"] = len(rows or ())
    share = f"trainable: {counts['trainable']:,} of {counts['total']:,} weights ({counts['trainable'] / counts['total']:.2%})"
    note(share + (f", {len(rows):,} new vocabulary rows among them" if rows else ""))
    return counts


def place(model: Any, config: TrainConfig) -> None:
    """Onto the GPU already for the first measurement, where there is one; sharded and quantised models are placed by their libraries."""
    import torch

    if torch.cuda.is_available() and not config.sharded and not config.training_args.get("use_cpu") and not getattr(model, "is_quantized", False):
        model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))


def check_length(config: TrainConfig) -> None:
    """A sequence fits into the model; of a hub id this is known only now, still before its weights are loaded.

    Raises:
        SopError: where it does not.
    """
    limit = getattr(read_config(config.model_name_or_path), "max_position_embeddings", None)
    key, length = config.sequence_length
    if isinstance(limit, int) and length > limit:
        raise SopError(f"{length:,} tokens, but the model reads at most {limit:,}", where=key, fix=f"set it to {limit} or less")


def make_saveable(model: Any) -> None:
    """Some published generation configs contradict themselves (temperature without sampling); the library refuses to save them, which must not show after the training."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
        note("the model's generation config sets sampling values without do_sample; do_sample: true is saved")


def count(model: Any) -> dict[str, int]:
    """Numbers of trainable and of all weights; tied ones count once."""
    unique = {id(p): p for p in model.parameters()}.values()
    return {"trainable": sum(p.numel() for p in unique if p.requires_grad), "total": sum(p.numel() for p in unique)}


def fits(tokenizer: Any, model: Any, new: range | None, config: TrainConfig) -> None:
    """Every id of the tokenizer, and of its expansion, has a row in the embedding.

    Raises:
        SopError: where the tokenizer has more ids than the embedding has rows.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(*tokenizer.get_vocab().values(), *((new.stop - 1,) if new else ()))
    if highest >= rows:
        raise SopError(
            f"the tokenizer has id {highest:,}, the model's embedding only {rows:,} rows", where=config.tokenizer_source,
            fix="grow the embedding first: sop tokenizer resize; or use the tokenizer that belongs to the model", code=errors.USAGE,
        )  # fmt: skip


def keep_for(model: Any, arguments: dict[str, Any]) -> Literal["none", "index", "mask"]:
    """How the model can be asked for logits of learned positions only. Label smoothing needs all of them."""
    import transformers

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if arguments.get("label_smoothing_factor") or "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return "none"
    return "mask" if hasattr(transformers.modeling_utils, "slice_logits_to_keep") else "index"
