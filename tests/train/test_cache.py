"""Tokenised data is shared between runs: read where nothing that decides it changed, made anew where something did; whole after kills, once for two runs at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.train import cache, checkpoint, corpus, pretrain, sft
from self_model_sop.train.cache import Cache
from self_model_sop.train.model import load_tokenizer
from self_model_sop.train.template import renderer_for
from tiny_models import tiny_qwen
from tiny_runs import chats, pretrain_settings, run, sft_settings, texts

CHATML = Path(__file__).resolve().parents[2] / "self_model" / "template" / "qwen2_chatml.json"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache")
    tiny_qwen(path / "qwen")
    return path


def _sets(store: Path) -> set[str]:
    return {p.name for p in store.iterdir()} if store.is_dir() else set()


def test_another_learning_rate_tokenises_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, store = chats(tmp_path / "train.jsonl", 30), tmp_path / "store"
    values = {"token_cache": store, "training_args__max_steps": 2}
    first = run(sft.STAGE, sft_settings(root / "qwen", train, tmp_path / "first", **values))
    said = capsys.readouterr().err
    assert len(_sets(store)) == 1 and "tokenised before" not in said and "30 rows, 30 kept" in said
    written = {p: p.stat().st_mtime_ns for p in store.rglob("*.bin")}
    other = run(sft.STAGE, sft_settings(root / "qwen", train, tmp_path / "other", **values, training_args__learning_rate=1e-5, data__packing=True, peft__lora_r=4, seed=7))
    said = capsys.readouterr().err
    assert len(_sets(store)) == 1 and "tokenised before" in said and "30 rows, 30 kept" in said
    assert written == {p: p.stat().st_mtime_ns for p in store.rglob("*.bin")} and first.stats["rows"] == other.stats["rows"]


def test_what_decides_the_tokens_tokenises_again(root: Path, tmp_path: Path) -> None:
    train, store, tokenizer = chats(tmp_path / "train.jsonl", 30), Cache(tmp_path / "store"), load_tokenizer(root / "qwen")
    (tmp_path / "template.json").write_text(CHATML.read_text(encoding="utf-8").replace("<|im_start|>user", "<|im_start|>human"), encoding="utf-8")
    other = renderer_for(tokenizer, tmp_path / "template.json", override=True)

    def new(renderer: Any = None, **more: Any) -> int:
        """How many sets come of it."""
        before = _sets(store.root)
        corpus.conversations([train], store, renderer or renderer_for(tokenizer), **{"max_length": 128, "overlong": "truncate", **more})
        return len(_sets(store.root) - before)

    assert new() == 1 and new() == 0 and new(workers=1) == 0
    assert new(other) == 1 and new(renderer_for(tokenizer, train_on="full")) == 1
    assert new(max_length=96) == 1 and new(overlong="drop") == 1 and new(max_samples=20) == 1
    train.write_text(train.read_text(encoding="utf-8").replace("第0个", "第零个"), encoding="utf-8")
    assert new() == 1 and new() == 0


def test_pretraining_reads_it_too(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = texts(tmp_path / "t.jsonl")
    for i, rate in enumerate((1e-2, 1e-3)):
        more = {"training_args__learning_rate": rate, "token_cache": tmp_path / "store", "data__block_size": 64 >> i, "data__eval_file": train}
        run(pretrain.STAGE, pretrain_settings(root / "qwen", train, tmp_path / f"out{i}", **more))
        assert capsys.readouterr().err.count("tokenised before") == (1, 2)[i]  # the first run measures on what it trains on
    assert len(_sets(tmp_path / "store")) == 1


def test_the_tokenizer_is_known_by_what_it_does(root: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(root / "qwen")
    known = cache.tokenizer_hash(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=1)
    assert cache.tokenizer_hash(tokenizer) == known == cache.tokenizer_hash(load_tokenizer(root / "qwen"))
    tokenizer.add_tokens(["高血压"])
    assert cache.tokenizer_hash(tokenizer) != known


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_set_is_made_anew(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = Cache(tmp_path)
    folder, there = store.folder({"a": 1}, lambda f: (f / "ids.bin").write_bytes(b"12345678"))
    assert not there and store.folder({"a": 1}, lambda f: pytest.fail("written twice")) == (folder, True)
    path = folder / "ids.bin"
    path.unlink() if damage == "gone" else path.write_bytes(b"12345679" if damage == "changed" else b"1234")
    assert store.folder({"a": 1}, lambda f: (f / "ids.bin").write_bytes(b"12345678")) == (folder, False)
    assert path.read_bytes() == b"12345678" and "is damaged (ids.bin" in capsys.readouterr().err


def _slowly(folder: Path, log: Path) -> None:
    with log.open("a") as f:
        f.write("x")
    (folder / "ids.bin").write_bytes(b"half")
    time.sleep(1)
    (folder / "ids.bin").write_bytes(b"whole")


def _make(root: Path, log: Path) -> None:
    Cache(root).folder({"a": 1}, lambda folder: _slowly(folder, log))


def _started(tmp_path: Path) -> Any:
    process = multiprocessing.get_context("fork").Process(target=_make, args=(tmp_path / "store", tmp_path / "log"))
    process.start()
    return process


def test_two_runs_at_once_make_it_once(tmp_path: Path) -> None:
    processes = [_started(tmp_path) for _ in range(3)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "x"
    assert not list((tmp_path / "store").glob(".*"))


def test_a_kill_leaves_nothing_half(tmp_path: Path) -> None:
    process = _started(tmp_path)
    while not list((tmp_path / "store").glob(".*.part/ids.bin")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not [p for p in (tmp_path / "store").iterdir() if not p.name.startswith(".")]
    store = Cache(tmp_path / "store")
    store.folder({"another": 1}, lambda f: (f / "ids.bin").write_bytes(b"x"))
    assert not list((tmp_path / "store").glob(".*.part")), "what the killed run left is swept by the next one"
    folder, there = store.folder({"a": 1}, lambda f: (f / "ids.bin").write_bytes(b"whole"))
    assert not there and not checkpoint.problems(folder)


def test_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "ids.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Cache(tmp_path).folder({"a": 1}, full)
    assert not list(tmp_path.iterdir())


def test_the_least_used_goes_first(tmp_path: Path) -> None:
    store = Cache(tmp_path, gib=2.5 * 1000 / (1 << 30))  # two sets of about 1,100 bytes with their marker

    def made(name: str) -> bool:
        time.sleep(0.02)
        return not store.folder({"a": name}, lambda f: (f / "ids.bin").write_bytes(b"x" * 800))[1]

    assert made("a") and made("b")
    assert not made("a")  # used again
    assert made("c") and len(_sets(tmp_path)) == 2
    assert not made("a") and made("b")
