"""F50, F51: no subdir, file name or link leads data.process out of its output folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from self_model_sop.data.process import main
from self_model_sop.data.records import write_jsonl

NAMES = ["../..", "..", ".", "", "/tmp/x", "a/b", "a/../../b", "x\0y", "~", "a\nb", "a b", "\u202egpj", "．．", "x" * 300, "-rf", ".hidden", "C:\\x"]


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.mark.parametrize("name", NAMES)
def test_f50_subdir_is_one_plain_name(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"text": "一条正常的记录，长度足够。"}])
    before = tree(tmp_path)
    assert main(["--input", str(tmp_path / "in.jsonl"), "--output_dir", str(tmp_path / "out"), f"--subdir={name}"]) == 2
    assert tree(tmp_path) == before
    assert "Traceback" not in capsys.readouterr().err


def test_f51_output_folder_may_be_a_link(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"text": f"第{i}条正常的记录，长度足够。"} for i in range(3)])
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert main(["--input", str(tmp_path / "in.jsonl"), "--output_dir", str(tmp_path / "out"), "--subdir", "pretrain"]) == 0
    assert (tmp_path / "real" / "pretrain" / "train.jsonl").exists()


def test_f51_output_never_overwrites_its_input(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"第{i}条正常的记录，长度足够。"} for i in range(3)])
    before = (tmp_path / "train.jsonl").read_bytes()
    assert main(["--input", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / "train.jsonl")]) == 2
    assert (tmp_path / "train.jsonl").read_bytes() == before
