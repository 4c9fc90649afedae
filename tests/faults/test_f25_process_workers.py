"""F25: a worker of `sop data process` dies, or its parent does: one message, exit 1 within a minute, no orphans."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from self_model_sop.data.records import write_jsonl


def children(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The workers (not the resource tracker), once they run."""
    for _ in range(600):
        found = []
        for pid in children(process.pid):
            try:
                if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
            except OSError:
                continue
        if len(found) == 2:
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no workers")


@pytest.fixture
def started(tmp_path: Path) -> subprocess.Popen[str]:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    draw = random.Random(0)
    write_jsonl(tmp_path / "in.jsonl", ({"text": f"{draw.getrandbits(16_000):x}"} for _ in range(10_000)))
    command = [sys.executable, "-m", "self_model_sop.cli", "data", "process", "--input", str(tmp_path / "in.jsonl"), "--output_dir", str(tmp_path / "out"), "--workers", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def gone(pids: list[int], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_f25_a_worker_dies(started: subprocess.Popen[str], tmp_path: Path) -> None:
    workers = workers_of(started)
    os.kill(workers[0], signal.SIGKILL)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 1
    assert "a worker process died" in said and "Traceback" not in said
    assert gone(workers)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.slow
def test_f25_the_parent_dies(started: subprocess.Popen[str]) -> None:
    workers = workers_of(started)
    started.kill()
    started.wait()
    assert gone(workers)
