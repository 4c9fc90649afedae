"""F31: a disk that is known to be too small: refused before anything is written (exit 6), with what would be needed and what is free."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.data import process
from self_model_sop.errors import DISK, SopError
from self_model_sop.infer import gguf
from self_model_sop.stage import Stage
from self_model_sop.train import pretrain, sft
from tiny_models import tiny_qwen
from tiny_runs import chats, config_of, pretrain_settings, sft_settings, texts


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the disk says it has, in bytes; a test sets it."""
    has = [1 << 40]
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=has[0]))
    return has


def _process(folder: Path) -> tuple[Stage[Any], Any, int]:
    path = texts(folder / "in.jsonl")
    return process.STAGE, process.Config(input=path, output_dir=folder / "out"), round(3.2 * path.stat().st_size)


def _pretrain(folder: Path) -> tuple[Stage[Any], Any, int]:
    model = tiny_qwen(folder / "model")
    weights = (model / "model.safetensors").stat().st_size
    return pretrain.STAGE, config_of(pretrain.STAGE, pretrain_settings(model, texts(folder / "in.jsonl"), folder / "out")), 4 * weights


def _gguf(folder: Path) -> tuple[Stage[Any], Any, int]:
    model = tiny_qwen(folder / "model")
    return gguf.STAGE, gguf.Config(model_path=model, output_path=folder / "out" / "m.gguf", quantize="q4_k_m"), 2 * (model / "model.safetensors").stat().st_size


@pytest.mark.parametrize("case", [_process, _pretrain, _gguf])
def test_nothing_begins_that_would_fill_the_disk(tmp_path: Path, free: list[int], case: Any) -> None:
    stage, config, about = case(tmp_path)
    need = stage.disk(config)
    assert about * 0.8 < need < about * 1.2
    free[0] = round(need * 1.1)
    with pytest.raises(SopError, match="are free") as error:
        stage.run(config)
    assert error.value.code == DISK and "MiB" in str(error.value)
    assert not [p for p in (tmp_path / "out").rglob("*") if ".work" in p.name], "not even a work folder"


def test_with_a_fifth_more_than_needed_it_begins(tmp_path: Path, free: list[int]) -> None:
    stage, config, _ = _process(tmp_path)
    free[0] = round(stage.disk(config) * 1.2) + 1
    assert stage.run(config).path.is_dir()


def test_an_adapter_needs_little_and_a_model_that_is_not_here_nothing_known(tmp_path: Path) -> None:
    model, data = tiny_qwen(tmp_path / "model"), chats(tmp_path / "in.jsonl")
    adapter, full = (sft.STAGE.disk(config_of(sft.STAGE, sft_settings(model, data, tmp_path / "out", peft__enabled=on))) for on in (True, False))
    assert 0 < adapter < full / 4
    assert sft.STAGE.disk(config_of(sft.STAGE, sft_settings(Path("some") / "model", data, tmp_path / "out"))) == 0
