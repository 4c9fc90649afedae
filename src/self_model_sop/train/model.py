"""Loading tokenizers and models: safetensors only, no remote code, dtype named."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..errors import SopError

Kind = Literal["causal", "masked", "seq2seq"]


def load_tokenizer(source: str | Path) -> Any:
    """A fast tokenizer from a local folder (or a hub id, through the cache).

    Raises:
        SopError: where the folder holds no tokenizer that loads without remote code.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        what = f"no tokenizer loads from here: {str(error).splitlines()[0]}"
        raise SopError(what, where=str(source), fix="point to a folder with tokenizer.json, or a hub id that exists") from error


def load_model(source: str | Path, *, kind: Kind = "causal", dtype: str = "float32", **options: Any) -> Any:
    """A model in eval mode. `dtype` is a torch dtype name or `auto` (the checkpoint's); pickled weights are refused.

    Raises:
        SopError: where no safetensors weights load.
    """
    import transformers

    auto = {"causal": transformers.AutoModelForCausalLM, "masked": transformers.AutoModelForMaskedLM, "seq2seq": transformers.AutoModelForSeq2SeqLM}[kind]
    try:
        model = auto.from_pretrained(str(source), dtype=dtype, use_safetensors=True, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        what = f"no {kind} model loads from here: {str(error).splitlines()[0]}"
        raise SopError(what, where=str(source), fix="weights must be safetensors; convert .bin/.pt files first") from error
    return model.eval()


def kind_of(source: str | Path) -> Kind:
    """Which kind of model a folder or hub id holds, by the architecture that its config names.

    Raises:
        SopError: where there is no config, or an architecture without a language-model head.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SopError(f"no model config loads from here: {str(error).splitlines()[0]}", where=str(source), fix="point to a folder with config.json, or a hub id that exists") from error
    names = config.architectures or []
    if config.is_encoder_decoder:
        return "seq2seq"
    if any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names):
        return "masked"
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        return "causal"
    raise SopError(f"no language-model head in the architectures {names}", where=str(source), fix="choose a causal, masked or sequence-to-sequence language model")
