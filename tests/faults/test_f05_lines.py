"""F05: CRLF, U+2028 inside text, repeated ids, rows of several schemas: nothing is cut, merged or renamed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from self_model_sop.data import process
from self_model_sop.data.clean import CleanConfig
from self_model_sop.data.process import Config, ProcessConfig
from self_model_sop.data.records import dumps, read, write_jsonl

ODD = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\t\u3000 \r"
CHARACTERS = "血压正常不高于度，。<>&\"'\\/{}[]：0123456789abcXYZ😀𠀀é" + ODD


def records_of(count: int) -> list[dict[str, Any]]:
    draw = random.Random(5)

    def text() -> str:
        return "".join(draw.choice(CHARACTERS) for _ in range(draw.randrange(1, 50)))

    def value(depth: int = 0) -> Any:
        kind = draw.randrange(7 if depth < 2 else 5)
        if kind < 5:
            return [text(), draw.randrange(10**12), draw.random(), None, True][kind]
        return [value(depth + 1) for _ in range(draw.randrange(3))] if kind == 5 else {text(): value(depth + 1) for _ in range(draw.randrange(3))}

    return [{"id": draw.randrange(50), "text": text(), **{text(): value() for _ in range(draw.randrange(4))}} for _ in range(count)]


def test_f05_five_thousand_records_come_back_byte_for_byte(tmp_path: Path) -> None:
    rows = records_of(5000)
    write_jsonl(tmp_path / "a.jsonl", rows)
    first = (tmp_path / "a.jsonl").read_bytes()
    assert first.count(b"\n") == 5000
    found = [r.row for r in read(tmp_path / "a.jsonl")]
    assert found == rows
    write_jsonl(tmp_path / "b.jsonl", [r for r in found if r is not None])
    assert (tmp_path / "b.jsonl").read_bytes() == first
    (tmp_path / "c.jsonl").write_bytes(first.replace(b"\n", b"\r\n"))
    assert [r.row for r in read(tmp_path / "c.jsonl")] == rows


def test_f05_the_stage_keeps_what_it_does_not_clean(tmp_path: Path) -> None:
    """With cleaning off, every kept row is its input row and `_source`; repeated ids are rows of their own."""
    rows = records_of(300)
    write_jsonl(tmp_path / "in.jsonl", rows)
    off = CleanConfig(html="none", links="none", whitespace=False, controls=False, width=False, mojibake=False)
    limits = ProcessConfig(min_chars=0, dedup=False, near_dedup=False, validation_ratio=0.0, pii="keep")
    done = process.run(Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out", subdir="raw", clean=off, process=limits))
    kept = [json.loads(line) for line in (tmp_path / "out" / "raw" / "train.jsonl").read_bytes().split(b"\n")[:-1]]
    assert len(kept) + sum(done.stats["sets"]["raw"]["dropped"].values()) == 300 and len(kept) > 150
    for row in kept:
        line = int(row.pop("_source").split(":")[1])
        assert dumps(row) == dumps(rows[line - 1])


def test_f05_mixed_schemas_in_one_file(tmp_path: Path) -> None:
    rows = [
        {"instruction": "高血压怎么办？", "output": "限盐，规律服药。", "id": 1},
        {"conversations": [{"from": "human", "value": "发热怎么办？"}, {"from": "gpt", "value": "多喝水。"}], "id": 1},
        {"messages": [{"role": "user", "content": "头痛怎么办？"}, {"role": "assistant", "content": "注意休息。"}]},
        {"question": "咳嗽怎么办？", "answer": "及时就医。", "extra": {"a": 1}},
    ]
    write_jsonl(tmp_path / "in.jsonl", rows)
    done = process.run(Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out", process=ProcessConfig(validation_ratio=0.0, to_parquet=True)))
    assert done.stats["files"][0]["format"] == "alpaca+sharegpt+messages"
    kept = [r.row for r in read(tmp_path / "out" / "finetune" / "train.jsonl")]
    assert kept == [{**row, "_source": f"in.jsonl:{i}"} for i, row in enumerate(rows, 1)]
    table = [r.row for r in read(tmp_path / "out" / "finetune" / "train.parquet")]
    assert [{k: v for k, v in (row or {}).items() if v is not None} for row in table] == kept
