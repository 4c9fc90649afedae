"""Training runs on tiny models: data, settings and calls, for the tests of train/ and their faults."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from self_model_sop.config import Setting, load
from self_model_sop.stage import Artifact, Stage, load_for

_TEXT = "我们的医生说要多喝水，注意休息。高血压患者应当按时服药，定期测量血压。人工智能模型可以回答问题。感冒通常由病毒引起。The patient should rest."


def rows(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def chats(path: Path, n: int = 24, *, seed: int = 0, longest: int = 40) -> Path:
    """Alpaca rows with answers of 3 to `longest` characters."""
    draw = random.Random(seed)
    made = [{"instruction": f"第{i}个问题是什么？", "input": "", "output": "".join(draw.choices(_TEXT, k=draw.randint(3, longest))), "_source": f"chats:{i}"} for i in range(n)]
    return rows(path, made)


def texts(path: Path, n: int = 30, *, seed: int = 0, longest: int = 120) -> Path:
    """Pretraining rows of 5 to `longest` characters."""
    draw = random.Random(seed)
    return rows(path, [{"text": "".join(draw.choices(_TEXT, k=draw.randint(5, longest))), "_source": f"texts:{i}"} for i in range(n)])


def expanded(folder: Path, first: int = 500, end: int = 540) -> Path:
    """Say of a tiny model that its ids first..end were appended by an expansion."""
    (folder / "expansion.json").write_text(json.dumps({"base_vocab_size": first, "new_ids": [first, end], "method": "test", "tokens": end - first}), encoding="utf-8")
    return folder


def settings(**values: Any) -> list[Setting]:
    """`a__b=c` as the setting `a.b: c`."""
    return [Setting(key.replace("__", "."), str(v) if isinstance(v, Path) else v, "test", Path.cwd()) for key, v in values.items()]


def sft_settings(model: Path, train: Path, out: Path, **more: Any) -> dict[str, Any]:
    """A short deterministic fine-tuning."""
    return {
        "model_name_or_path": model, "data__train_file": train, "eval_overlap": "warn", "data__max_length": 128, "precision": "fp32", "training_args__output_dir": out,
        "training_args__max_steps": 6,
        "training_args__per_device_train_batch_size": 4, "training_args__learning_rate": 1e-2, "training_args__logging_steps": 1, **more,
    }  # fmt: skip


def pretrain_settings(model: Path, train: Path, out: Path, **more: Any) -> dict[str, Any]:
    """A short deterministic pretraining."""
    return {
        "model_name_or_path": model, "data__train_file": train, "eval_overlap": "warn", "data__block_size": 64, "precision": "fp32", "training_args__output_dir": out,
        "training_args__per_device_train_batch_size": 2, "training_args__learning_rate": 1e-2, "training_args__logging_steps": 1,
        "phases": [{"name": "full", "max_steps": 6}], **more,
    }  # fmt: skip


def config_of(stage: Stage[Any], values: dict[str, Any]) -> Any:
    return load(stage.config, None, settings(**values)).config


def run(stage: Stage[Any], values: dict[str, Any], **options: Any) -> Artifact:
    """Load, preflight and run, as the command line does."""
    return stage.run(load_for(stage, None, settings(**values)).config, **options)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **more}


def losses(artifact: Path) -> list[float]:
    """The training losses of metrics.jsonl, one per step."""
    lines = (json.loads(line) for line in (artifact / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


# --- runs in processes of their own ---------------------------------------------------------------------------------------------------------


class Process:
    """A command in a process forked from a server that has the heavy libraries imported; its stderr goes to a file."""

    def __init__(self, name: str, values: dict[str, Any], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "peft", "accelerate", "safetensors.torch"])
        self.log = log
        self.process = context.Process(target=_main, args=(name, [f"{k.replace('__', '.')}={_yaml(v)}" for k, v in values.items()], str(log)))
        self.process.start()

    def wait(self) -> int:
        self.process.join(240)
        assert self.process.exitcode is not None, "still running after 240 s"
        return self.process.exitcode

    def signal_when(self, ready: Callable[[], bool], number: int = signal.SIGKILL, delay: float = 0.0) -> int:
        """Send a signal once `ready()` (or let it end by itself); the exit code."""
        end = time.monotonic() + 240
        while time.monotonic() < end and self.process.is_alive() and not ready():
            time.sleep(0.002)
        time.sleep(delay)
        if self.process.is_alive() and self.process.pid:
            os.kill(self.process.pid, number)
        return self.wait()


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False).strip('"')


def _main(name: str, argv: list[str], log: str) -> None:
    import torch

    from self_model_sop.cli import main

    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    empty = Path(log).with_suffix(".yaml")  # not the project's own YAML
    empty.touch()
    sys.exit(main([*name.split(), "--config", str(empty), *argv]))


def work_folder(out: Path) -> Path | None:
    """The hidden work folder of a run in progress."""
    return next(out.glob(".work-*"), None) if out.is_dir() else None


def steps_logged(out: Path) -> int:
    """How many lines of metrics a run in progress has written."""
    work = work_folder(out)
    path = work / "metrics.jsonl" if work else None
    return path.read_text(encoding="utf-8").count("\n") if path and path.exists() else 0


def torchrun(root: Path, name: str, values: dict[str, Any], **more: str) -> subprocess.CompletedProcess[str]:
    """A command on two processes."""
    (root / "empty.yaml").touch()
    words = [f"{k.replace('__', '.')}={_yaml(v)}" for k, v in values.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "self_model_sop.cli"]
    args = [*launcher, *name.split(), "--config", str(root / "empty.yaml"), *words]
    return subprocess.run(args, capture_output=True, text=True, env=environment(**more), timeout=400)
