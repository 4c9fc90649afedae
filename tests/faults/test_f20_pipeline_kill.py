"""F20: SIGKILL of a whole pipeline (data and tokenizer stages of the quickstart) at random moments, then the same command: the same hashes."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny_models
from self_model_sop.artifact import content_hash
from self_model_sop.ops import runs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with the shipped configs and the first nine stages of the quickstart, on a tiny model."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_models.tiny_qwen(folder / "tiny")
    (folder / "config").symlink_to(ROOT / "config")
    (folder / "data_process").symlink_to(ROOT / "data_process")
    text = (ROOT / "config/pipeline/quickstart.yaml").read_text(encoding="utf-8")
    (folder / "p.yaml").write_text(text[: text.index("  - evaluate:")], encoding="utf-8")
    return folder


def start(project: Path, root: Path) -> subprocess.Popen[str]:
    settings = [f"root={root}", f"model.model_name_or_path={project / 'tiny'}", "shared.tokenizer.selection.new_tokens=40"]
    return subprocess.Popen([sys.executable, "-m", "self_model_sop.cli", "run", "p.yaml", *settings], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hashes(root: Path) -> dict[str, str]:
    """Content hash of every artifact; all of them are as their manifests say, and nothing else is there."""
    found = runs.find(root)
    runs.check(found)
    assert {f.state for f in found} == {"ok"}, [(str(f.target), f.state) for f in found if f.state != "ok"]
    assert not [p for p in root.rglob(".*") if p.name.startswith((".work", ".journal", ".lock"))], "no debris"
    return {f.manifest["stage"]: content_hash(f.manifest) for f in found if f.manifest}


@pytest.fixture(scope="module")
def truth(project: Path) -> tuple[dict[str, str], float]:
    clock = time.perf_counter()
    process = start(project, project / "whole")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return hashes(project / "whole"), time.perf_counter() - clock


@pytest.mark.parametrize("point", [0, 1, 2, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(3, 22))])
def test_killed_and_run_again(project: Path, truth: tuple[dict[str, str], float], point: int) -> None:
    expected, seconds = truth
    root = project / f"killed-{point}"
    process = start(project, root)
    time.sleep(random.Random(point).uniform(0.1, 1.0) * seconds)
    process.kill()
    process.communicate()
    process = start(project, root)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert hashes(root) == expected
