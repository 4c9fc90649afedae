"""Any row at all has one outcome, with a reason, in every set."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from self_model_sop.data import process
from self_model_sop.data.formats import DIALOGUE_KEYS, PAIR_KEYS, PREFERENCE_KEYS, PROMPT_KEYS, TEXT_KEYS
from self_model_sop.data.records import dumps
from self_model_sop.data.rows import Item, Judge, Rules

KEYS = sorted(
    {*TEXT_KEYS, *PROMPT_KEYS, *DIALOGUE_KEYS, *(k for pair in (*PAIR_KEYS, *PREFERENCE_KEYS) for k in pair)}
    | {"instruction", "output", "system", "history", "tools", "options", "choices", "label", "answer", "passage", *"ABCD", "_source"}
)
characters = "血压<>b/p&;#1380 \n\u3000`[]{}\"'\\.@微信QQ号：xX\0\ud800\u200b"
text = st.text(st.sampled_from(characters), max_size=30) | st.sampled_from(["human", "gpt", "user", "assistant", "system", "A"])
turn = st.dictionaries(st.sampled_from(["from", "value", "role", "content", "tool_calls", "weight", "train", "type", "text"]), st.deferred(lambda: value), max_size=4)
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text
value: st.SearchStrategy[Any] = st.recursive(scalar, lambda inner: st.lists(inner | turn, max_size=4) | st.dictionaries(text, inner, max_size=3), max_leaves=6)


def rules(name: str, **options: Any) -> Rules:
    config = process.Config(process=process.ProcessConfig(max_turns=3, max_chars=100, sentiment_filter=True, **options))
    return config.rules(name, [])


JUDGES = [Judge(Rules(**{**vars(rules(name, pii=pii)), "names": ("f",)})) for name in ("pretrain", "finetune", "reward", "other") for pii in ("mask", "drop", "keep")]


@settings(max_examples=400, deadline=None)
@given(row=st.dictionaries(st.sampled_from(KEYS), value | turn, max_size=5), judge=st.sampled_from(JUDGES))
def test_every_row_has_outcomes(row: dict[str, Any], judge: Judge) -> None:
    line = json.dumps(row, ensure_ascii=True)
    outcomes = judge.row(Item(0, 1, line, None, line[:1000]))
    assert outcomes and [o.piece for o in outcomes] == list(range(len(outcomes)))
    for outcome in outcomes:
        outcome.text.encode()
        if outcome.reason is None:
            kept = json.loads(outcome.row)
            assert kept["_source"].startswith("f:1") and {*kept} - {"_source"} <= {*row}
            assert "\n" not in outcome.row and dumps(kept) == outcome.row
        else:
            assert outcome.reason.isidentifier() and len(outcome.text) <= 250


@pytest.mark.parametrize("name", ["pretrain", "finetune", "reward"])
def test_personal_data_is_masked_wherever_text_is(name: str) -> None:
    number = "13800000001"
    call = {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"phone": number}})}
    said = [{"from": "human", "value": f"我的号码{number}"}, call, {"from": "observation", "value": number}, {"from": "gpt", "value": f"已记录{number}"}]
    row = {
        "pretrain": {"text": f"联系电话是{number}，请在工作日拨打。"},
        "finetune": {"conversations": said},
        "reward": {"prompt": f"号码{number}对吗", "chosen": f"对的{number}", "rejected": f"不对{number}。"},
    }[name]
    judge = Judge(Rules(**{**vars(rules(name)), "names": ("f",)}))
    (outcome,) = judge.row(Item(0, 1, json.dumps(row), None, ""))
    assert outcome.reason is None
    assert number not in outcome.row and judge.tally.pii["mobile"] == outcome.row.count("[手机号]")
