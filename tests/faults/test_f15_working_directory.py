"""F15: the same result from any working directory and from paths with spaces and Chinese characters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from self_model_sop.artifact import Target, content_hash, differences, read_manifest
from self_model_sop.errors import OK

LIGHT = str(Path(__file__).parents[1] / "light_stages.py")
PLACES = ["plain", "with space", "中文 目录", "ünïcode'quote\"#%20"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cwd", [".", "config", "deep/below", "/"], ids=["root", "config", "below", "elsewhere"])
def test_same_hash_same_place(tmp_path: Path, place: str, cwd: str) -> None:
    project = tmp_path / place
    for folder in ("config/pipeline", "deep/below", "raw"):
        (project / folder).mkdir(parents=True)
    (project / "raw/中 文.txt").write_text("内容", encoding="utf-8")
    (project / "config/w.yaml").write_text("source: raw/中 文.txt\noutput_dir: out put\n", encoding="utf-8")
    (project / "config/pipeline/p.yaml").write_text("name: p\nstages:\n  - w: {stage: data.write, config: config/w.yaml}\n  - j: {stage: data.join, with: {input: ['${w}']}}\n")
    where = Path(cwd) if cwd == "/" else project / cwd
    by_hand = subprocess.run([sys.executable, LIGHT, "data", "write", "--config", str(project / "config/w.yaml")], cwd=where, capture_output=True, text=True, check=False)
    assert by_hand.returncode == OK, by_hand.stderr
    piped = subprocess.run([sys.executable, LIGHT, "run", str(project / "config/pipeline/p.yaml")], cwd=where, capture_output=True, text=True, check=False)
    assert piped.returncode == OK, piped.stderr
    hashes = set()
    for folder in (project / "out put", project / "runs/p/w"):
        manifest = read_manifest(Target(folder).manifest)
        assert manifest and differences(Target(folder), manifest, deep=True) == []
        hashes.add((content_hash(manifest), manifest["fingerprint"]))
    assert len(hashes) == 1
    assert (project / "out put/data.jsonl").read_text(encoding="utf-8").splitlines()[0] == '{"text": "内容line 0.0"}'
