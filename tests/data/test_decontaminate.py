"""Evaluation items in training texts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from self_model_sop.data.decontaminate import Choice, Overlap, item_of, letters, overlaps
from self_model_sop.data.formats import RowError

EVAL = Path(__file__).resolve().parents[3] / "shared/data/eval"
QUESTION = "关于高血压患者的饮食原则，下列哪一项说法是正确的？"
ITEM = Choice(QUESTION, ("每日食盐不超过五克", "可以不限制饮酒", "多吃腌制食品", "无需控制体重"))


def test_thirteen_letters_in_a_row_are_an_overlap_and_twelve_are_not() -> None:
    item = "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉戌亥"
    assert overlaps([f"前文{item[3:16]}后文", f"前文{item[3:15]}后文", "", item], [item]) == [0, None, None, 0]


def test_width_case_spacing_and_punctuation_make_no_difference() -> None:
    item = "The ＷＨＯ recommends: less than 5g of salt per day!"
    assert overlaps(["据报道，the who, recommends LESS THAN ５ｇ of salt per day。"], [item]) == [0]


def test_letters() -> None:
    assert letters("Ｔhe 高血壓，１４０/９０；Été, e\u0301te\u0301! 😀𠀀\ud800\n") == "the高血压14090eteete𠀀"


def test_the_first_item_is_named() -> None:
    shared = "一段在两个题目里都出现的文字共十五个"
    assert overlaps([f"无关{shared}无关", "别的"], ["完全不同的一段题目文字用来占住第零个位置", shared + "甲", "乙" + shared]) == [1, None]


def test_a_short_item_is_found_only_as_a_whole_text() -> None:
    assert overlaps(["什么是高血压？", "请问什么是高血压", "什么 是 高血压"], ["什么是高血压"]) == [0, None, 0]


def test_multiple_choice_needs_question_and_an_option() -> None:
    texts = [
        f"练习：{QUESTION}\nA. 每日食盐不超过五克\nB. 可以不限制饮酒",
        f"问：{QUESTION} 答：每日食盐不超过五克。",
        f"论文题目：{QUESTION}",  # the question alone
        "医生说，每日食盐不超过五克。",  # a fact that may be learned
        "下列哪一项说法是正确的？多吃腌制食品",  # a phrase that many questions share, below n letters
    ]
    assert overlaps(texts, [ITEM]) == [0, 0, None, None, None]


def test_a_long_option_counts_by_any_of_its_n_grams() -> None:
    option = "应当每天监测血压并且遵照医生的嘱咐按时按量服用降压药物"
    assert overlaps([f"{QUESTION}……每天监测血压并且遵照医生的嘱咐……"], [Choice(QUESTION, (option, "不用管"))]) == [0]


def test_a_short_question_is_found_whole_with_an_option() -> None:
    item = Choice("唐律规定的死刑有", ("绞刑与斩刑两种", "凌迟"))
    assert overlaps(["我们知道唐律规定的死刑有：绞刑与斩刑两种。", "唐律规定的死刑很少", "绞刑与斩刑两种"], [item]) == [0, None, None]


def test_question_and_option_must_add_up_to_n_letters() -> None:
    assert overlaps(["1+1等于几？等于2，对吗"], [Choice("1+1等于几", ("2", "3"))]) == [None]


def test_rows_become_items() -> None:
    assert item_of({"question": "问题是什么呢", "options": ["(A)甲", "(B)乙"], "label": "A"}) == Choice("问题是什么呢", ("甲", "乙"))
    assert item_of({"question": "问题", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "answer": "A"}) == Choice("问题", ("甲", "乙", "丙", "丁"))
    assert item_of({"text": "一段文字"}) == "一段文字"
    with pytest.raises(RowError):
        item_of({"unknown": 1})


def test_nothing_to_look_for_or_in() -> None:
    assert overlaps([], ["一段文字"]) == []
    assert overlaps(["一段文字"], []) == [None]
    assert overlaps(["", "\ud800", "。。。"], ["", "。。。", Choice("", ("", ""))]) == [None, None, None]


def test_too_small_n_is_refused() -> None:
    with pytest.raises(ValueError, match="n must be"):
        Overlap(["x"], 3)


def test_texts_are_read_one_block_at_a_time() -> None:
    item = "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉戌亥"
    consumed = 0

    def texts():  # type: ignore[no-untyped-def]
        nonlocal consumed
        for i in range(120):
            consumed += 1
            yield "长" * 20_000 + (item if i == 100 else "")

    found = Overlap([item]).find(texts())
    assert next(found) is None and consumed < 60
    assert [i for i, x in enumerate(found, 1) if x == 0] == [100]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("甲乙丙Ａb 。"), max_size=25), max_size=6), st.lists(st.text(st.sampled_from("甲乙丙Ａb 。"), max_size=25), max_size=6), st.integers(4, 8))
def test_plain_items_equal_brute_force(texts: list[str], items: list[str], n: int) -> None:
    def brute(text: str, item: str) -> bool:
        x, y = letters(text), letters(item)
        return (bool(y) and x == y) if len(y) < n else any(y[i : i + n] in x for i in range(len(y) - n + 1))

    assert overlaps(texts, items, n) == [next((k for k, item in enumerate(items) if brute(text, item)), None) for text in texts]


@pytest.mark.shared
@pytest.mark.skipif(not EVAL.exists(), reason="../shared is absent")
def test_real_questions_are_found_in_other_wording_around_them() -> None:
    rows = [json.loads(line) for line in (EVAL / "agieval_jec-qa-kd.jsonl").read_text(encoding="utf-8").splitlines()]
    items = [item_of(row) for row in rows]
    draw = random.Random(0)
    texts = [f"某平台练习题 {i.question}\n答案是：{draw.choice(i.options)}。解析略" for i in items if isinstance(i, Choice)]
    found = overlaps(texts, items)
    assert sum(x is not None for x in found) >= 0.99 * len(texts)
    assert sum(x is not None for x in overlaps(texts, items[: len(items) // 2])) < 0.52 * len(texts)
