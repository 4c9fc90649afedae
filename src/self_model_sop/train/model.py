"""Loading tokenizers and models: hub ids through the hub's settings, safetensors only, no remote code, dtype named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from ..errors import DATA, ENVIRONMENT, SopError
from ..hub import HubConfig, resolve_model
from .preflight import kind_said, read_json

Kind = Literal["causal", "masked", "seq2seq", "score"]


def load_tokenizer(source: str | Path, hub: HubConfig | None = None) -> Any:
    """A fast tokenizer from a local folder, or of a hub id (`hub`: where it is looked up; none: as the environment says).

    Raises:
        SopError: where the folder holds no tokenizer that loads without remote code, or the hub does not give it.
    """
    from transformers import AutoTokenizer

    folder = resolve_model(source, hub or HubConfig(), weights=False)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        what = f"no tokenizer loads from here: {str(error).splitlines()[0]}"
        raise SopError(what, where=str(source), fix="point to a folder with tokenizer.json, or a hub id that exists") from error


def load_model(source: str | Path, hub: HubConfig | None = None, *, kind: Kind = "causal", dtype: str = "float32", **options: Any) -> Any:
    """A model in eval mode, from a local folder or of a hub id. `dtype` is a torch dtype name or `auto` (the checkpoint's); pickled weights are refused.

    Raises:
        SopError: where no safetensors weights load, or the hub does not give them.
    """
    import transformers

    folder = resolve_model(source, hub or HubConfig())
    refuse_code(folder)
    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "score": transformers.AutoModelForSequenceClassification,
    }[kind]
    try:
        model = auto.from_pretrained(str(folder), dtype=dtype, use_safetensors=True, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        what = f"no {kind} model loads from here: {str(error).splitlines()[0]}"
        raise SopError(what, where=str(source), fix="weights must be safetensors; convert .bin/.pt files first") from error
    except ImportError as error:  # quantised weights
        what = f"its weights need a package that is not installed: {str(error).splitlines()[0]}"
        raise SopError(what, where=str(source), fix="pip install 'self-model-sop[quantize]' in an environment of its own (docs/quantize.md)", code=ENVIRONMENT) from error
    return model.eval()


def load_with_adapter(source: str | Path, hub: HubConfig | None = None, *, dtype: str = "float32", **options: Any) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a folder, whether it holds a model or an adapter (then: its base with the adapter on it, not merged).

    Raises:
        SopError: where base, adapter or tokenizer is missing.
    """
    tokenizer = load_tokenizer(source, hub)
    if not is_adapter(source):
        return load_model(source, hub, dtype=dtype, **options), tokenizer
    return put_adapter(load_model(base_folder(source, hub), dtype=dtype, **options), source).eval(), tokenizer


def put_adapter(model: Any, adapter: str | Path) -> Any:
    """`model` with the adapter of a folder on it.

    Raises:
        SopError: where the adapter does not fit the model.
    """
    import peft

    try:
        return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        what = f"the adapter does not load onto {type(model).__name__}: {str(error).splitlines()[0]}"
        raise SopError(what, where=str(adapter), fix="name the base model that it was trained on") from error


def is_adapter(source: str | Path) -> bool:
    """True for a folder that holds a peft adapter and no model."""
    return (Path(source) / "adapter_config.json").is_file() and not (Path(source) / "config.json").is_file()


def base_of(adapter: str | Path) -> str:
    """The base model that an adapter names: its path as it was, else relative to the adapter (a moved project), else a hub id.

    Raises:
        SopError: where neither is there.
    """
    named = str(json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    if Path(named).is_dir():
        return named
    note = Path(adapter) / "base.json"
    if note.is_file():
        beside = Path(adapter) / json.loads(note.read_text(encoding="utf-8"))["base"]
        if beside.is_dir():
            return str(beside.resolve())
    if not named or named.startswith(("/", ".")):
        raise SopError(f"the base model of this adapter is not there: {named or 'not named'}", where=str(adapter), fix="name it: base_model=FOLDER")
    return named


def base_folder(adapter: str | Path, hub: HubConfig | None = None) -> Path:
    """The folder of the base model that an adapter names; one from the hub at the commit that the adapter was trained on.

    Raises:
        SopError: where it is not there.
    """
    named = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    where = hub or HubConfig()
    return resolve_model(base_of(adapter), dataclasses.replace(where, revision=named.get("revision") or where.revision))


def read_config(source: str | Path, hub: HubConfig | None = None) -> Any:
    """The `PretrainedConfig` of a folder or hub id.

    Raises:
        SopError: where there is none, or one of a type that only the repository's own code knows (exit 3).
    """
    from transformers import AutoConfig

    folder = resolve_model(source, hub or HubConfig(), weights=False)
    refuse_code(folder)
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        what = f"no model config loads from here: {str(error).splitlines()[0]}"
        raise SopError(what, where=str(source), fix="point to a folder with config.json, or a hub id that exists") from error


def refuse_code(folder: Path) -> None:
    """Refuse a model that only the code of its repository can load; code that is not needed is passed over.

    Raises:
        SopError: exit code 3.
    """
    from transformers import CONFIG_MAPPING

    described = read_json(folder, "config.json") or {}
    if described.get("auto_map") and described.get("model_type") not in CONFIG_MAPPING:
        what = f"the model type {described.get('model_type')!r} needs code from its repository; no command runs such code"
        raise SopError(what, where=str(folder), fix="choose a model of a type that transformers knows", code=DATA)


def kind_of(source: str | Path, hub: HubConfig | None = None) -> Kind:
    """Which kind of model a folder or hub id holds, by the architecture that its config names.

    Raises:
        SopError: where there is no config, or an architecture without a language-model head.
    """
    config = read_config(source, hub)
    names = config.architectures or []
    kind = kind_said({"architectures": names, "is_encoder_decoder": config.is_encoder_decoder})
    if kind:
        return kind
    raise SopError(f"no language-model head in the architectures {names}", where=str(source), fix="choose a causal, masked or sequence-to-sequence language model")
