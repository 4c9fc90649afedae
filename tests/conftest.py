"""Fixtures for every test: a hub on loopback with the repositories that the documented commands name."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import Files, HubServer, jsonl

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data_process" / "sample_data"


if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # every worker computes: threads beyond the cores wait for one another, many times longer than they work
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

LONGEST = ("test_agents_md", "test_f20_pipeline_kill", "test_quickstart")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes come first, so that no core waits for one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def _sample_rows(name: str) -> list[dict[str, Any]]:
    rows = []
    for line in (SAMPLE / name).read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [r for r in rows if isinstance(r, dict)]


def medical_dataset() -> Files:
    """The layout of shibing624/medical (JSONL files called .json in three folders), filled from the sample corpus."""
    draw = random.Random(0)
    texts = [re.sub(r"<[^>]+>|&\w+;", "", r["text"]) for r in _sample_rows("pretrain/health_articles.jsonl") if isinstance(r.get("text"), str)]
    sentences = [s for t in texts for s in re.split(r"(?<=[。！？])\s*", t) if len(s) > 8]
    passages = [{"text": "".join(draw.sample(sentences, 6))} for _ in range(1600)]
    chats = [{k: r[k] for k in ("instruction", "input", "output")} for r in _sample_rows("finetune/health_instructions.jsonl") if r.get("output")]
    pairs = [
        {"question": r["prompt"], "response_chosen": r["chosen"], "response_rejected": r["rejected"]}
        for r in _sample_rows("reward/health_preference.jsonl")
        if {"prompt", "chosen", "rejected"} <= set(r)
    ]
    return {
        "README.md": "---\nlicense: apache-2.0\nlanguage: [zh]\n---\n# 医疗数据\n".encode(),
        "pretrain/train_encyclopedia.json": jsonl(passages[:1100]),
        "pretrain/medical_book_zh.json": jsonl(passages[1100:1500]),
        "pretrain/valid_encyclopedia.json": jsonl(passages[1500:1550]),
        "pretrain/test_encyclopedia.json": jsonl(passages[1550:]),
        "finetune/train_zh_0.json": jsonl(chats[:-40]),
        "finetune/valid_zh_0.json": jsonl(chats[-40:-20]),
        "finetune/test_zh_0.json": jsonl(chats[-20:]),
        "reward/train.json": jsonl(pairs[:-20]),
        "reward/valid.json": jsonl(pairs[-20:-10]),
        "reward/test.json": jsonl(pairs[-10:]),
    }


def _model(make: Callable[[Path], Path], folder: Path) -> Callable[[], Files]:
    return lambda: {p.name: p.read_bytes() for p in sorted(make(folder).iterdir()) if p.is_file()}


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokenised data of the tests goes into a folder of theirs, also from processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOP_TOKEN_CACHE", str(tmp_path_factory.mktemp("tokens")))
        yield


@pytest.fixture(scope="session")
def hub_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """One server for all tests; the documented repositories are made when they are first asked for."""
    import tiny_models

    folder = tmp_path_factory.mktemp("hub")
    with HubServer() as server:
        server.add_lazily("dataset", "shibing624/medical", medical_dataset)
        server.add_lazily("model", "Qwen/Qwen2.5-0.5B-Instruct", _model(tiny_models.tiny_qwen, folder / "qwen"))
        server.add_lazily("model", "bert-base-chinese", _model(tiny_models.tiny_bert, folder / "bert"))
        yield server


@pytest.fixture
def hub(hub_session: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub with nothing misbehaving; `hub.environment(tmp_path)` is the environment for a subprocess."""
    for name in ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # an earlier test may have had the client imported with the network switched off, which the client never looks at again
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub_session.reset()
    yield hub_session
    hub_session.reset()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `sop infer serve` on a tiny model, one for all tests."""
    pytest.importorskip("xllamacpp", reason="the extra `serve` is not installed")
    from tiny_gguf import serving, tiny_gguf

    with serving(tiny_gguf(tmp_path_factory.mktemp("served") / "tiny.gguf")) as address:
        yield address
