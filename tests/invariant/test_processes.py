"""One process and two (gloo) train the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from self_model_sop.train import pretrain, sft
from tiny_extensions import grown
from tiny_models import tiny_qwen
from tiny_runs import chats, losses, pretrain_settings, rows, run, sft_settings, torchrun
from tiny_tokenizers import WORDS, chinese

pytestmark = pytest.mark.slow


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    model, train = tiny_qwen(tmp_path / "model"), chats(tmp_path / "chats.jsonl", 40)

    def values(out: str, each: int) -> dict[str, object]:
        return sft_settings(
            model, train, tmp_path / out, data__eval_file=train, training_args__max_steps=4, training_args__per_device_train_batch_size=each, training_args__save_steps=2,
            keep_checkpoints=True,
        )  # fmt: skip

    alone = run(sft.STAGE, values("alone", 8))
    done = torchrun(tmp_path, "train sft", values("both", 4))
    assert done.returncode == 0, done.stderr[-3000:]
    wanted, found = losses(alone.path), losses(tmp_path / "both")
    assert len(found) == 4 and max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= 1e-5
    stats = json.loads((tmp_path / "both" / "manifest.json").read_text())["stats"]
    assert stats["batch"] == {"per_device": 4, "accumulation": 1, "processes": 2} and stats["tokens"] == alone.stats["tokens"]
    assert stats["eval_loss_after"] == pytest.approx(alone.stats["eval_loss_after"], abs=1e-5) and stats["eval_loss_before"] == alone.stats["eval_loss_before"]
    assert {p.name for p in (tmp_path / "both" / "checkpoints" / "checkpoint-2").glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    again = torchrun(tmp_path, "train sft", values("both", 4))
    assert again.returncode == 0 and "up to date" in again.stdout


def test_two_processes_pretrain_in_phases(tmp_path: Path) -> None:
    model, train = grown(tiny_qwen(tmp_path / "base"), WORDS, tmp_path / "model"), rows(tmp_path / "texts.jsonl", [{"text": text} for text in chinese(60)])
    short = {"train": "new_rows", "max_steps": 2}
    phases = [{"name": "distill", "objective": "distill", **short}, {"name": "rows", **short}, {"name": "full", "max_steps": 2}]
    alone = run(pretrain.STAGE, pretrain_settings(model, train, tmp_path / "alone", phases=phases, training_args__per_device_train_batch_size=4))
    values = pretrain_settings(model, train, tmp_path / "both", training_args__per_device_train_batch_size=2)
    values["phases"] = phases
    done = torchrun(tmp_path, "train pretrain", values)
    assert done.returncode == 0, done.stderr[-3000:]
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "both"), losses(alone.path), strict=True)) <= 1e-5
    away = [[json.loads(line)["distance"] for line in (folder / "metrics.jsonl").read_text().splitlines()[:2]] for folder in (tmp_path / "both", alone.path)]
    assert away[0] == pytest.approx(away[1], abs=1e-5) and min(away[0]) > 0.01
