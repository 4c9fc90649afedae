"""F60: pickled weights that reach evaluation, chat or the resize stage are refused there too, and never unpickled."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.errors import SopError
from self_model_sop.eval.models import open_model
from self_model_sop.tokenizer import resize
from self_model_sop.tokenizer.settings import TokenizerConfig
from tiny_extensions import WORDS, extend_bpe
from tiny_models import tiny_qwen


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.canary, "the payload ran")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_qwen(tmp_path / "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_f60_models_to_measure_or_talk_to(model: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(SopError, match="no causal model loads from here") as caught:
        open_model(model)
    assert "safetensors" in (caught.value.fix or "") and not canary.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_f60_adapters(model: Path, tmp_path: Path, name: str) -> None:
    canary, adapter = tmp_path / "canary", tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / name).write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(SopError, match=r"no adapter_model\.safetensors"):
        open_model(adapter)
    assert not canary.exists()


def test_f60_the_model_to_resize(model: Path, tmp_path: Path) -> None:
    canary, pickled = tmp_path / "canary", tmp_path / "pickled"
    extended = extend_bpe(model, WORDS, tmp_path / "extended")
    shutil.copytree(model, pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))
    config = TokenizerConfig(base_tokenizer=str(model), base_model=str(pickled), extended_tokenizer=extended, extended_model=tmp_path / "out", work_dir=tmp_path / "work")
    with pytest.raises(SopError, match="no causal model loads from here"):
        resize.run(config)
    assert not canary.exists() and not (tmp_path / "out" / "manifest.json").exists()
