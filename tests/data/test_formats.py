"""Formats are recognised from fields and keep their structure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.data import records
from self_model_sop.data.formats import RowError, choice_of, detect, map_texts, to_messages, to_preference, to_text, tools_of

SHARED = Path(__file__).parents[3] / "shared" / "data"

ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "甲"}, {"title": "t", "content": "乙"}, {"id": 3, "body": "丙"}],
    "alpaca": [{"instruction": "问", "output": "答"}, {"instruction": "问", "input": "材料", "output": "答", "system": "你是医生", "history": [["早", "好"]]}],
    "io": [{"prompt": "问", "response": "答"}, {"question": "问", "answer": "答"}, {"query": "问", "response": "答", "history": [["a", "b"]]}, {"input": "问", "output": "答"}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}],
    "messages": [{"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, {"conversations": [{"role": "user", "content": "问"}]}],
    "preference": [
        {"prompt": "问", "chosen": "好", "rejected": "坏"},
        {"question": "问", "response_chosen": "好", "response_rejected": "坏"},
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "问"}],
            "chosen": {"from": "gpt", "value": "好"},
            "rejected": {"from": "gpt", "value": "坏"},
        },
        {
            "chosen": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "好"}],
            "rejected": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "坏"}],
        },
    ],
    "choice": [{"question": "问", "options": ["(A)一", "(B)二"], "label": "B"}, {"question": "问", "A": "一", "B": "二", "C": "三", "D": "四", "answer": "D"}],
}


@pytest.mark.parametrize(("kind", "row"), [(kind, row) for kind, rows in ROWS.items() for row in rows])
def test_detect(kind: str, row: dict[str, Any]) -> None:
    assert detect(row) == kind
    assert to_text(row)


def test_unknown_fields_are_no_format() -> None:
    assert detect({"a": 1, "b": "x"}) is None
    with pytest.raises(RowError) as error:
        to_text({"a": 1})
    assert error.value.reason == "unknown_format"


def test_alpaca_history_and_system_come_first() -> None:
    roles = [(m["role"], m["content"]) for m in to_messages(ROWS["alpaca"][1])]
    assert roles == [("system", "你是医生"), ("user", "早"), ("assistant", "好"), ("user", "问\n材料"), ("assistant", "答")]


def test_sharegpt_tool_turns() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    row = {
        "conversations": [
            {"from": "human", "value": "问"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "{}"},
            {"from": "gpt", "value": "答"},
        ]
    }
    messages = to_messages(row)
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [{"type": "function", "function": call}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown_role"),
        ({"messages": ["text"]}, "bad_turn"),
        ({"messages": [{"role": "user", "content": None}]}, "not_text"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown_role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not_text"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "bad_tool_call"),
        ({"instruction": "x", "output": 3}, "not_text"),
        ({"instruction": "x", "output": "y", "history": ["a"]}, "bad_turn"),
        ({"text": "x"}, "not_a_dialogue"),
    ],
)
def test_unreadable_dialogues_name_the_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as error:
        to_messages(row)
    assert error.value.reason == reason


@pytest.mark.parametrize("row", ROWS["preference"])
def test_preference_spellings_agree(row: dict[str, Any]) -> None:
    prompt, chosen, rejected = to_preference(row)
    assert prompt[-1] == {"role": "user", "content": "问"}
    assert (chosen, rejected) == ([{"role": "assistant", "content": "好"}], [{"role": "assistant", "content": "坏"}])


def test_whole_conversations_beside_their_prompt() -> None:
    start = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}, {"role": "user", "content": "三"}]
    row = {"prompt": "一", "chosen": [*start, {"role": "assistant", "content": "好"}], "rejected": [*start, {"role": "assistant", "content": "坏"}]}
    prompt, chosen, rejected = to_preference(row)
    assert prompt == start
    assert (chosen[0]["content"], rejected[0]["content"]) == ("好", "坏")


def test_a_preference_needs_a_prompt() -> None:
    with pytest.raises(RowError, match="no_prompt"):
        to_preference({"chosen": "a", "rejected": "b"})


def test_choices() -> None:
    assert choice_of(ROWS["choice"][0]) == ("问", ["一", "二"], "B")
    assert choice_of({"question": "q", "passage": "p", "choices": ["x", "y"], "answer": 1}) == ("p\nq", ["x", "y"], "B")
    assert choice_of({"question": "q", "options": ["(A)x", "(B)y", "(C)z"], "label": ["C", "A"]})[2] == "AC"
    assert choice_of({"question": "q", "options": ["x", "y"], "answer": "y"})[2] == "B"
    assert choice_of({"question": "q", "options": ["x", "y"], "answer": None})[2] is None


def test_tools_are_a_list_or_its_json() -> None:
    assert tools_of({"tools": '[{"name": "f"}]'}) == [{"name": "f"}]
    assert tools_of({"tools": ""}) is None
    with pytest.raises(RowError, match="bad_tools"):
        tools_of({"tools": "nonsense"})


def test_map_texts_changes_texts_and_nothing_else() -> None:
    row = {
        "id": "x",
        "tools": "[x]",
        "conversations": [{"from": "human", "value": "x", "id": "x"}, {"from": "function_call", "value": "x"}, {"from": "observation", "value": "x"}],
    }
    changed = map_texts(row, lambda text: text + "!")
    assert changed["conversations"] == [{"from": "human", "value": "x!", "id": "x"}, {"from": "function_call", "value": "x"}, {"from": "observation", "value": "x"}]
    assert (changed["id"], changed["tools"]) == ("x", "[x]")
    assert row["conversations"][0]["value"] == "x"


def test_text_fields_choose_the_text() -> None:
    assert to_text({"a": "一", "b": "二", "c": None}, ["b", "a", "c"]) == "二\n一"
    with pytest.raises(RowError, match="no_text_field"):
        to_text({"a": "x"}, ["z"])


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")
@pytest.mark.parametrize(
    ("name", "kind", "rows"),
    [
        ("dialogue/sharegpt_zh_1k.jsonl", "sharegpt", 1000),
        ("dialogue/toolcall_zh_300.jsonl", "sharegpt", 300),
        ("preference/dpo_zh_500.jsonl", "preference", 500),
        ("medical/grpo_sample.jsonl", "io", 32),
        ("eval/agieval_jec-qa-kd.jsonl", "choice", 1000),
        ("medical/infectious_disease.txt", "text", 985),
    ],
)
def test_real_files_are_recognised(name: str, kind: str, rows: int) -> None:
    found = [r.row for r in records.read(SHARED / name) if r.row is not None]
    assert len(found) == rows
    assert {detect(row) for row in found} == {kind}
    for row in found:
        if kind == "preference":
            prompt, chosen, rejected = to_preference(row)
            assert prompt[-1]["role"] == "user" and chosen and rejected
        elif kind == "choice":
            assert len(choice_of(row)[1]) == 4
        elif kind != "text":
            assert to_messages(row)
