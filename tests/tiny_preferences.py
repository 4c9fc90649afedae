"""Preference pairs that a tiny model can learn, and their settings, for the tests of reward and dpo."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny_runs import rows

GOOD, BAD = "不知道！", "谢谢您。"  # an untrained tiny model holds the second one for likelier


def preferences(path: Path, n: int = 32, *, seed: int = 0, longest: int = 8) -> Path:
    """Pairs whose answers begin alike; the chosen one ends with `GOOD`, the other with `BAD`."""
    draw = random.Random(seed)
    made = []
    for i in range(n):
        text = "".join(draw.choices("我们的医生说要多喝水注意休息", k=draw.randint(1, longest)))
        made.append({"prompt": f"第{i}个问题是什么？", "chosen": text + GOOD, "rejected": text + BAD, "_source": f"pairs:{i}"})
    return rows(path, made)


def pair_settings(root: Path, out: Path, **more: Any) -> dict[str, Any]:
    """A short deterministic training on `root`/train.jsonl, measured on `root`/eval.jsonl."""
    return {
        "model_name_or_path": root / "model", "data__train_file": root / "train.jsonl", "data__eval_file": root / "eval.jsonl", "eval_overlap": "warn",
        "data__max_length": 128, "precision": "fp32",
        "training_args__output_dir": out, "training_args__max_steps": 6, "training_args__per_device_train_batch_size": 4, "training_args__learning_rate": 1e-2,
        "training_args__logging_steps": 1, **more,
    }  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
