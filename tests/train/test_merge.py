"""Merging adapters, on tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from self_model_sop.errors import DATA, SopError
from self_model_sop.train import merge, sft
from self_model_sop.train.model import load_model, load_tokenizer, load_with_adapter
from tiny_models import tiny_llama, tiny_qwen
from tiny_runs import chats, config_of, expanded, run, sft_settings


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merge")
    for name, make in (("qwen", tiny_qwen), ("llama", tiny_llama)):
        expanded(make(path / name))
        run(sft.STAGE, sft_settings(path / name, chats(path / "chats.jsonl"), path / f"{name}_adapter"))
    return path


def _merge(root: Path, adapter: Path, name: str, **more: Any) -> Any:
    return run(merge.STAGE, {"adapter": adapter, "output_dir": root / "out" / name, **more})


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_the_merged_model_answers_as_base_and_adapter_do(root: Path, name: str) -> None:
    done = _merge(root, root / f"{name}_adapter", name)
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "expansion.json", "generation_config.json"} <= {p.name for p in done.path.iterdir()}
    assert done.stats["relative_difference"] <= 1e-4 and done.stats["adapter_effect"] > 1e-2 and done.stats["tied"] == (name == "qwen")
    assert done.stats["changed_layers"] == done.stats["layers"] == 4 * 2 + (1 if name == "qwen" else 2)
    ids = torch.arange(3, 540)[None]
    wrapped, _ = load_with_adapter(root / f"{name}_adapter")
    with torch.no_grad():
        assert torch.allclose(load_model(done.path)(ids).logits, wrapped(ids).logits, atol=1e-4)
    own, base = load_tokenizer(done.path), load_tokenizer(root / name)
    assert own.get_vocab() == base.get_vocab() and own.chat_template == load_tokenizer(root / f"{name}_adapter").chat_template


def test_the_dtype_is_the_base_models_or_what_is_asked_for(root: Path) -> None:
    done = _merge(root, root / "qwen_adapter", "half", dtype="bfloat16")
    assert {t.dtype for t in load_file(done.path / "model.safetensors").values()} == {torch.bfloat16}
    assert 0 < done.stats["relative_difference_after_cast"] < 0.15


def test_an_untrained_adapter_is_refused_and_nothing_is_written(root: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(root / "qwen_adapter", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    base = load_model(root / "qwen").get_input_embeddings().weight.detach()[500:540]
    for name, tensor in weights.items():
        weights[name] = torch.zeros_like(tensor) if "lora_B" in name else base.clone() if "token" in name else tensor
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(SopError, match="changed no weight") as error:
        _merge(tmp_path, adapter, "none")
    assert error.value.code == DATA and not list((tmp_path / "out" / "none").glob("*.safetensors"))


def test_a_merge_that_answers_differently_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    real = Linear.merge

    def wrong(self: Any, *args: Any, **kwargs: Any) -> None:  # a library whose merge is off by a percent
        real(self, *args, **kwargs)
        self.get_base_layer().weight.data *= 1.01

    monkeypatch.setattr(Linear, "merge", wrong)
    with pytest.raises(SopError, match="merged and adapter logits differ") as error:
        _merge(tmp_path, root / "qwen_adapter", "wrong")
    assert error.value.code == DATA


def test_a_base_that_does_not_fit_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SopError, match="does not load"):
        _merge(tmp_path, root / "qwen_adapter", "other", base_model=str(tiny_qwen(tmp_path / "wide", hidden_size=128)))


def test_not_an_adapter(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SopError, match="holds no adapter"):
        _merge(tmp_path, root / "qwen", "model")


def test_a_changed_base_is_another_artifact(root: Path, tmp_path: Path) -> None:
    first = _merge(tmp_path, root / "qwen_adapter", "same")
    assert _merge(tmp_path, root / "qwen_adapter", "same").skipped
    inputs = merge.STAGE.inputs(config_of(merge.STAGE, {"adapter": root / "qwen_adapter"}))
    assert inputs["base"] == root / "qwen"
    assert json.loads((first.path / "manifest.json").read_text())["inputs"]["base"]["path"] == str(root / "qwen")
