"""Rows out of every kind of file, byte for byte, and back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from self_model_sop.data.encodings import detect_encoding
from self_model_sop.data.records import dumps, files_of, parse_object, read, source, write_jsonl
from self_model_sop.data.tables import jsonl_to_parquet

ROWS: list[dict[str, Any]] = [{"text": "第一行\u2028仍是第一行"}, {"text": "二\r\n三", "n": 1, "deep": {"a": [1, 2.5, None, True]}}, {"id": "x"}]


def rows_of(path: Path, encoding: str = "auto") -> list[dict[str, Any] | None]:
    return [r.row for r in read(path, encoding)]


def test_jsonl_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert write_jsonl(path, ROWS) == 3
    assert rows_of(path) == ROWS
    assert path.read_bytes().count(b"\n") == 3


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(text, value, min_size=1, max_size=4), min_size=1, max_size=25))
def test_round_trip_is_exact(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, rows)
    before = path.read_bytes()
    assert rows_of(path, "utf-8") == rows
    write_jsonl(path, [r for r in rows_of(path, "utf-8") if r is not None])
    assert path.read_bytes() == before


def test_json_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    assert rows_of(path) == ROWS
    path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1), encoding="utf-8")
    assert rows_of(path) == ROWS
    path.write_text("\n".join(map(dumps, ROWS)), encoding="utf-8")  # JSON lines under the name .json
    assert rows_of(path) == ROWS
    path.write_text("not JSON\n" + "\n".join(map(dumps, ROWS)), encoding="utf-8")
    assert [r.error for r in read(path)] == ["bad_json", None, None, None]


def test_a_damaged_element_does_not_lose_the_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "一"},\n {"text": "二", oops},\n {"text": "三"}\n]', encoding="utf-8")
    found = list(read(path))
    assert [(r.line, r.error) for r in found] == [(2, None), (3, "bad_json"), (4, None)]


def test_csv_and_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufeffquestion,answer\n"多行\n问题",答\n问,"a, ""b"""\n少一列\n', encoding="utf-8")
    found = list(read(tmp_path / "a.csv"))
    assert [r.row for r in found] == [{"question": "多行\n问题", "answer": "答"}, {"question": "问", "answer": 'a, "b"'}, None]
    assert [(r.line, r.error) for r in found] == [(2, None), (4, None), (5, "column_count")]
    (tmp_path / "a.tsv").write_text("text\tn\n甲\t1\n", encoding="gb18030")
    assert rows_of(tmp_path / "a.tsv") == [{"text": "甲", "n": "1"}]


def test_txt_is_a_document_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("一\n\n  \n二\u2028三\r\n", encoding="utf-8", newline="")
    assert rows_of(tmp_path / "a.txt") == [{"text": "一"}, {"text": "二\u2028三"}]


def test_gzip_and_zstd(tmp_path: Path) -> None:
    data = "".join(dumps(r) + "\n" for r in ROWS).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    assert rows_of(tmp_path / "a.jsonl.gz") == ROWS
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(data))  # the bytes say it, the name does not
    assert rows_of(tmp_path / "b.jsonl") == ROWS
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    assert rows_of(tmp_path / "a.jsonl.zst") == ROWS


def test_parquet_round_trip_with_mixed_fields(tmp_path: Path) -> None:
    rows = [{"text": "一", "n": 1, "m": [{"role": "user", "content": "x"}]}, {"text": "二", "n": "zwei", "extra": None}, {"text": "三", "n": {"a": 1}, "f": 1.5}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    jsonl_to_parquet(tmp_path / "a.jsonl", tmp_path / "a.parquet")
    found = [r.row or {} for r in read(tmp_path / "a.parquet")]
    assert [r["text"] for r in found] == ["一", "二", "三"]
    assert found[0]["m"] == rows[0]["m"]
    assert [r["n"] for r in found] == ["1", '"zwei"', '{"a": 1}']
    write_jsonl(tmp_path / "empty.jsonl", [])
    jsonl_to_parquet(tmp_path / "empty.jsonl", tmp_path / "empty.parquet")
    assert list(read(tmp_path / "empty.parquet")) == []


def test_folders_leave_out_reports_and_hidden_files(tmp_path: Path) -> None:
    for name in ("b/x.jsonl", "a.txt", ".hidden.jsonl", "manifest.json", "b/dropped.jsonl", "b/train.rejected.jsonl", "readme.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("", encoding="utf-8")
    assert [str(p.relative_to(tmp_path)) for p in files_of(tmp_path)] == ["a.txt", "b/x.jsonl"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le-bom", "utf-16-be-bom"])
def test_encodings_are_found(tmp_path: Path, encoding: str) -> None:
    content = "".join(f'{{"text": "第{i}条：血压<140mmHg，㐀𠀀"}}\n' for i in range(50))
    data = content.encode(encoding.removesuffix("-bom"))
    if encoding.endswith("bom"):
        data = (b"\xff\xfe" if "-le-" in encoding else b"\xfe\xff") + data
    (tmp_path / "a.jsonl").write_bytes(data)
    assert [r["text"] for r in rows_of(tmp_path / "a.jsonl") if r] == [f"第{i}条：血压<140mmHg，㐀𠀀" for i in range(50)]


def test_one_damaged_line_does_not_change_the_encoding(tmp_path: Path) -> None:
    lines = [f'{{"text": "第{i}条"}}'.encode() for i in range(20)]
    lines[7] = lines[7][:-4] + b'\xff"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert detect_encoding(tmp_path / "a.jsonl") == "utf-8"
    assert [r.error for r in read(tmp_path / "a.jsonl")].count("undecodable") == 1


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "bad_json"),
        ("[1]", "not_an_object"),
        ("null", "not_an_object"),
        ('{"a": NaN}', "not_finite"),
        ('{"a": 1e999}', "not_finite"),
        ('{"a": -Infinity}', "not_finite"),
        ("[" * 100_000 + "]" * 100_000, "too_deep"),
        ('{"a":' * 101 + "1" + "}" * 101, "too_deep"),
        ('{"a": "\\ud83d"}', "lone_surrogate"),
        ('{"a\\udc00": 1}', "lone_surrogate"),
        ('{"a": "x\\u0000y"}', "nul"),
        ('{"a": "x\0y"}', "bad_json"),
        ('{"a": ' + "9" * 5000 + "}", "bad_json"),
    ],
)
def test_lines_that_are_no_rows(line: str, error: str) -> None:
    assert parse_object(line) == (None, error)


def test_brackets_in_strings_are_no_depth() -> None:
    row = {"text": "[{" * 500, "escaped": '\\"[' * 200}
    assert parse_object(dumps(row)) == (row, None)
    assert parse_object('{"a": "\\\\u0000 \\ud83d\\ude00"}') == ({"a": "\\u0000 😀"}, None)


def test_source_says_how_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("糖尿病患者应控制血糖\n", encoding="gb18030")
    assert source(tmp_path / "a.txt")[1:3] == ("txt", "gb18030")
    assert source(tmp_path / "a.txt", "gbk").encoding == "gb18030"
