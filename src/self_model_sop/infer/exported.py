"""What every export of a whole model asks of the folder it is given, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..train.model import is_adapter


def misfits(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Why a folder is no whole, unquantised model: problems of `model_path` as a stage's preflight gives them."""
    if is_adapter(folder):
        yield "model_path", "this folder holds an adapter", "merge it first: sop train merge"
        return
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        yield "model_path", "this folder holds no model (config.json and *.safetensors)", "point to the output of sop train merge, pretrain or sft; pickled weights are not read"
        return
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if named:
        yield "model_path", f"its weights are quantised already ({named.get('quant_method')})", "export the model that it was made from"


def weights_bytes(folder: Path) -> int:
    """Size of a model's weights, bytes."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))
