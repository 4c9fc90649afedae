"""F22: SIGTERM and SIGINT stop a training at the end of a step with a checkpoint; the same command goes on there."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from self_model_sop.artifact import sha256_file
from self_model_sop.train import checkpoint
from tiny_models import tiny_qwen
from tiny_runs import Process, chats, sft_settings, steps_logged, work_folder


def _stop_and_resume(root: Path, number: int, at: int, delay: float) -> None:
    model, train = tiny_qwen(root / "model"), chats(root / "chats.jsonl", 60)
    out, log = root / "out", root / "log"
    values = sft_settings(model, train, out, training_args__max_steps=14, training_args__gradient_accumulation_steps=2)
    code = Process("train sft", values, log).signal_when(lambda: steps_logged(out) >= at, number, delay)
    text = log.read_text(encoding="utf-8")
    if code == 0:
        return  # it was over before the signal came
    assert code == 128 + number, text
    assert "its checkpoint is saved" in text and "the same command resumes there" in text and "Traceback" not in text
    work = work_folder(out)
    assert work is not None
    saved = checkpoint.latest(work / "checkpoints", "sft")
    logged = max(json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines())
    assert saved is not None and saved.step >= logged  # at most the step in progress is lost: none
    assert Process("train sft", values, log).wait() == 0
    assert f"resuming from checkpoint-{saved.step}" in log.read_text(encoding="utf-8")
    whole = sft_settings(model, train, root / "whole", training_args__max_steps=14, training_args__gradient_accumulation_steps=2)
    assert Process("train sft", whole, root / "whole.log").wait() == 0
    assert sha256_file(out / "adapter_model.safetensors") == sha256_file(root / "whole" / "adapter_model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(number: int, tmp_path: Path) -> None:
    _stop_and_resume(tmp_path, number, 4, 0.01)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(20))
def test_every_point(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    _stop_and_resume(tmp_path, draw.choice([signal.SIGTERM, signal.SIGINT]), draw.randint(1, 12), draw.random() * 0.05)
