"""The sample corpus is what its README says, and holds exactly the noise that planted.json lists."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SAMPLE = Path(__file__).parents[2] / "data_process" / "sample_data"
PLANTED: list[dict[str, Any]] = json.loads((SAMPLE / "planted.json").read_text(encoding="utf-8"))


def lines(name: str) -> list[str]:
    encoding = "gb18030" if "gb18030" in name else "utf-8"
    return (SAMPLE / name).read_text(encoding=encoding).splitlines()


def rows(name: str) -> list[dict[str, Any]]:
    broken = {p["line"] for p in PLANTED if p["file"] == name and p["kind"] == "malformed_json"}
    return [json.loads(line) for number, line in enumerate(lines(name), 1) if number not in broken]


def row_at(place: str) -> dict[str, Any]:
    name, _, number = place.partition(":")
    found: dict[str, Any] = json.loads(lines(name)[int(number) - 1])
    return found


def of_kind(kind: str, folder: str = "") -> list[dict[str, Any]]:
    return [p for p in PLANTED if p["kind"] == kind and p["file"].startswith(folder)]


def text_of(planted: dict[str, Any]) -> str:
    return json.dumps(row_at(f"{planted['file']}:{planted['line']}"), ensure_ascii=False)


def test_there_is_enough_of_everything() -> None:
    passages = [r["text"] for r in rows("pretrain/health_articles.jsonl") + rows("pretrain/health_handouts.jsonl")] + lines("pretrain/health_notes_gb18030.txt")
    assert sum(len(t) for t in set(passages)) >= 80_000
    assert len(rows("finetune/health_instructions.jsonl")) >= 300
    assert len([r for r in rows("finetune/health_dialogues.jsonl") if sum(m["from"] == "human" for m in r["conversations"]) >= 2]) >= 60
    assert len(rows("reward/health_preference.jsonl")) >= 100
    questions = rows("eval/health_mcq.jsonl")
    assert len(questions) >= 80
    assert all(q["answer"] in "ABCD" and len({q[k] for k in "ABCD"}) == 4 for q in questions)
    assert max(Counter(q["answer"] for q in questions).values()) < 0.4 * len(questions)


def test_copies_are_copies() -> None:
    assert (len(of_kind("exact_duplicate", "pretrain")), len(of_kind("exact_duplicate", "finetune")), len(of_kind("near_duplicate"))) == (8, 5, 10)
    for planted in of_kind("exact_duplicate"):
        copy, original = row_at(f"{planted['file']}:{planted['line']}"), row_at(planted["of"])
        assert {**copy, "id": 0} == {**original, "id": 0}
    for planted in of_kind("near_duplicate"):
        a, b = ({t[i : i + 5] for i in range(len(t) - 4)} for t in (row_at(f"{planted['file']}:{planted['line']}")["text"], row_at(planted["of"])["text"]))
        assert 0.85 <= len(a & b) / len(a | b) < 1


def test_nothing_else_is_a_copy() -> None:
    texts = Counter(r["text"] for r in rows("pretrain/health_articles.jsonl") + rows("pretrain/health_handouts.jsonl"))
    assert sum(n - 1 for n in texts.values()) == 8


def test_planted_personal_data_is_plainly_made_up() -> None:
    numbers = [n for p in of_kind("id_number") for n in re.findall(r"(?<!\d)\d{17}[\dX](?!\d)", text_of(p))]
    assert len(numbers) == len(of_kind("id_number")) == 4
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    for number in numbers:
        assert number.startswith("99"), "no region has this code"
        assert number[17] == "10X98765432"[sum(int(c) * w for c, w in zip(number, weights, strict=False)) % 11]
    assert len(of_kind("phone")) == 5
    assert all("0000" in text_of(p) for p in of_kind("phone"))


@pytest.mark.parametrize(("kind", "count"), [("too_short", 6), ("html", 12), ("link", 4), ("malformed_json", 1), ("empty_answer", 1), ("ends_with_user", 1), ("chosen_equals_rejected", 1)])  # noqa: E501
def test_the_other_noise(kind: str, count: int) -> None:
    found = of_kind(kind)
    assert len(found) == count
    for p in found:
        if kind == "malformed_json":
            with pytest.raises(json.JSONDecodeError):
                json.loads(lines(p["file"])[p["line"] - 1])
            continue
        row = row_at(f"{p['file']}:{p['line']}")
        assert {
            "too_short": lambda r: len(r["text"]) <= 6,
            "html": lambda r: bool(re.search(r"</?(p|br|div)\b|&nbsp;", r["text"])),
            "link": lambda r: "https://" in r["text"],
            "empty_answer": lambda r: r["output"] == "",
            "ends_with_user": lambda r: r["conversations"][-1]["from"] == "human",
            "chosen_equals_rejected": lambda r: r["chosen"] == r["rejected"],
        }[kind](row)


def test_the_gb18030_file_is_no_utf8() -> None:
    with pytest.raises(UnicodeDecodeError):
        (SAMPLE / "pretrain/health_notes_gb18030.txt").read_bytes().decode("utf-8")


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_readme_gives_the_real_numbers(name: str) -> None:
    text = (SAMPLE / name).read_text(encoding="utf-8")
    assert "162,342" in text and "362" in text
