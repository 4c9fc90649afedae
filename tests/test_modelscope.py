"""ModelScope through its own client (the extra `modelscope`), against the hub on loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_models
from hub_server import HubServer, jsonl
from self_model_sop.data import fetch, model
from self_model_sop.errors import NETWORK, USAGE, SopError
from self_model_sop.hub import HubConfig

pytest.importorskip("modelscope", reason="the extra modelscope is not installed")
ROWS = [{"id": i, "text": f"第{i}行"} for i in range(20)]


@pytest.fixture
def where(hub: HubServer, tmp_path: Path) -> HubConfig:
    return HubConfig(endpoint=hub.url, source="modelscope", cache_dir=tmp_path / "cache")


def test_a_dataset(hub: HubServer, where: HubConfig, tmp_path: Path) -> None:
    hub.add("dataset", "owner/data", {"pretrain/train.jsonl": jsonl(ROWS), "other/train.jsonl": jsonl(ROWS[:2]), "run.py": b"raise SystemExit"})
    done = fetch.STAGE.run(fetch.Config(dataset_name="owner/data", data_subdir="pretrain", output_dir=tmp_path / "out", huggingface=where))
    path = tmp_path / "out" / "pretrain" / "owner_data__train.jsonl"
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == ROWS
    assert done.stats["commit"] is None
    offline = HubConfig(source="modelscope", cache_dir=tmp_path / "cache", offline=True)
    fetch.STAGE.run(fetch.Config(dataset_name="owner/data", data_subdir="pretrain", output_dir=tmp_path / "again", sample_limit=3, huggingface=offline))
    assert (tmp_path / "again" / "pretrain" / "owner_data__train.jsonl").read_text(encoding="utf-8").count("\n") == 3


def test_a_model(hub: HubServer, where: HubConfig, tmp_path: Path) -> None:
    made = tiny_models.tiny_qwen(tmp_path / "made")
    hub.add("model", "owner/model", {**{p.name: p.read_bytes() for p in made.iterdir()}, "pytorch_model.bin": b"no"})
    done = model.STAGE.run(model.Config(model_name_or_path="owner/model", output_dir=tmp_path / "out", huggingface=where))
    assert done.stats["architecture"] == "Qwen2ForCausalLM"
    assert not [r for r in hub.requests if ".bin" in r]


def test_what_is_not_there(where: HubConfig, tmp_path: Path) -> None:
    with pytest.raises(SopError) as caught:
        fetch.STAGE.run(fetch.Config(dataset_name="owner/none", output_dir=tmp_path / "out", huggingface=where))
    assert caught.value.code in (USAGE, NETWORK)
    assert "HF_TOKEN" not in str(caught.value)
