"""F01: malformed and truncated lines are quarantined, counted, and stop the run only where they are many."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from self_model_sop.data import process
from self_model_sop.data.process import Config, ProcessConfig
from self_model_sop.data.records import dumps, read
from self_model_sop.errors import DATA, SopError


def good(i: int) -> bytes:
    return dumps({"id": i, "text": f"第{i}条：" + "，".join(str(i * 7919 * k % 99991) for k in range(12)), "n": [i, {"a": None}]}).encode()


def mutate(line: bytes, draw: random.Random) -> bytes:
    """One of the ways in which a line breaks on its way."""
    kind = draw.randrange(8)
    at = draw.randrange(len(line))
    if kind == 0:
        return line[:at]
    if kind == 1:
        return line[:at] + bytes([draw.randrange(256)]) + line[at + 1 :]
    if kind == 2:
        return line[:at] + line[at + 1 + draw.randrange(4) :]
    if kind == 3:
        return line + line[at:]
    if kind == 4:
        return line.replace(b'"', b"'")
    if kind == 5:
        return line[:at] + draw.choice([b"\\", b"\0", b"\\ud800", b"\r", b"NaN", b"[" * 200, b"\xed\xa0\x80", b'"']) + line[at:]
    if kind == 6:
        return draw.choice([b"null", b"[]", b'"text"', b"{}", b"1e999", b"true", b"{", b'{"text": null}', b'{"text": ["a"]}', b'{"text": 3}'])
    return bytes(draw.randrange(256) for _ in range(draw.randrange(1, 60)))


def run_mutated(tmp_path: Path, count: int, seed: int) -> None:
    draw = random.Random(seed)
    lines = [good(i) if draw.random() < 0.5 else mutate(good(i), draw) for i in range(count)]
    data = b"\n".join(lines)
    (tmp_path / "in.jsonl").write_bytes(data)
    stats = process.run(Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out", encoding="utf-8", process=ProcessConfig(max_bad_ratio=1.0))).stats
    s = stats["sets"]["pretrain"]
    expected = sum(bool(line.strip(b" \t\r")) for line in data.split(b"\n"))
    assert s["total"] == expected
    assert s["total"] == s["kept"] + sum(s["dropped"].values()) + sum(s["quarantined"].values())
    folder = tmp_path / "out" / "pretrain"
    written = {p.name: sum(1 for _ in p.open(encoding="utf-8", newline="\n")) for p in folder.glob("*.jsonl")}
    assert written["train.jsonl"] + written["validation.jsonl"] == s["kept"]
    assert written["train.rejected.jsonl"] == sum(s["quarantined"].values())
    assert written.get("dropped.jsonl", 0) == sum(s["dropped"].values())
    for record in read(folder / "train.rejected.jsonl"):
        assert record.row is not None and set(record.row) == {"file", "line", "reason", "text"} and len(record.row["text"]) <= 200


@pytest.mark.parametrize("seed", [0, 1])
def test_f01_mutated_lines_never_crash_and_add_up(tmp_path: Path, seed: int) -> None:
    run_mutated(tmp_path, 1500, seed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(2, 12))
def test_f01_ten_thousand_and_more(tmp_path: Path, seed: int) -> None:
    run_mutated(tmp_path, 10_000, seed)


def test_f01_a_few_bad_lines_go_on(tmp_path: Path) -> None:
    lines = [good(i) for i in range(100)]
    for i in range(9):
        lines[i * 7] = b"{broken"
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines)[:-5])
    stats = process.run(Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out")).stats
    assert stats["sets"]["pretrain"]["quarantined"] == {"bad_json": 10}
    rejected = [r.row for r in read(tmp_path / "out" / "pretrain" / "train.rejected.jsonl")]
    assert rejected[0] == {"file": "in.jsonl", "line": 1, "reason": "bad_json", "text": "{broken"}
    assert rejected[-1] is not None and rejected[-1]["line"] == 100


@pytest.mark.parametrize(("total", "bad", "stops"), [(500, 10, False), (500, 11, True), (3000, 30, False), (3000, 31, True)])
def test_f01_many_stop_with_exit_3(tmp_path: Path, total: int, bad: int, stops: bool) -> None:
    lines = [b"{broken" if i < bad else good(i) for i in range(total)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    config = Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out")
    if not stops:
        process.run(config)
        return
    with pytest.raises(SopError) as error:
        process.run(config)
    assert error.value.code == DATA
    assert f"{bad} of {total} rows" in str(error.value) and "in.jsonl:1 bad_json" in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_f01_nothing_is_left_in_the_reports_of_secrets(tmp_path: Path) -> None:
    """What was quarantined is shown without personal data."""
    (tmp_path / "in.jsonl").write_bytes(good(1) + b'\n{"text": "13800000001"\n')
    process.run(Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out"))
    report = (tmp_path / "out" / "pretrain" / "train.rejected.jsonl").read_text(encoding="utf-8")
    assert json.loads(report)["text"] == '{"text": "[手机号]"'
    assert (tmp_path / "out" / "pretrain" / "train.jsonl").stat().st_size > 0
