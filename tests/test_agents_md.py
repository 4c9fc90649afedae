"""Every command of the `sh` blocks of AGENTS.md, run in order in a copy of the project, as documented: the hub on loopback stands in for the public one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hub_server import HubServer

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.M | re.S)
COPIED = ("config", "data_process", "tokenizer", "self_model", "inference", "AGENTS.md")
GENERATED = shutil.ignore_patterns("fetch_data", "final_data", "merged_*", "checkpoints", "downloads", "conversion", "gguf-py", "__pycache__")


def documented_commands() -> list[str]:
    """The lines of all `sh` blocks, in order."""
    blocks = BLOCK.findall((ROOT / "AGENTS.md").read_text(encoding="utf-8"))
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def as_argv(command: str) -> list[str]:
    """`python X` and `sop X` through this interpreter and its environment."""
    program, *rest = shlex.split(command)
    return [sys.executable, *rest] if program == "python" else [str(Path(sys.executable).parent / program), *rest]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=GENERATED)
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_documented_commands_run_in_order(project: Path, hub: HubServer) -> None:
    environment = {**os.environ, **hub.environment(project / "cache"), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    commands = documented_commands()
    assert len(commands) >= 15
    for command in commands:
        done = subprocess.run(as_argv(command), cwd=project, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    for made in ("data_process/final_data/finetune/train.jsonl", "tokenizer/merged_model/model.safetensors", "self_model/checkpoints/finetune/adapter_model.safetensors"):
        assert (project / made).is_file(), made


def test_documented_interface_is_covered() -> None:
    """Each documented door is called at least once."""
    text = " ".join(documented_commands())
    from self_model_sop.stages import STAGES

    missing = [e.door for e in STAGES if e.door and e.door not in text]
    assert not missing
