"""`sop init`: what an installed package needs to work without the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomllib

from self_model_sop.config import project_root
from self_model_sop.errors import OK, USAGE
from self_model_sop.ops import init as ops_init

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc" and not p.name.startswith(".")}


def test_writes_everything_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ops_init.main([str(tmp_path / "new")]) == OK
    for folder in ops_init.FOLDERS:
        mine, theirs = contents(tmp_path / "new" / folder), contents(ROOT / folder)
        assert mine == theirs and mine
    assert project_root(tmp_path / "new/config/pipeline/quickstart.yaml") == tmp_path / "new"
    capsys.readouterr()
    assert ops_init.main([str(tmp_path / "new")]) == OK
    assert " 0 files written" in capsys.readouterr().out


def test_never_overwrites_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ops_init.init(tmp_path)
    mine = tmp_path / "config/pipeline/quickstart.yaml"
    mine.write_text("name: mine\n")
    (tmp_path / "config/model_config/config.yaml").unlink()
    assert ops_init.main([str(tmp_path)]) == USAGE
    assert "quickstart.yaml" in capsys.readouterr().err and mine.read_text() == "name: mine\n"
    assert not (tmp_path / "config/model_config/config.yaml").exists(), "nothing is written where something is in the way"
    assert ops_init.main([str(tmp_path), "--overwrite"]) == OK
    assert mine.read_bytes() == (ROOT / "config/pipeline/quickstart.yaml").read_bytes()


def test_the_wheel_carries_the_same_folders() -> None:
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {folder: f"self_model_sop/_project/{folder}" for folder in ops_init.FOLDERS}
