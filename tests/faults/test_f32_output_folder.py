"""F32 and F51: outputs that cannot be written are one clear error; a symlinked output folder is followed and stays a symlink."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from self_model_sop.errors import DISK, OK, USAGE

LIGHT = str(Path(__file__).parents[1] / "light_stages.py")


def write(output: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, LIGHT, "data", "write", f"output_dir={output}"], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("output", ["file", "file/below", "x" * 300, "/proc/self/out", "/dev/null/out", "loop/out"])
def test_a_place_that_cannot_be_written(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("of the user")
    (tmp_path / "loop").symlink_to("loop")
    done = write(output, tmp_path)
    assert done.returncode in (USAGE, DISK) and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3 and (tmp_path / "file").read_text() == "of the user"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    done = write("closed/out", tmp_path)
    assert done.returncode == USAGE and "Permission denied" in done.stderr


def test_a_symlinked_output_is_followed_and_kept(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    assert write("link", tmp_path).returncode == OK
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/data.jsonl").is_file()
    assert "up to date" in write("real", tmp_path).stdout
