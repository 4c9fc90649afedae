"""F20: kill -9 of `sop tokenizer extend` (which makes baseline, corpus and selection first) at any moment: the same hashes from a rerun."""

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
from tiny_tokenizers import make, write_corpus

ARTIFACTS = ("work/baseline", "work/corpus", "work/selection", "extended")


def command(folder: Path, name: str, stage: str) -> list[str]:
    out = folder / name
    settings = [
        f"work_dir={out / 'work'}",
        f"extended_tokenizer={out / 'extended'}",
        f"corpus.inputs=[{folder / 'final'}]",
        "selection.new_tokens=60",
        "aux_tokenizer.vocab_size=500",
    ]
    return [sys.executable, "-m", "self_model_sop.cli", "tokenizer", stage, f"base_tokenizer={folder / 'qwen'}", *settings]


def hashes(out: Path) -> dict[str, str]:
    found = {}
    for name in ARTIFACTS:
        path = out / name / "manifest.json"
        if path.exists():  # a manifest never lies
            manifest = json.loads(path.read_text(encoding="utf-8"))
            assert differences(Target(out / name), manifest, deep=True) == []
            found[name] = content_hash(manifest)
    return found


def kill_and_rerun(folder: Path, points: int, seed: int) -> None:
    make("qwen", folder)
    write_corpus(folder / "final", 2000)
    start = time.perf_counter()
    subprocess.run(command(folder, "whole", "extend"), check=True, capture_output=True, cwd=folder)
    whole, expected = time.perf_counter() - start, hashes(folder / "whole")
    assert set(expected) == set(ARTIFACTS)
    killer = Killer(whole, random.Random(seed))
    for _ in range(points):
        process = subprocess.Popen(command(folder, "killed", "extend"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=folder)
        killer.kill(process)
        found = hashes(folder / "killed")
        assert found == {k: expected[k] for k in found}
        if len(found) == len(ARTIFACTS):  # everything was made before the kill: begin again
            for name in ARTIFACTS:
                (folder / "killed" / name / "manifest.json").rename(folder / f"{name.replace('/', '-')}.old")
                for path in sorted((folder / "killed" / name).rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
    subprocess.run(command(folder, "killed", "extend"), check=True, capture_output=True, cwd=folder)
    assert hashes(folder / "killed") == expected
    assert not [p for name in ARTIFACTS for p in (folder / "killed" / name).rglob(".*")]
    assert killer.killed > 0


@pytest.mark.slow
def test_f20_three_kills_of_extend(tmp_path: Path) -> None:
    kill_and_rerun(tmp_path, 3, seed=int(time.time()))


@pytest.mark.exhaustive
def test_f20_two_hundred_kills_of_extend(tmp_path: Path) -> None:
    kill_and_rerun(tmp_path, 200, seed=0)
