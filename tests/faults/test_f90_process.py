"""F90: one output hash for the same data, whatever the number of workers, the hash seed, the folder and its name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from self_model_sop.artifact import content_hash

ROOT = Path(__file__).parents[2]


def test_f90_one_hash(tmp_path: Path) -> None:
    hashes = set()
    for folder, workers, seed in (("a", 1, "0"), ("b", 3, "1"), ("带 空格", 2, "2")):
        place = tmp_path / folder
        place.mkdir()
        shutil.copytree(ROOT / "data_process" / "sample_data", place / "sample_data")
        command = [sys.executable, "-m", "self_model_sop.cli", "data", "process", "--input", "sample_data", "--output_dir", "out", "--workers", str(workers), "--to_parquet"]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, cwd=place, capture_output=True)
        hashes.add(content_hash(json.loads((place / "out" / "manifest.json").read_text(encoding="utf-8"))))
    assert len(hashes) == 1
