"""Models as local folders, and what the errors of a hub mean."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub_server import HubServer, jsonl
from self_model_sop.errors import DATA, ENVIRONMENT, NETWORK, USAGE, SopError
from self_model_sop.hub import HubConfig, commit_of, configure, resolve_model
from self_model_sop.repository import head_commit, listing

QWEN = "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.fixture
def where(hub: HubServer, tmp_path: Path) -> HubConfig:
    return HubConfig(endpoint=hub.url, cache_dir=tmp_path / "cache")


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(tmp_path, HubConfig(offline=True)) == tmp_path


def test_a_hub_model_is_a_pinned_snapshot_without_other_weights(hub: HubServer, where: HubConfig) -> None:
    others = {"pytorch_model.bin": b"p", "modeling.py": b"raise", "onnx/model.onnx": b"o", "sub/config.json": b"{}"}
    commit = hub.add("model", "some/model", {"config.json": b"{}", "model.safetensors": b"s", "vocab.txt": b"a", **others})
    folder = resolve_model("some/model", where)
    assert commit_of(folder) == commit
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    assert not [r for r in hub.requests if ".bin" in r or ".py" in r]


def test_a_tokenizer_alone_leaves_the_weights(hub: HubServer, where: HubConfig) -> None:
    folder = resolve_model("bert-base-chinese", where, weights=False)
    assert {"tokenizer.json", "vocab.txt", "config.json"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.glob("*.safetensors"))


def test_it_loads_and_is_cached(hub: HubServer, where: HubConfig) -> None:
    from self_model_sop.train.model import load_model, load_tokenizer

    folder = resolve_model(QWEN, where)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    assert model.num_parameters() > 50_000
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    sent = hub.sent
    assert resolve_model(QWEN, where) == folder
    assert hub.sent - sent < 10_000
    assert resolve_model(QWEN, HubConfig(cache_dir=where.cache_dir, offline=True)) == folder


def test_a_revision(hub: HubServer, where: HubConfig) -> None:
    first = hub.add("model", "some/model", {"config.json": b"1", "model.safetensors": b"s"})
    hub.add("model", "some/model", {"config.json": b"2", "model.safetensors": b"s"})
    pinned = HubConfig(endpoint=hub.url, cache_dir=where.cache_dir, revision=first)
    assert (resolve_model("some/model", pinned) / "config.json").read_bytes() == b"1"
    with pytest.raises(SopError, match="no such revision: v9") as caught:
        resolve_model("some/model", HubConfig(endpoint=hub.url, cache_dir=where.cache_dir, revision="v9"))
    assert caught.value.code == USAGE


def test_names_that_are_none(hub: HubServer, where: HubConfig, tmp_path: Path) -> None:
    with pytest.raises(SopError, match="not a repository name") as caught:
        resolve_model("a/b/c", where)
    assert caught.value.code == USAGE
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(SopError, match="this is a file"):
        resolve_model(tmp_path / "m.gguf", where)
    hub.add("model", "some/empty", {"notes.md": b""})
    with pytest.raises(SopError, match="no model files") as caught:
        resolve_model("some/empty", where)
    assert caught.value.code == DATA


def test_offline_and_unknown(tmp_path: Path) -> None:
    with pytest.raises(SopError, match="not in the local cache") as caught:
        resolve_model("some/model", HubConfig(cache_dir=tmp_path, offline=True))
    assert caught.value.code == NETWORK


def test_a_very_large_repository_is_listed_by_pages(hub: HubServer, where: HubConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("dataset", "a/b", {f"train-{i}.jsonl": jsonl([{"i": i}]) for i in range(11)})
    short = listing("dataset", "a/b", where)
    monkeypatch.setattr("self_model_sop.repository._MANY", 5)
    assert listing("dataset", "a/b", where) == short
    assert sum("/tree/" in r for r in hub.requests) == 4


def test_a_file_cached_by_another_tool_serves_offline(hub: HubServer, where: HubConfig) -> None:
    from huggingface_hub import snapshot_download

    hub.add("dataset", "a/b", {"train.jsonl": b"{}\n"})
    snapshot_download("a/b", repo_type="dataset", endpoint=hub.url, cache_dir=where.cache)
    assert [f.path for f in listing("dataset", "a/b", HubConfig(cache_dir=where.cache_dir, offline=True)).files] == ["train.jsonl"]


def test_upstream_that_cannot_be_asked_is_no_error(hub: HubServer, where: HubConfig) -> None:
    commit = hub.add("dataset", "a/b", {"train.jsonl": b"{}\n"})
    assert head_commit("a/b", where) == commit
    hub.misbehave("GET", "/api/", status=500)
    assert head_commit("a/b", where) is None
    assert head_commit("a/b", HubConfig(endpoint="http://127.0.0.1:9", cache_dir=where.cache_dir)) is None
    assert head_commit("a/b", HubConfig(offline=True)) is None


def test_the_token_is_taken_from_the_environment_and_never_shown(hub: HubServer, tmp_path: Path) -> None:
    hub.add("dataset", "a/private", {"train.jsonl": b'{"a": 1}\n'}, private=True)
    command = [sys.executable, "-m", "self_model_sop.cli", "data", "fetch", "--dataset_name", "a/private", "--output_dir", str(tmp_path / "out")]
    environment = hub.environment(tmp_path / "home", HF_HUB_DISABLE_IMPLICIT_TOKEN="0")
    refused = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == NETWORK
    assert "401" in refused.stderr
    assert "HF_TOKEN" in refused.stderr
    token = "hf_" + "goodgoodgoodgoodgood"
    done = subprocess.run(command, cwd=tmp_path, env={**environment, "HF_TOKEN": token}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert token not in done.stdout + done.stderr
    assert token.encode() not in written


def test_settings_reach_the_client_before_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "config" / "model_config").mkdir(parents=True)
    (tmp_path / "config" / "model_config" / "config.yaml").write_text("huggingface: {endpoint: 'http://127.0.0.1:9', offline: true, cache_dir: cache}\n")
    code = (
        "from pathlib import Path\nfrom self_model_sop.config import load\nfrom self_model_sop.data.fetch import Config\nfrom self_model_sop.hub import configure\n"
        "configure(load(Config, None, check_paths=False).config)\nimport huggingface_hub.constants as c\nprint(c.ENDPOINT, c.HF_HUB_OFFLINE, c.HF_HOME)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["http://127.0.0.1:9", "True", str(tmp_path / "cache")]


def test_settings_that_come_too_late_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with pytest.raises(RuntimeError, match="HF_ENDPOINT"):
        configure(HubConfig(endpoint="http://127.0.0.1:9"))


def test_modelscope_without_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(SopError, match="modelscope") as caught:
        resolve_model("some/model", HubConfig(source="modelscope"))
    assert caught.value.code == ENVIRONMENT
    assert "self-model-sop[modelscope]" in str(caught.value)
