"""F94: held-out examples that are trained on: exact ones are refused before anything is trained; n-gram overlap is reported where models are compared (tests/eval) and taken out by
`sop data process --decontaminate` (tests/data)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.errors import DATA, SopError
from self_model_sop.stage import Stage
from self_model_sop.train import dpo, pretrain, sft
from tiny_models import tiny_qwen
from tiny_preferences import pair_settings, preferences
from tiny_runs import chats, pretrain_settings, run, sft_settings, texts


def _case(name: str, folder: Path) -> tuple[Stage[Any], dict[str, Any], Path]:
    model, out, train = tiny_qwen(folder / "model"), folder / "out", folder / "train.jsonl"
    if name == "dpo":
        preferences(train, 12)
        return dpo.STAGE, pair_settings(folder, out, training_args__max_steps=1), train
    if name == "sft":
        return sft.STAGE, sft_settings(model, chats(train, 12), out, training_args__max_steps=1), train
    return pretrain.STAGE, pretrain_settings(model, texts(train, 12), out, phases=[{"name": "full", "max_steps": 1}]), train


@pytest.mark.parametrize("name", ["sft", "pretrain", "dpo"])
def test_held_out_examples_in_the_training_data(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stage, values, train = _case(name, tmp_path)
    copied = json.loads(train.read_text(encoding="utf-8").splitlines()[3])
    other = json.loads(json.dumps(copied, ensure_ascii=False).replace("，", "；").replace("第", "另"))
    unlike = {key: f"{value}多" if isinstance(value, str) else value for key, value in other.items()}
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join(json.dumps({**row, "_source": f"held:{i}"}, ensure_ascii=False) + "\n" for i, row in enumerate((unlike, copied))), encoding="utf-8")
    values |= {"data__eval_file": held_out, "eval_overlap": "refuse"}
    with pytest.raises(SopError, match=r"1 of 2 held-out examples .*first: held:1") as error:
        run(stage, values)
    assert error.value.code == DATA and "eval_overlap: warn" in str(error.value) and not (tmp_path / "out" / "manifest.json").exists()
    assert run(stage, values | {"eval_overlap": "warn"}).stats["steps"] == 1
    assert "1 of 2 held-out examples" in capsys.readouterr().err
