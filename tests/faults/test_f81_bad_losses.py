"""F81: a loss that is not finite stops the run and names the records of its batch; data that teach nothing are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from self_model_sop.errors import DATA, SopError
from self_model_sop.train import pretrain, sft
from tiny_models import tiny_qwen
from tiny_runs import chats, pretrain_settings, rows, run, sft_settings, texts


def _refused(stage: Any, values: dict[str, Any]) -> str:
    with pytest.raises(SopError) as error:
        run(stage, values)
    assert error.value.code == DATA, error.value
    return str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_records_of_the_batch_are_saved(bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    real, calls = transformers.Trainer.compute_loss, 0

    def compute(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = real(self, *args, **kwargs)
        return loss * bad if calls == 3 else loss

    monkeypatch.setattr(transformers.Trainer, "compute_loss", compute)
    text = _refused(sft.STAGE, sft_settings(tiny_qwen(tmp_path / "model"), chats(tmp_path / "chats.jsonl"), tmp_path / "out"))
    saved = json.loads(next((tmp_path / "out").glob(".work-*/not_finite.json")).read_text(encoding="utf-8"))
    assert f"the loss became {bad} at step 3" in text and "lower learning_rate" in text
    assert saved["step"] == 3 and len(saved["records"]) == 4 and all(name.startswith("chats:") for name in saved["records"]) and saved["records"][0] in text


def test_a_learning_rate_that_explodes(tmp_path: Path) -> None:
    values = pretrain_settings(tiny_qwen(tmp_path / "model"), texts(tmp_path / "texts.jsonl"), tmp_path / "out", training_args__learning_rate=1e30)
    assert "the loss became" in _refused(pretrain.STAGE, values)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_nothing_to_learn_in_any_row(tmp_path: Path) -> None:
    path = rows(tmp_path / "empty.jsonl", [{"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答", "train": False}]}] * 5)
    text = _refused(sft.STAGE, sft_settings(tiny_qwen(tmp_path / "model"), path, tmp_path / "out"))
    assert "learn" in text or "mask" in text


def test_an_empty_evaluation_file(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").touch()
    values = sft_settings(tiny_qwen(tmp_path / "model"), chats(tmp_path / "chats.jsonl"), tmp_path / "out", data__eval_file=tmp_path / "eval.jsonl")
    assert "eval.jsonl" in _refused(sft.STAGE, values)


def test_everything_is_cut_before_the_answer(tmp_path: Path) -> None:
    path = rows(tmp_path / "long.jsonl", [{"instruction": "很长的问题" * 60, "input": "", "output": "答"}] * 4)
    assert "nothing_to_learn_before_the_cut (4)" in _refused(sft.STAGE, sft_settings(tiny_qwen(tmp_path / "model"), path, tmp_path / "out"))


def test_weights_that_are_already_broken(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_qwen(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "the loss became nan at step 1" in _refused(sft.STAGE, sft_settings(model, chats(tmp_path / "chats.jsonl"), tmp_path / "out"))
