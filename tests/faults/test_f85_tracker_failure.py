"""F85: a tracker that is missing, does not start, or fails in the middle never stops a training; metrics.jsonl is complete."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.train import sft
from tiny_models import tiny_qwen
from tiny_runs import chats, losses, run, sft_settings


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)
    return sft_settings(tiny_qwen(tmp_path / "model"), chats(tmp_path / "chats.jsonl"), tmp_path / "out")


def test_a_tracker_that_is_not_installed(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "swanlab" else real(name, *rest))
    assert len(losses(run(sft.STAGE, {**values, "trace": "swanlab"}).path)) == 6
    assert "needs the package 'swanlab'" in capsys.readouterr().err


def test_a_tracker_that_does_not_start(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = types.ModuleType("swanlab")
    broken.__spec__ = types.SimpleNamespace(name="swanlab")  # type: ignore[assignment]

    def init(**_: Any) -> None:
        raise ConnectionError("no route to the tracker")

    broken.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swanlab", broken)
    assert len(losses(run(sft.STAGE, {**values, "trace": "swanlab"}).path)) == 6
    assert "swanlab did not start (no route to the tracker)" in capsys.readouterr().err


@pytest.mark.parametrize("event", ["setup", "on_log", "on_train_end"])
def test_a_tracker_that_fails_in_the_middle(event: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from transformers.integrations import TensorBoardCallback

    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise OSError("the tracker went away")

    monkeypatch.setattr(TensorBoardCallback, "on_train_begin" if event == "setup" else event, fail)
    done = run(sft.STAGE, {**values, "trace": "tensorboard"})
    assert len(losses(done.path)) == 6 and (done.path / "report.html").is_file()
    said = capsys.readouterr().err
    assert said.count("tensorboard failed (the tracker went away)") == 1


def test_tensorboard_gets_the_curve(values: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run(sft.STAGE, {**values, "trace": "tensorboard", "trace_project": "mine"})
    [events] = {p.parent for p in (tmp_path / "runs" / "trace" / "mine").rglob("events.*")}
    curve = EventAccumulator(str(events))
    curve.Reload()
    assert [s.value for s in curve.Scalars("train/loss")] == pytest.approx(losses(done.path))


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_without_a_key_a_run_is_written_offline(tracker: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The real libraries (the extra `tracking`)."""
    pytest.importorskip(tracker, reason="the extra `tracking` is not installed")
    for name in ("WANDB_API_KEY", "SWANLAB_API_KEY", "WANDB_MODE", "SWANLAB_MODE"):
        monkeypatch.delenv(name, raising=False)
    done = run(sft.STAGE, {**values, "trace": tracker})
    assert len(losses(done.path)) == 6 and (done.path / "report.html").is_file()
    said = capsys.readouterr().err
    assert f"{tracker}: offline" in said and "failed" not in said and "did not start" not in said
    written = [p for p in (tmp_path / "runs" / "trace").rglob("*") if p.is_file()]
    assert written and max(p.stat().st_size for p in written) > 1000, "no run was written"
