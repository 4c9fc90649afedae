"""The table is the truth: modules, doors, default YAML files and documented folders agree with it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from self_model_sop.errors import SopError
from self_model_sop.stage import Stage
from self_model_sop.stages import STAGES, Entry, by_name

ROOT = Path(__file__).parents[1]
DOCUMENTED = ("config", "data_process", "tokenizer", "self_model", "inference", "docker", "docs")
FETCHED = ROOT / "inference" / "llama.cpp" / "llama.cpp"  # what inference/llama.cpp/setup.sh unpacks is not of the project
doors = [e for e in STAGES if e.door]


def test_names_are_unique() -> None:
    assert len({e.name for e in STAGES}) == len({e.command for e in STAGES}) == len(STAGES)
    assert len({e.door for e in doors}) == len(doors)


@pytest.mark.parametrize("entry", STAGES, ids=lambda e: e.name)
def test_every_entry_has_its_module(entry: Entry) -> None:
    module = importlib.import_module(entry.module)
    assert callable(module.main)
    assert module.__doc__
    if entry.stage:
        assert isinstance(module.STAGE, Stage) and module.STAGE.name == entry.name and module.STAGE.version >= 1
        assert callable(module.run)


@pytest.mark.parametrize("entry", [e for e in STAGES if e.config], ids=lambda e: e.name)
def test_every_default_config_is_shipped(entry: Entry) -> None:
    assert (ROOT / entry.config).is_file()


@pytest.mark.parametrize("entry", doors, ids=lambda e: e.name)
def test_a_door_is_a_door_and_nothing_else(entry: Entry) -> None:
    tree = ast.parse((ROOT / entry.door).read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree)
    body = [node for node in tree.body[1:] if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")]
    assert docstring and entry.module.replace("self_model_sop.", "").replace(".", "/") in docstring.replace(".", "/"), "the docstring names the room"
    imported, guard = body
    assert ast.unparse(imported) == f"from {entry.module} import main"
    assert ast.unparse(guard) == "if __name__ == '__main__':\n    raise SystemExit(main())"


@pytest.mark.parametrize("entry", doors, ids=lambda e: e.name)
def test_a_door_opens_from_anywhere(entry: Entry, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(ROOT / entry.door), "--help"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and f"usage: sop {' '.join(entry.command)}" in done.stdout, done.stderr[-500:]


def test_every_script_in_a_documented_folder_is_a_door() -> None:
    found = {str(p.relative_to(ROOT)) for name in DOCUMENTED for p in (ROOT / name).rglob("*.py") if FETCHED not in p.parents}
    assert found == {e.door for e in doors}


def test_no_documented_folder_is_a_package() -> None:
    """An __init__.py there, or a script directly in inference/, would shadow packages such as tokenizer or vllm."""
    assert not [p for name in DOCUMENTED for p in (ROOT / name).rglob("__init__.py") if FETCHED not in p.parents]
    assert not list((ROOT / "inference").glob("*.py"))


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(SopError, match="no stage") as caught:
        by_name("train.stf")
    assert caught.value.fix == "did you mean 'train.sft'?"
