"""F21: SIGKILL in training; the last complete checkpoint is used and the final weights equal those of an uninterrupted run."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.artifact import sha256_file
from tiny_extensions import grown
from tiny_models import tiny_qwen
from tiny_runs import Process, chats, expanded, pretrain_settings, rows, sft_settings, steps_logged, texts, work_folder
from tiny_tokenizers import WORDS, chinese

WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


def _sft(root: Path, out: Path) -> dict[str, Any]:
    # dropout and a random order: the random state and the position in the data must both come back
    return sft_settings(
        root / "model", root / "chats.jsonl", out, peft__lora_dropout=0.1, training_args__max_steps=20, training_args__save_steps=3, training_args__gradient_accumulation_steps=2,
    )  # fmt: skip


def _full(root: Path, out: Path) -> dict[str, Any]:
    return _sft(root, out) | {"peft__enabled": False}


def _pretrain(root: Path, out: Path) -> dict[str, Any]:
    phases = [{"name": "rows", "train": "new_rows", "max_steps": 8}, {"name": "full", "max_steps": 12, "embedding_learning_rate": 1e-3}]
    return pretrain_settings(root / "model", root / "texts.jsonl", out, phases=phases, training_args__save_steps=3)


def _distill(root: Path, out: Path) -> dict[str, Any]:
    phases = [{"name": "rows", "train": "new_rows", "objective": "distill", "max_steps": 12}, {"name": "full", "max_steps": 8}]
    return _pretrain(root, out) | {"model_name_or_path": root / "grown", "data__train_file": root / "words.jsonl", "phases": phases}


RUNS = {"train sft": _sft, "train sft (full)": _full, "train pretrain": _pretrain, "train pretrain (distill)": _distill}


def _made(root: Path) -> None:
    expanded(tiny_qwen(root / "model"))
    grown(tiny_qwen(root / "base"), WORDS, root / "grown")
    chats(root / "chats.jsonl", 60)
    texts(root / "texts.jsonl")
    rows(root / "words.jsonl", [{"text": text} for text in chinese(60)])


def _digests(out: Path) -> dict[str, str]:
    return {name: sha256_file(out / name) for name in WEIGHTS if (out / name).exists()}


def _killed(name: str, root: Path, points: int, seed: int) -> tuple[int, list[str]]:
    """Kill one run again and again at random steps, then let it end; (how often it was killed, the log)."""
    draw, out, kills = random.Random(seed), root / "killed", 0
    values = RUNS[name](root, out)
    log = root / "killed.log"
    for _ in range(points):
        before = steps_logged(out)
        target = draw.randint(before + 1, before + 7)
        code = Process(name.split(" (")[0], values, log).signal_when(lambda t=target: steps_logged(out) >= t, delay=draw.random() * 0.05)  # type: ignore[misc]
        kills += code == -signal.SIGKILL
        if code == 0:
            break
        assert work_folder(out) is not None and not (out / "manifest.json").exists()
    assert Process(name.split(" (")[0], values, log).wait() == 0, log.read_text()[-2000:]
    return kills, log.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ["train sft", "train pretrain", "train pretrain (distill)"])
def test_a_killed_training_ends_with_the_weights_of_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    _made(tmp_path)
    whole = tmp_path / "whole"
    assert Process(name.split(" (")[0], RUNS[name](tmp_path, whole), tmp_path / "whole.log").wait() == 0, (tmp_path / "whole.log").read_text()[-2000:]
    kills, log = _killed(name, tmp_path, 3, seed=len(name))
    assert kills >= 2 and any("resuming from checkpoint-" in line for line in log), log
    assert _digests(tmp_path / "killed") == _digests(whole) and _digests(whole)
    assert not list((tmp_path / "killed").glob(".*")), "debris is left"
    assert _curve(tmp_path / "killed") == _curve(whole)


def _curve(out: Path) -> list[tuple[Any, ...]]:
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(x["phase"], x["step"], x["loss"], x.get("distance"), x["tokens"]) for x in lines]


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", list(RUNS))
def test_every_point(name: str, seed: int, tmp_path: Path) -> None:
    _made(tmp_path)
    assert Process(name.split(" (")[0], RUNS[name](tmp_path, tmp_path / "whole"), tmp_path / "whole.log").wait() == 0
    _killed(name, tmp_path, 4, seed)
    assert _digests(tmp_path / "killed") == _digests(tmp_path / "whole")
