"""F23: a checkpoint with a truncated, changed or missing file is never loaded; the previous complete one is, and it is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.artifact import sha256_file
from self_model_sop.errors import Interrupted
from self_model_sop.train import checkpoint, loop, pretrain
from self_model_sop.train.sft import STAGE
from tiny_models import tiny_bert, tiny_qwen
from tiny_runs import chats, pretrain_settings, run, sft_settings, texts


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _halved(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _removed(path: Path) -> None:
    path.unlink()


DAMAGES: tuple[Callable[[Path], None], ...] = (_emptied, _halved, _one_bit, _removed)


def _folder(root: Path) -> Path:
    for step in (3, 6):
        folder = root / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"):
            (folder / name).write_bytes(f"{name} of step {step}".encode() * 50)
        checkpoint.mark_complete(folder, phase="sft", step=step)
    return root


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_in_turn(tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    names = sorted(p.name for p in (_folder(tmp_path / "probe") / "checkpoint-6").iterdir())
    assert checkpoint.MARKER in names
    for name in names:
        root = _folder(tmp_path / f"{damage.__name__}-{name}")
        damage(root / "checkpoint-6" / name)
        found = checkpoint.latest(root, "sft")
        assert found is not None and found.step == 3, name
        said = capsys.readouterr().err
        assert "checkpoint-6 is passed over" in said and name in said
        damage(root / "checkpoint-3" / name)
        assert checkpoint.latest(root, "sft") is None


def test_pruning_keeps_the_newest_the_best_and_nothing_torn(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "x").write_text("x")
        checkpoint.mark_complete(tmp_path / f"checkpoint-{step}", phase="sft", step=step)
    (tmp_path / "checkpoint-14").mkdir()
    checkpoint.prune(tmp_path, 2, best=str(tmp_path / "checkpoint-2"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12", "checkpoint-2"]


def _stopped_at(step: int, monkeypatch: pytest.MonkeyPatch, stage: Any, values: dict[str, Any]) -> None:
    """Run until the checkpoint of a step is complete, then go away."""
    real = loop.checkpoint.mark_complete

    def stopping(folder: Path, **marker: object) -> checkpoint.Checkpoint:
        made = real(folder, **marker)
        if marker.get("step") == step:  # tokenised data is sealed in the same way, without a step
            raise Interrupted("the machine went away", code=143)
        return made

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop.checkpoint, "mark_complete", stopping)
        run(stage, values)


def test_a_real_run_falls_back_and_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, train = tiny_qwen(tmp_path / "model"), chats(tmp_path / "chats.jsonl", 40)

    def values(out: Path) -> dict[str, Any]:
        return sft_settings(model, train, out, training_args__max_steps=8, training_args__save_steps=2)

    _stopped_at(6, monkeypatch, STAGE, values(tmp_path / "out"))
    last = next((tmp_path / "out").glob(".work-*/checkpoints/checkpoint-6"))
    _one_bit(last / "optimizer.pt")
    capsys.readouterr()
    resumed = run(STAGE, values(tmp_path / "out"))
    said = capsys.readouterr().err
    assert "checkpoint-6 is passed over: optimizer.pt changed" in said and "resuming from checkpoint-4 (verified)" in said
    assert resumed.stats["resumed_from"] == 4
    whole = run(STAGE, values(tmp_path / "whole"))
    assert sha256_file(resumed.path / "adapter_model.safetensors") == sha256_file(whole.path / "adapter_model.safetensors")


def test_a_masked_model_resumes_with_the_masks_that_it_would_have_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader is a batch ahead when a checkpoint is written; what it has drawn must not be drawn anew."""
    model, train = tiny_bert(tmp_path / "model"), texts(tmp_path / "texts.jsonl", 40)

    def values(out: Path) -> dict[str, Any]:
        return pretrain_settings(model, train, out, phases=[{"name": "full", "max_steps": 6}], training_args__save_steps=2)

    _stopped_at(4, monkeypatch, pretrain.STAGE, values(tmp_path / "out"))
    resumed, whole = run(pretrain.STAGE, values(tmp_path / "out")), run(pretrain.STAGE, values(tmp_path / "whole"))
    assert resumed.stats["resumed_from"] == 4
    assert sha256_file(resumed.path / "model.safetensors") == sha256_file(whole.path / "model.safetensors")
