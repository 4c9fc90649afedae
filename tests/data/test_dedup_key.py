"""What deduplication compares of dialogue and preference rows is what was declared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from self_model_sop.data import process
from self_model_sop.data.dedup_key import DedupKeyConfig, compared
from self_model_sop.data.process import Config, ProcessConfig
from self_model_sop.data.records import read, write_jsonl

ASK = "高血压患者平时饮食应当注意些什么，可以喝酒吗"
TURNS = [("system", "你是医生"), ("human", "问一"), ("gpt", "答一"), ("human", "问二"), ("gpt", "答二")]
DIALOGUE = {"conversations": [{"from": role, "value": said} for role, said in TURNS]}
PAIR = {"system": "你是医生", "prompt": "问", "chosen": "好", "rejected": "坏"}


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("system", "user", "assistant", "tool"), None), (("user",), "问一\n问二"), (("first_user",), "问一"),
        (("last_user", "system"), "你是医生\n问二"), (("last_assistant",), "答二"),
        (("user", "first_user"), "问一\n问二"), (("tool",), None),
    ],
)  # fmt: skip
def test_parts_of_a_dialogue(parts: tuple[str, ...], text: str | None) -> None:
    assert compared(DIALOGUE, "sharegpt", DedupKeyConfig(dialogue=parts)) == text


@pytest.mark.parametrize(("parts", "text"), [(("chosen", "prompt", "rejected"), None), (("prompt",), "你是医生\n问"), (("rejected", "chosen"), "好\n坏")])
def test_parts_of_a_preference(parts: tuple[str, ...], text: str | None) -> None:
    assert compared(PAIR, "preference", DedupKeyConfig(preference=parts)) == text


def test_other_rows_are_compared_whole() -> None:
    key = DedupKeyConfig(dialogue=("user",), preference=("prompt",))
    assert compared({"text": "文"}, "text", key) is None and compared({"instruction": "问", "output": "答"}, "alpaca", key) == "问"


def outcome(folder: Path, rows: list[dict[str, Any]], near: bool = True, **key: tuple[str, ...]) -> tuple[dict[str, int], list[str]]:
    write_jsonl(folder / "in.jsonl", rows)
    done = process.run(Config(input=folder / "in.jsonl", output_dir=folder / "out", process=ProcessConfig(validation_ratio=0, near_dedup=near, dedup_key=DedupKeyConfig(**key))))
    (name,) = done.stats["sets"]
    kept = [str(r.row["_source"]) for r in read(folder / "out" / name / "train.jsonl") if r.row]
    return done.stats["sets"][name]["dropped"], kept


def test_one_answer_for_each_question(tmp_path: Path) -> None:
    rows = [{"instruction": ASK, "output": f"{'甲乙丙丁戊己'[i] * 40}"} for i in range(3)] + [{"instruction": ASK.replace("可以", "能"), "output": "完全不同的回答" * 9}]
    for name in ("whole", "asked"):
        (tmp_path / name).mkdir()
    assert outcome(tmp_path / "whole", rows) == ({}, [f"in.jsonl:{i}" for i in range(1, 5)])
    assert outcome(tmp_path / "asked", rows, dialogue=("first_user",))[0] == {"duplicates": 2}
    rows[3]["instruction"] = ASK + "？"
    (tmp_path / "near").mkdir()
    assert outcome(tmp_path / "near", rows, dialogue=("first_user",)) == ({"duplicates": 2, "near_duplicates": 1}, ["in.jsonl:1"])


def test_one_pair_for_each_prompt_of_preferences(tmp_path: Path) -> None:
    rows = [{"prompt": ASK, "chosen": f"应当{i}" * 30, "rejected": f"随便{9 - i}" * 20} for i in range(3)]
    assert outcome(tmp_path, rows, preference=("prompt",)) == ({"duplicates": 2}, ["in.jsonl:1"])


def test_tool_calls_tell_dialogues_apart_only_where_answers_are_compared(tmp_path: Path) -> None:
    def row(city: str) -> dict[str, Any]:
        call = {"from": "function_call", "value": f'{{"name": "weather", "arguments": {{"city": "{city}"}}}}'}
        return {"conversations": [{"from": "human", "value": "今天天气怎样"}, call, {"from": "observation", "value": "晴"}, {"from": "gpt", "value": "晴天"}]}

    for name in ("whole", "asked"):
        (tmp_path / name).mkdir()
    assert outcome(tmp_path / "whole", [row("北京"), row("上海")], near=False)[0] == {}
    assert outcome(tmp_path / "asked", [row("北京"), row("上海")], near=False, dialogue=("user",))[0] == {"duplicates": 1}


def test_a_misspelt_part(tmp_path: Path) -> None:
    config = Config(input=tmp_path, output_dir=tmp_path.parent / "x", process=ProcessConfig(dedup_key=DedupKeyConfig(dialogue=("frist_user",), preference=())))
    assert [(key, fix) for key, _, fix in process.preflight(config)] == [
        ("process.dedup_key.dialogue", "did you mean 'first_user'?"),
        ("process.dedup_key.preference", "known: prompt, chosen, rejected; to turn deduplication off: process.dedup, process.near_dedup"),
    ]  # fmt: skip
