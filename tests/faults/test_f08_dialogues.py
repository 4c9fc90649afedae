"""F08: faulty dialogues are dropped with the exact reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from self_model_sop.data import process
from self_model_sop.data.process import Config, ProcessConfig
from self_model_sop.data.records import read, write_jsonl

ROLES = {"h": "human", "g": "gpt", "s": "system", "x": "alien", "o": "observation", "f": "function_call"}


def sharegpt(shape: str) -> dict[str, Any]:
    """`hg` is a turn each; a capital letter is an empty turn."""
    call = '{"name": "f", "arguments": {}}'
    return {"conversations": [{"from": ROLES[c.lower()], "value": "  " if c.isupper() else call if c == "f" else f"第{i}句话说了一些内容{c}"} for i, c in enumerate(shape)]}


SHAPES: list[tuple[dict[str, Any], str | None]] = [
    (sharegpt("hg"), None),
    (sharegpt("shghg"), None),
    (sharegpt("hfog"), None),
    (sharegpt("hxg"), "unknown_role"),
    (sharegpt("hhg"), "two_users_in_a_row"),
    (sharegpt("hgg"), "two_assistants_in_a_row"),
    (sharegpt("hG"), "empty_turn"),
    (sharegpt("Hg"), "empty_turn"),
    (sharegpt("hGhg"), "empty_turn"),
    (sharegpt("hgh"), "ends_with_human"),
    (sharegpt("h"), "ends_with_human"),
    (sharegpt("ho"), "no_assistant"),
    (sharegpt("s"), "no_assistant"),
    (sharegpt("g"), "no_user"),
    (sharegpt("hsg"), "system_in_middle"),
    (sharegpt(""), "empty_dialogue"),
    (sharegpt("hg" * 6), "too_many_turns"),
    ({"instruction": "这是一个问题吗？", "input": "", "output": ""}, "empty_turn"),
    ({"instruction": " ", "output": "这是一个回答。"}, "empty_turn"),
    ({"messages": [{"role": "robot", "content": "你好"}]}, "unknown_role"),
    ({"messages": [{"role": "user", "content": "这是问题"}, {"role": "assistant", "content": "\u200b"}]}, "empty_turn"),
]


@pytest.mark.parametrize(("row", "reason"), SHAPES)
def test_f08_reason(tmp_path: Path, row: dict[str, Any], reason: str | None) -> None:
    write_jsonl(tmp_path / "in.jsonl", [row])
    options = ProcessConfig(max_turns=5, validation_ratio=0.0)
    done = process.run(Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out", subdir="finetune", process=options))
    s = done.stats["sets"]["finetune"]
    assert s["dropped"] == ({reason: 1} if reason else {})
    assert s["quarantined"] == {}
    reports = [r.row["reason"] for r in read(tmp_path / "out" / "finetune" / "dropped.jsonl") if r.row] if reason else []
    assert reports == ([reason] if reason else [])
