"""F24: two runs on one output: exactly one wins, the other ends with 7 and the pid of the winner."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from self_model_sop.artifact import Target, differences, read_manifest
from self_model_sop.errors import LOCKED, OK

LIGHT = str(Path(__file__).parents[1] / "light_stages.py")


def race(out: Path, runners: int) -> None:
    start = [sys.executable, LIGHT, "data", "write", f"output_dir={out}", "files=2", "pause=1.5"]
    processes = [subprocess.Popen(start, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in range(runners)]
    ended = [(p.communicate(timeout=60)[1], p.returncode, p.pid) for p in processes]
    winners = [pid for _, code, pid in ended if code == OK]
    assert len(winners) == 1, ended
    for text, code, pid in ended:
        if pid not in winners:
            assert code == LOCKED and f"another run (pid {winners[0]}) is writing here" in text, text
    manifest = read_manifest(Target(out).manifest)
    assert manifest and differences(Target(out), manifest, deep=True) == []
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "part"]


@pytest.mark.parametrize("races", [2, pytest.param(50, marks=pytest.mark.exhaustive)])
def test_one_winner(tmp_path: Path, races: int) -> None:
    for n in range(races):
        race(tmp_path / f"out{n}", 2 + n % 2)


def test_a_stale_lock_is_taken_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").write_text("999999")
    done = subprocess.run([sys.executable, LIGHT, "data", "write", f"output_dir={out}"], capture_output=True, text=True, check=False)
    assert done.returncode == OK and not re.search("pid", done.stderr) and not (out / ".lock").exists()
