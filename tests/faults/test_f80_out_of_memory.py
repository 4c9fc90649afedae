"""F80: out of memory, wherever it happens, ends with exit 4 and the cheapest fixes; with auto_batch the same training goes on in smaller pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from self_model_sop.errors import ENVIRONMENT
from self_model_sop.train import finish, loop, sft
from self_model_sop.train.attempts import OutOfMemory, halved
from tiny_models import tiny_qwen
from tiny_runs import chats, losses, run, sft_settings


def _failing(real: Callable[..., Any], at: int) -> Callable[..., Any]:
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(*args, **kwargs)

    return wrapped


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return sft_settings(tiny_qwen(tmp_path / "model"), chats(tmp_path / "chats.jsonl"), tmp_path / "out", data__eval_file=tmp_path / "chats.jsonl", training_args__max_steps=3)


PLACES = {
    "step 1": (torch.Tensor, "backward", 1),
    "step 2": (torch.Tensor, "backward", 2),
    "the first evaluation": (loop, "supervised_loss", 1),
    "the last evaluation": (loop, "supervised_loss", 2),
    "saving": (finish, "save_model", 1),
}


@pytest.mark.parametrize("place", list(PLACES))
def test_five_places(place: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, at = PLACES[place]
    monkeypatch.setattr(owner, name, _failing(getattr(owner, name), at))
    with pytest.raises(OutOfMemory) as error:
        run(sft.STAGE, values)
    text = str(error.value)
    assert error.value.code == ENVIRONMENT and "Tried to allocate 20.00 GiB" in text
    assert "per_device_train_batch_size=2 training_args.gradient_accumulation_steps=2" in text and "gradient_checkpointing=true" in text and "data.max_length=64" in text


def test_smaller_pieces_give_the_same_training(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = losses(run(sft.STAGE, {**values, "training_args__output_dir": tmp_path / "whole"}).path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", _failing(torch.Tensor.backward, 2))
        done = run(sft.STAGE, {**values, "auto_batch": True})
    assert "auto_batch: per_device_train_batch_size 2, gradient_accumulation_steps 2" in capsys.readouterr().err
    assert done.stats["batch"] == {"per_device": 2, "accumulation": 2, "processes": 1}
    found = losses(done.path)
    assert len(found) == len(whole) == 3 and max(abs(a - b) for a, b in zip(found, whole, strict=True)) <= 1e-5


def test_halving_keeps_the_effective_batch() -> None:
    for batch, steps in ((8, 1), (2, 4), (3, 2), (1, 8)):
        smaller = halved({"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps})
        assert smaller is None if batch == 1 else smaller and smaller["per_device_train_batch_size"] * smaller["gradient_accumulation_steps"] == batch * steps
