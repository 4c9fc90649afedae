"""F20: SIGKILL at any file operation of a stage: nothing torn, no manifest that lies, the same hash after a rerun, no debris."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from self_model_sop import artifact
from self_model_sop.artifact import Target

CHILD = str(Path(__file__).parents[1] / "faulty_child.py")
NEW = ["files=6", "lines=4", "word=new"]
OLD = ["files=4", "lines=2", "word=old"]


def child(mode: str, k: int, out: Path, *rest: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CHILD, mode, str(k), str(out), *rest], capture_output=True, text=True, check=False, timeout=60)


def content(out: Path) -> str | None:
    """The hash of an artifact that is as its manifest says; None where there is no manifest."""
    manifest = artifact.read_manifest(Target(out).manifest)
    if manifest is None:
        return None
    assert artifact.differences(Target(out), manifest, deep=True) == [], "a manifest that lies"
    return artifact.content_hash(manifest)


def names(out: Path) -> list[str]:
    return sorted(str(p.relative_to(out)) for p in out.rglob("*"))


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[str], int]:
    """(hash of the old artifact, hash of the new one, its files, number of operations when the new one replaces the old)."""
    out = tmp_path_factory.mktemp("truth") / "out"
    assert child("count", 0, out, *OLD).returncode == 0
    old = content(out)
    done = child("count", 0, out, *NEW, "--overwrite")
    new = content(out)
    assert old and new and old != new
    return old, new, names(out), int(done.stdout.splitlines()[-1])


def kill_at(k: int, out: Path, truth: tuple[str, str, list[str], int], *, replacing: bool) -> None:
    old, new, files, _ = truth
    (out.parent / "mine.txt").write_text("of the user")
    if replacing:
        assert child("count", 0, out, *OLD).returncode == 0
    killed = child("kill", k, out, *NEW, "--overwrite")
    assert killed.returncode in (-signal.SIGKILL, 0)
    found = content(out) if out.exists() else None
    assert found in ((old, new, None) if replacing else (new, None)), "the old artifact, the new one, or none"
    again = child("count", 0, out, *NEW, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert content(out) == new and names(out) == files, "the same hash, and no debris"
    assert (out.parent / "mine.txt").read_text() == "of the user"


def test_a_sample_of_operations(tmp_path: Path, truth: tuple[str, str, list[str], int]) -> None:
    draw = random.Random(20)
    for n, k in enumerate(draw.sample(range(1, truth[3] + 1), 6)):
        (tmp_path / str(n)).mkdir()
        kill_at(k, tmp_path / str(n) / "out", truth, replacing=n % 2 == 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("replacing", [False, True])
def test_every_operation(tmp_path: Path, truth: tuple[str, str, list[str], int], replacing: bool) -> None:
    for k in range(1, truth[3] + 1):
        (tmp_path / str(k)).mkdir()
        kill_at(k, tmp_path / str(k) / "out", truth, replacing=replacing)


def kill_after(seconds: float, out: Path, truth: tuple[str, str, list[str], int]) -> None:
    process = subprocess.Popen([sys.executable, CHILD, "count", "0", str(out), *NEW, "pause=0.02"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.kill()
    process.wait()
    assert not out.exists() or content(out) in (truth[1], None)
    assert child("count", 0, out, *NEW).returncode == 0
    assert content(out) == truth[1] and names(out) == truth[2]


@pytest.mark.parametrize("points", [3, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_random_moments(tmp_path: Path, truth: tuple[str, str, list[str], int], points: int) -> None:
    start = time.perf_counter()
    child("count", 0, tmp_path / "timed", *NEW, "pause=0.02")
    whole, draw = time.perf_counter() - start, random.Random(points)
    for n in range(points):
        kill_after(draw.uniform(0.3, 1.0) * whole, tmp_path / f"out{n}", truth)


def test_a_killed_group_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    """Two artifacts in one folder: what a killed run of one left is swept without touching the other."""
    one, two = Target(tmp_path, "one"), Target(tmp_path, "two")
    for target in (one, two):
        target.work("x").mkdir(parents=True)
        (target.work("x") / f"{target.group}.jsonl").write_text("{}\n")
        artifact.publish(target, target.work("x"), {"schema": 1, "stage": "data.write"})
    one.hidden("journal").write_text(json.dumps({"files": ["one.jsonl"]}))
    one.manifest.unlink()
    one.work("y").mkdir()
    artifact.sweep(one)
    assert names(tmp_path) == ["two.jsonl", "two.manifest.json"]
