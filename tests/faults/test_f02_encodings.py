"""F02: encodings are found per file and named; in a given encoding, undecodable lines are quarantined; a wrong one stops the run."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from self_model_sop.data import process
from self_model_sop.data.process import Config
from self_model_sop.data.records import dumps, read
from self_model_sop.errors import DATA, SopError

TEXTS = [f"第{i}例患者，收缩压{100 + i}mmHg，给予药物{i * 7919 % 997}号治疗，复查指标{i * 104729 % 9973}正常。" for i in range(200)]
LINES = "".join(dumps({"text": t}) + "\n" for t in TEXTS)


@pytest.mark.parametrize(
    ("codec", "bom", "shown"),
    [
        ("utf-8", b"", "utf-8"),
        ("utf-8", codecs.BOM_UTF8, "utf-8"),
        ("gb18030", b"", "gb18030"),
        ("gbk", b"", "gb18030"),
        ("utf-16-le", codecs.BOM_UTF16_LE, "utf-16"),
        ("utf-16-be", codecs.BOM_UTF16_BE, "utf-16"),
    ],
)
def test_f02_auto_reads_and_says_the_encoding(tmp_path: Path, codec: str, bom: bytes, shown: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(bom + LINES.encode(codec))
    done = process.run(Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out"))
    assert done.stats["files"][0]["encoding"] == shown
    assert done.stats["sets"]["pretrain"]["kept"] == 200
    found = [r.row["text"] for part in ("train", "validation") for r in read(tmp_path / "out" / "pretrain" / f"{part}.jsonl") if r.row]
    assert sorted(found) == sorted(TEXTS)


def test_f02_damaged_lines_of_a_known_encoding_are_quarantined(tmp_path: Path) -> None:
    lines = LINES.encode().split(b"\n")
    for i in (3, 50, 120):
        lines[i] = lines[i].replace("患".encode(), b"\xff\xfe")
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    for encoding, out in (("utf-8", "a"), ("auto", "b")):
        done = process.run(Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / out, encoding=encoding))  # type: ignore[arg-type]
        assert done.stats["sets"]["pretrain"]["quarantined"] == {"undecodable": 3}
        assert [r.row["line"] for r in read(tmp_path / out / "pretrain" / "train.rejected.jsonl") if r.row] == [4, 51, 121]


@pytest.mark.parametrize(("written", "claimed", "likely"), [("gb18030", "utf-8", "gb18030"), ("utf-16", "utf-8", "utf-16"), ("big5", "utf-8", "")])
def test_f02_the_wrong_encoding_stops_and_names_the_likely_one(tmp_path: Path, written: str, claimed: str, likely: str) -> None:
    text = LINES if written != "big5" else "".join(dumps({"text": f"第{i}例病人，血壓正常，無不適。"}) + "\n" for i in range(200))
    (tmp_path / "in.jsonl").write_bytes(text.encode(written))
    with pytest.raises(SopError) as error:
        process.run(Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out", encoding=claimed))  # type: ignore[arg-type]
    assert error.value.code == DATA
    assert f"probably {likely}" in str(error.value)


def test_f02_each_file_has_its_own_encoding(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_bytes(LINES.encode())
    (tmp_path / "raw" / "b.txt").write_bytes("\n".join(t.replace("患者", "病人") for t in TEXTS).encode("gb18030"))
    done = process.run(Config(input=(tmp_path / "raw",), output_dir=tmp_path / "out"))
    assert [(f["name"], f["encoding"], f["rows"]) for f in done.stats["files"]] == [("a.jsonl", "utf-8", 200), ("b.txt", "gb18030", 200)]
