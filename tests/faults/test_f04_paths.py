"""F04: empty, missing, folder, fifo, no permission: a valid empty artifact or one line and exit code 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from self_model_sop.data.process import main


def run(*arguments: object) -> int:
    return main([*map(str, arguments)])


def test_f04_an_empty_file_gives_a_valid_empty_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text("", encoding="utf-8")
    assert run("--input", tmp_path / "in.jsonl", "--output_dir", tmp_path / "out", "--to_parquet") == 0
    assert (tmp_path / "out" / "pretrain" / "train.jsonl").read_text(encoding="utf-8") == ""
    assert (tmp_path / "out" / "manifest.json").exists()
    said = capsys.readouterr()
    assert "warning: set pretrain: no rows in the input" in said.err
    assert run("--input", tmp_path / "in.jsonl", "--output_dir", tmp_path / "out", "--to_parquet") == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["missing", "empty_folder", "fifo", "unknown_suffix", "no_permission"])
def test_f04_what_cannot_be_read_is_exit_2_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = tmp_path / "data.jsonl"
    if kind == "empty_folder":
        path = tmp_path / "folder"
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "unknown_suffix":
        path = tmp_path / "data.docx"
        path.write_bytes(b"PK")
    elif kind == "no_permission":
        if os.geteuid() == 0:
            pytest.skip("root reads everything")
        path.write_text("{}", encoding="utf-8")
        path.chmod(0)
    assert run("--input", path, "--output_dir", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert path.name in said and "Traceback" not in said
    assert len(said.strip().splitlines()) <= 3
    assert not (tmp_path / "out" / "manifest.json").exists()
