"""F13: what does not fit together is found before any weights are loaded, without torch, in well under three seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.config import ConfigError
from self_model_sop.errors import DATA, ENVIRONMENT, SopError
from self_model_sop.stage import load_for
from self_model_sop.train import pretrain, sft
from tiny_models import tiny_qwen
from tiny_runs import chats, expanded, pretrain_settings, run, settings, sft_settings


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preflight")
    expanded(tiny_qwen(path / "model"))
    big = path / "big"
    big.mkdir()
    for file in (path / "model").iterdir():
        (big / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((big / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 600, "content": "<|extra|>"})
    (big / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    chats(path / "chats.jsonl")
    return path


A = "training_args__"
RULES: dict[str, tuple[dict[str, Any], str]] = {
    "evaluation without a file": ({f"{A}eval_strategy": "steps"}, "there is no data.eval_file"),
    "best model without evaluation": ({f"{A}load_best_model_at_end": True}, "needs eval_strategy"),
    "best model saved at other times": (
        {f"{A}load_best_model_at_end": True, f"{A}eval_strategy": "epoch", f"{A}save_strategy": "steps", "data__eval_file": "chats.jsonl"},
        "save_strategy .steps. must equal eval_strategy .epoch.",
    ),
    "best model between evaluations": (
        {f"{A}load_best_model_at_end": True, f"{A}eval_strategy": "steps", f"{A}eval_steps": 3, f"{A}save_steps": 5, "data__eval_file": "chats.jsonl"},
        "multiple of eval_steps",
    ),
    "longer than the model reads": ({"data__max_length": 100_000}, "reads at most 512"),
    "a layer that is not there": ({"peft__target_modules": ["q_proj", "query_key_value"]}, "no layer named query_key_value.*its layers: .*q_proj"),
    "two precisions": ({f"{A}fp16": True, f"{A}bf16": True}, "fp16 and bf16 are both on"),
    "no output folder": ({f"{A}output_dir": ""}, "output_dir: missing"),
    "early stopping without evaluation": ({"early_stopping_patience": 2}, "early_stopping_patience: needs"),
    "an override of nothing": ({"template_override": True}, "there is no template_path"),
    "rank zero": ({"peft__lora_r": 0}, "lora_r must be at least 1"),
    "dropout one": ({"peft__lora_dropout": 1.0}, "lora_dropout must be in"),
    "qlora without adapters": ({"peft__enabled": False, "peft__qlora": True}, "qlora needs peft.enabled"),
    "a missing evaluation file": ({"data__eval_file": "chats.json"}, "no such file or folder.*did you mean 'chats.jsonl'"),
    "a negative learning rate": ({f"{A}learning_rate": -1.0}, "must be at least 0"),
    "a tokenizer larger than the embedding": ({"tokenizer_name_or_path": "big"}, "the tokenizer has id 600, the model's embedding only 555 rows"),
}


@pytest.mark.parametrize("rule", list(RULES))
def test_each_rule(rule: str, root: Path) -> None:
    values, expected = RULES[rule]
    given = {k: str(root / v) if k in ("data__eval_file", "tokenizer_name_or_path") else v for k, v in values.items()}
    with pytest.raises(ConfigError, match=f"(?s){expected}") as error:
        load_for(sft.STAGE, None, settings(**sft_settings(root / "model", root / "chats.jsonl", root / "out", **given)))
    assert error.value.code == 2


def test_no_heavy_library_is_imported_and_it_is_fast(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    argv = ["--config", str(tmp_path / "empty.yaml"), f"model_name_or_path={root / 'model'}", f"data.train_file={root / 'chats.jsonl'}"]
    argv += ["data.max_length=100000", f"training_args.output_dir={tmp_path}"]
    code = f"""
import sys, time
began = time.process_time()
from self_model_sop.train.sft import main
code = main({argv!r})
print(code, sorted({{'torch', 'transformers', 'datasets', 'peft'}} & set(sys.modules)), time.process_time() - began < 3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "2 [] True", done.stdout + done.stderr


def test_an_adapter_as_base_model_is_answered(root: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter, not a model"):
        load_for(sft.STAGE, None, settings(**sft_settings(tmp_path, root / "chats.jsonl", root / "out")))


def _code(call: Callable[[], Any]) -> tuple[int, str]:
    with pytest.raises(SopError) as error:
        call()
    return error.value.code, str(error.value)


def test_qlora_without_a_gpu_is_an_environment_error(root: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, text = _code(lambda: run(sft.STAGE, sft_settings(root / "model", root / "chats.jsonl", tmp_path / "out", peft__qlora=True)))
    assert code == ENVIRONMENT and "CUDA GPU" in text and "qlora: false" in text


@pytest.mark.parametrize(("given", "package"), [({f"{A}use_liger_kernel": True}, "liger-kernel"), ({"attn_implementation": "flash_attention_2"}, "flash-attn")])
def test_kernels_of_gpus_are_an_environment_error_elsewhere(given: dict[str, Any], package: str, root: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for stage, make, data in ((sft.STAGE, sft_settings, "chats.jsonl"), (pretrain.STAGE, pretrain_settings, "chats.jsonl")):
        code, text = _code(lambda s=stage, m=make, d=data: run(s, m(root / "model", root / d, tmp_path / s.name, **given)))  # type: ignore[misc]
        assert code == ENVIRONMENT and f"{package} needs a CUDA GPU" in text


def test_fp16_on_a_cpu_falls_back_with_a_word(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    values = sft_settings(root / "model", root / "chats.jsonl", tmp_path / "out", training_args__fp16=True, training_args__max_steps=1, precision="auto")
    done = run(sft.STAGE, values)
    assert "fp16 was asked for, which a CPU does not train in" in capsys.readouterr().err and done.stats["precision"] in ("fp32", "bf16")


def test_an_empty_training_file_is_a_data_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for stage, make in ((sft.STAGE, sft_settings), (pretrain.STAGE, pretrain_settings)):
        code, text = _code(lambda s=stage, m=make: run(s, m(root / "model", tmp_path / "empty.jsonl", tmp_path / s.name)))  # type: ignore[misc]
        assert code == DATA and "empty.jsonl" in text
