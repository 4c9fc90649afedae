"""Models named by a hub id: fetched through the hub's settings, pinned, and named again by what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hub_server import HubServer
from self_model_sop.errors import NETWORK, SopError
from self_model_sop.hub import HubConfig
from self_model_sop.train import lint, merge, pretrain, sft
from self_model_sop.train.model import base_folder, kind_of, load_model, load_tokenizer
from tiny_models import tiny_qwen
from tiny_runs import chats, expanded, pretrain_settings, run, sft_settings, texts

NAME = "some/chat-model"


def _publish(hub: HubServer, folder: Path) -> str:
    return hub.add("model", NAME, {p.name: p.read_bytes() for p in sorted(folder.iterdir())})


@pytest.fixture
def repository(hub: HubServer, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """(the first commit of a repository that has moved on since, settings of the loopback hub)."""
    model = expanded(tiny_qwen(tmp_path / "first"))
    (model / "modeling.py").write_text("raise SystemExit")
    (model / "pytorch_model.bin").write_bytes(b"pickled")
    commit = _publish(hub, model)
    _publish(hub, tiny_qwen(tmp_path / "second", seed=1))
    return commit, {"huggingface__endpoint": hub.url, "huggingface__cache_dir": tmp_path / "cache", "huggingface__revision": commit}


def test_a_training_starts_from_the_hub_and_its_adapter_names_the_commit(hub: HubServer, repository: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    commit, where = repository
    values = {**sft_settings(Path("x"), chats(tmp_path / "chats.jsonl"), tmp_path / "out", training_args__max_steps=2), "model_name_or_path": NAME, **where}
    done = run(sft.STAGE, values)
    assert not [r for r in hub.requests if r.endswith((".py", ".bin"))]
    assert done.stats["base_commit"] == commit and done.stats["trainable"]["new_rows"] == 40 and (done.path / "expansion.json").is_file()
    assert done.manifest["config"]["model_name_or_path"] == NAME
    named = json.loads((done.path / "adapter_config.json").read_text())
    assert (named["base_model_name_or_path"], named["revision"]) == (NAME, commit) and json.loads((done.path / "base.json").read_text()) == {"base": NAME}
    assert run(sft.STAGE, values).skipped

    shutil.rmtree(tmp_path / "cache")  # on another machine: the base comes again, at the commit that was trained on although main has moved
    settings = {k: v for k, v in where.items() if not k.endswith("revision")}
    merged = run(merge.STAGE, {"adapter": done.path, "output_dir": tmp_path / "merged", **settings})
    assert merged.stats["relative_difference"] <= 1e-4
    assert base_folder(done.path, HubConfig(endpoint=hub.url, cache_dir=tmp_path / "cache")).name == commit


def test_pretraining_and_lint_read_from_the_hub_too(hub: HubServer, repository: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    commit, where = repository
    values = {**pretrain_settings(Path("x"), texts(tmp_path / "texts.jsonl"), tmp_path / "out", phases=[{"name": "rows", "train": "new_rows", "max_steps": 1}]), **where}
    done = run(pretrain.STAGE, {**values, "model_name_or_path": NAME})
    assert done.stats["base_commit"] == commit and done.stats["phases"][0]["trainable"] == 40 * 64
    hub.requests.clear()
    files = HubConfig(endpoint=hub.url, cache_dir=tmp_path / "lint", revision=commit)
    report = lint.lint(lint.Config(model_name_or_path=NAME, data=sft.SftData(train_file=chats(tmp_path / "chats.jsonl")), huggingface=files))
    assert report.kept == report.total > 0 and not [r for r in hub.requests if "safetensors" in r]


def test_without_a_network_the_cache_serves_and_nothing_is_asked(hub: HubServer, repository: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    commit, _ = repository
    online = HubConfig(endpoint=hub.url, cache_dir=tmp_path / "cache", revision=commit)
    vocabulary = load_tokenizer(NAME, online).get_vocab()
    with pytest.raises(SopError, match="not in the local cache") as error:
        load_model("some/other", HubConfig(cache_dir=tmp_path / "cache", offline=True))
    assert error.value.code == NETWORK
    load_model(NAME, online)
    hub.requests.clear()
    offline = HubConfig(endpoint=hub.url, cache_dir=tmp_path / "cache", revision=commit, offline=True)
    assert load_tokenizer(NAME, offline).get_vocab() == vocabulary and kind_of(NAME, offline) == "causal" and load_model(NAME, offline).num_parameters() > 100_000
    assert not hub.requests
