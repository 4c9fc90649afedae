"""F07: archives are never unpacked: one given as input is refused by name, and none of the code could unpack one."""

from __future__ import annotations

import ast
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from self_model_sop.cli import main
from self_model_sop.errors import DATA, USAGE

SRC = Path(__file__).parents[2] / "src"
MEMBERS = ("../evil.jsonl", "/evil.jsonl", "a/../../evil.jsonl", "evil.jsonl")


@pytest.mark.parametrize("command", ["fetch", "process"])
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_is_refused_and_nothing_comes_out_of_it(tmp_path: Path, command: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path, text = folder / f"data.{kind}", b'{"text": "x"}\n'
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name in MEMBERS:
                packed.writestr(name, text)
    else:
        with tarfile.open(path, "w:gz") as packed_tar:
            for name in MEMBERS:
                member = tarfile.TarInfo(name)
                member.size = len(text)
                packed_tar.addfile(member, io.BytesIO(text))
    flag = "--dataset_name" if command == "fetch" else "--input"
    assert main(["data", command, flag, str(path), "--output_dir", str(tmp_path / "out")]) in (USAGE, DATA)
    assert "known: .jsonl" in capsys.readouterr().err and not list(tmp_path.rglob("*evil*"))


def test_no_code_unpacks_archives() -> None:
    names = {"tarfile", "zipfile", "unpack_archive", "extractall"}
    for file in SRC.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {a.name for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        assert not used & names, (file.name, used & names)
