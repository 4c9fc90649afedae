"""F71: a credential from the environment reaches no file, no log line and no process list, whatever goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIGHT = str(Path(__file__).parents[1] / "light_stages.py")
CANARY = "canary-7f3e9a1b5c"
ENVIRONMENT = {**os.environ, "WANDB_API_KEY": CANARY, "HF_TOKEN": CANARY + "-hf", "MY_SERVICE_SECRET": CANARY + "-s"}
PIPELINE = "name: p\nstages:\n  - w: {stage: data.write, with: {files: 3}}\n  - j: {stage: data.join, with: {input: ['${w}'], table: {text: 'x'}}}\n"


def sop(cwd: Path, *argv: str) -> str:
    done = subprocess.run([sys.executable, LIGHT, *argv], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def written(folder: Path) -> bytes:
    return b"".join(p.read_bytes() + str(p).encode() for p in folder.rglob("*") if p.is_file())


def test_nowhere_in_the_output_tree_and_the_logs(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(PIPELINE)
    commands = (["run", "p.yaml"], ["run", "p.yaml"], ["runs", "verify", "runs"], ["runs", "ls", "--json"], ["doctor"])
    logs = "".join(sop(tmp_path, *argv) for argv in commands)
    assert "2 stages done" in logs and CANARY not in logs
    assert CANARY.encode() not in written(tmp_path)


@pytest.mark.parametrize("argument", [f"{key}{CANARY}" for key in ("word=", "note=", "source=/gone/", "output_dir=/proc/", "lines=")] + [f"{CANARY}=1", f"huggingface.{CANARY}=1"])
def test_a_value_that_happens_to_hold_it_is_masked(tmp_path: Path, argument: str) -> None:
    """The user wrote it into the command; what is printed and what is recorded about the run does not repeat it."""
    assert CANARY not in sop(tmp_path, "data", "write", argument)
    manifests = b"".join(p.read_bytes() for p in tmp_path.rglob("*.json"))
    assert CANARY.encode() not in manifests


def test_not_in_the_process_list(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, LIGHT, "data", "write", "files=20", "pause=0.2"], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        while not list(tmp_path.glob("out/.work*/part/*")):
            time.sleep(0.05)
            assert process.poll() is None
        commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
        assert not [c for c in commands if CANARY.encode() in c]
        assert CANARY.encode() not in written(tmp_path)
    finally:
        process.kill()
        process.wait()
