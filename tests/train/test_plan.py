"""What a run is said to take beside what it takes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.stage import load_for
from self_model_sop.train import machine, plan, sft
from self_model_sop.train.plan import GIB, disk
from tiny_models import tiny_qwen
from tiny_runs import chats, config_of, run, settings, sft_settings

ROOT = Path(__file__).resolve().parents[2]


def _benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "training" / "memory.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [None, ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear"])
def test_what_a_layer_keeps_is_what_torch_saves(lora: Any, packed: bool) -> None:
    counted, estimated = _benchmark().saved(lora=lora, packed=packed)
    assert estimated == pytest.approx(counted, rel=0.01)


def _plan(values: dict[str, Any]) -> str:
    return "\n".join(sft.STAGE.plan(load_for(sft.STAGE, None, settings(**values)).config))


def test_the_nearest_setting_that_fits_is_named_and_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = sft_settings(tiny_qwen(tmp_path / "model"), chats(tmp_path / "chats.jsonl"), tmp_path / "out", training_args__per_device_train_batch_size=512)
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(machine, "memory_available", lambda: 1 * GIB)
    text = _plan(values)
    assert "too little for" in text and "nearest setting that fits: training_args.per_device_train_batch_size=" in text
    words = text.split("nearest setting that fits: ")[1].split(" (")[0].split()
    fitting = {k.replace("training_args.", "training_args__"): int(v) for k, v in (w.split("=") for w in words)}
    assert fitting["training_args__per_device_train_batch_size"] * fitting["training_args__gradient_accumulation_steps"] == 512
    assert "too little for" not in _plan({**values, **fitting})
    monkeypatch.setattr(machine, "memory_available", lambda: GIB // 8)
    assert "none with smaller batches" in _plan(values)


@pytest.mark.parametrize("adapter", [True, False])
def test_what_a_run_has_on_disk(adapter: bool, tmp_path: Path) -> None:
    """Two checkpoints and the result of a finished run, beside the estimate, which has one checkpoint more: the one that is being written before the oldest goes."""
    more = {"peft__enabled": adapter, "peft__lora_r": 32, "peft__target_modules": "all-linear", "keep_checkpoints": True}
    steps = {"training_args__save_steps": 2, "training_args__max_steps": 7, "training_args__save_total_limit": 2}
    values = sft_settings(tiny_qwen(tmp_path / "model"), chats(tmp_path / "chats.jsonl"), tmp_path / "out", **more, **steps)
    done = run(sft.STAGE, values)
    weights = sum(p.stat().st_size for p in done.path.rglob("*") if p.name in ("model.safetensors", "adapter_model.safetensors", "optimizer.pt"))
    assert len(list((done.path / "checkpoints").iterdir())) == 2
    assert disk(config_of(sft.STAGE, values)) == pytest.approx(weights * 10 / 7, rel=0.1)


def test_the_learned_share_is_read_from_the_data(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "问问问", "input": "", "output": "答"}\n' * 50 + "{broken\n", encoding="utf-8")
    assert plan.learned_share([path]) == pytest.approx(0.25, abs=0.01)


@pytest.mark.slow
def test_the_estimate_of_a_run_is_near_its_peak(tmp_path: Path) -> None:
    """A model whose activations, logits and optimizer states are several times the libraries' own memory; the benchmark measures SmolLM2."""
    model = tiny_qwen(tmp_path / "model", vocab_size=600, hidden_size=512, layers=8)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join('{"text": "%s"}\n' % ("高血压患者应当按时服药，定期测量血压。" * 12) for _ in range(200)), encoding="utf-8")
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "benchmarks" / "training")!r})
import memory
memory.RUNS["here"] = ("pretrain", ["data.block_size=256", "training_args.per_device_train_batch_size=8"])
print(memory.measure("here", Path({str(model)!r}), Path({str(texts)!r}), Path("x"), 2)["off_by"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert abs(float(done.stdout.split()[-1])) <= 0.25
