"""F20: kill -9 of `sop data process` at any moment: no torn artifact, no debris, and the same hashes from a rerun."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from killing import Killer
from self_model_sop.artifact import Target, content_hash, differences
from self_model_sop.data.records import write_jsonl


def command(folder: Path, out: str) -> list[str]:
    options = ["--input", str(folder / "raw"), "--output_dir", str(folder / out), "--to_parquet", "--workers", "1"]
    return [sys.executable, "-m", "self_model_sop.cli", "data", "process", *options]


def raw_data(folder: Path) -> None:
    draw = random.Random(3)
    words = ["血压", "血糖", "复查", "用药", "饮食", "运动", "指标", "正常", "升高", "降低", "建议", "患者"]

    def text(n: int) -> str:
        return "，".join(draw.choice(words) + str(draw.randrange(9999)) for _ in range(n)) + "。"

    for name in ("pretrain", "finetune"):
        (folder / "raw" / name).mkdir(parents=True)
    write_jsonl(folder / "raw" / "pretrain" / "a.jsonl", ({"text": text(60)} for _ in range(3000)))
    write_jsonl(folder / "raw" / "finetune" / "b.jsonl", ({"instruction": text(8), "output": text(30)} for _ in range(1500)))


def manifest(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return found


def kill_and_rerun(folder: Path, points: int, seed: int) -> None:
    raw_data(folder)
    start = time.perf_counter()
    subprocess.run(command(folder, "whole"), check=True, capture_output=True)
    whole = time.perf_counter() - start
    expected = content_hash(manifest(folder / "whole"))
    killer = Killer(whole, random.Random(seed))
    for i in range(points):
        out = folder / "killed"
        process = subprocess.Popen(command(folder, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        killer.kill(process)
        if (out / "manifest.json").exists():  # a manifest never lies
            assert differences(Target(out), manifest(out), deep=True) == []
        if i % 2 == 0:
            continue  # kill over the debris of a kill too
        subprocess.run(command(folder, "killed"), check=True, capture_output=True)
        assert content_hash(manifest(out)) == expected
        assert sorted(p.name for p in out.iterdir()) == ["finetune", "manifest.json", "pretrain"]
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    subprocess.run(command(folder, "killed"), check=True, capture_output=True)
    assert content_hash(manifest(folder / "killed")) == expected
    assert killer.killed > 0


@pytest.mark.slow
def test_f20_three_kills(tmp_path: Path) -> None:
    kill_and_rerun(tmp_path, 3, seed=int(time.time()))


@pytest.mark.exhaustive
def test_f20_two_hundred_kills(tmp_path: Path) -> None:
    kill_and_rerun(tmp_path, 200, seed=0)
