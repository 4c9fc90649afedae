"""F70: a credential in a YAML file is refused with its line and the variable to use, and its value is never shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from self_model_sop.errors import USAGE

LIGHT = str(Path(__file__).parents[1] / "light_stages.py")
CANARY = "c4n4ry0c4n4ry0c4n4ry0c4n4ry"
SPELLINGS = {
    "api_key: {0}": "an environment variable",
    "wandb_api_key: '{0}'": "WANDB_API_KEY",
    "swanlab: {{api_key: {0}}}": "SWANLAB_API_KEY",
    "huggingface: {{token: {0}}}": "HF_TOKEN",
    "hf-token: {0}": "HF_TOKEN",
    "password: {0}": "an environment variable",
    "note: hf_{0}": "HF_TOKEN",
    "note: use sk-{0} here": "an environment variable",
    "SECRET_KEY: {0}": "an environment variable",
    "modelscope: {{access_token: {0}}}": "MODELSCOPE_API_TOKEN",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("command", [["data", "write", "--config"], ["config", "check", "--stage", "data.fetch"], ["config", "show", "--stage", "data.fetch"]], ids=lambda c: c[1])
def test_refused_with_its_line_and_never_shown(tmp_path: Path, spelling: str, command: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# one\nseed: 1\n" + spelling.format(CANARY) + "\n")
    done = subprocess.run([sys.executable, LIGHT, *command, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == USAGE and CANARY not in done.stdout + done.stderr
    line = next(line for line in done.stderr.splitlines() if "secret" in line)
    assert "c.yaml:3: " in line and "value not shown" in line and f"set {SPELLINGS[spelling]} in the environment" in line
    assert not [p for p in tmp_path.rglob("*") if p != path]


def test_on_the_command_line_and_in_a_pipeline_too(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, LIGHT, "data", "write", f"note=hf_{CANARY}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == USAGE and CANARY not in done.stdout + done.stderr
    (tmp_path / "p.yaml").write_text(f"name: p\nstages:\n  - w: {{stage: data.write, with: {{note: hf_{CANARY}}}}}\n")
    done = subprocess.run([sys.executable, LIGHT, "run", "p.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == USAGE and CANARY not in done.stdout + done.stderr and "p.yaml:3: note: a secret" in done.stderr
