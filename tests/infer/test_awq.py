"""AWQ: refused without a GPU unless it is asked for by name; and (where gptqmodel is installed) the real search on a tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from self_model_sop.config import ConfigError
from self_model_sop.errors import ENVIRONMENT, SopError
from self_model_sop.infer import awq
from self_model_sop.train.model import load_model
from tiny_models import tiny_llama
from tiny_runs import chats, run, texts

LIBRARY = importlib.util.find_spec("gptqmodel") is not None and importlib.util.find_spec("optimum") is not None
needs_library = pytest.mark.skipif(not LIBRARY, reason="gptqmodel is not installed here: pip install 'self-model-sop[quantize]' (its numpy and protobuf differ from the core's)")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("awq")
    model = load_model(tiny_llama(path / "model", hidden_size=128, layers=1))  # AWQ wants outputs that 64 divides, keys and values too
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj.weight" in name:
                parameter.mul_(6)
    model.save_pretrained(path / "model")
    texts(path / "final/pretrain/train.jsonl", 60)
    texts(path / "final/pretrain/validation.jsonl", 10, seed=9)
    chats(path / "final/finetune/train.jsonl", 20)
    return path


def settings(root: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "model_path": root / "model", "output_path": out, "group_size": 64, "calib_data": [str(root / "final")], "calib_samples": 4, "calib_seq_len": 64,
        "parity__heldout": root / "final/pretrain/validation.jsonl", "parity__prompts": 4, "parity__tokens": 8, "parity__lines": 50,
        "parity__bounds__q4": {"agreement": 0.3, "kl": 0.3, "bits": 0.1}, **more,  # the first of 640 random words is nobody's by much
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_refused_with_the_reason(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SopError, match="there is no CUDA GPU here") as caught:
        run(awq.STAGE, settings(root, tmp_path / "out"))
    assert caught.value.code == ENVIRONMENT and "sop infer gptq" in str(caught.value.fix) and "--device cpu" in str(caught.value.fix)
    with pytest.raises(SopError, match="no CUDA GPU") as caught:
        run(awq.STAGE, settings(root, tmp_path / "out", device="cuda"))
    assert caught.value.code == ENVIRONMENT and not [p for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")]


def test_it_has_4_bits_and_no_other(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="problem") as caught:
        run(awq.STAGE, settings(root, tmp_path / "out", bits=8))
    assert "8 bits are not written here" in str(caught.value)


def _proven(root: Path, out: Path, device: str) -> None:
    done = run(awq.STAGE, settings(root, out, device=device))
    assert done.stats["layers"] == 7 and done.stats["parity"]["bits_per_byte"]["change"] < 0.10 and not done.stats["parity"]["violations"]
    named = json.loads((done.path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    wanted = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "lm_head": False}  # what vLLM's AutoAWQConfig.from_config reads
    assert {k: named[k] for k in wanted} == wanted
    tensors, source = load_file(done.path / "model.safetensors"), load_file(root / "model" / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(tensors[norm].float(), source[norm].float()), "the scales that the search found stand in the norm before the layer; packing alone leaves it"
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(tensors[name], source[name].bfloat16())
    loaded = load_model(done.path, dtype="float32" if device == "cpu" else "auto")
    with torch.no_grad():
        assert bool(torch.isfinite(loaded(torch.arange(3, 200)[None].to(loaded.device)).logits).all())


@needs_library
def test_the_search_runs_on_a_cpu_that_is_asked_for(root: Path, tmp_path: Path) -> None:
    _proven(root, tmp_path / "out", "cpu")


@needs_library
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_search_runs_on_a_gpu(root: Path, tmp_path: Path) -> None:
    _proven(root, tmp_path / "out", "auto")
