"""Verifiable rewards: what earns, what does not, and what a model could try."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from self_model_sop.errors import DATA, SopError
from self_model_sop.train import reward_lint, reward_settings, rewards
from self_model_sop.train.prompts import Prompt
from self_model_sop.train.rewards import REWARDS, Unscored, choice, cite, each, exact, json_object, length, number, part, refusal, repetition, tags, total
from self_model_sop.train.rewards.choice import chosen
from self_model_sop.train.rewards.numbers_zh import chinese_integer, quantities
from self_model_sop.train.rewards.text import references

ROWS = {"choice": "B", "number": "325毫克", "exact": "阿司匹林", "cite": "《民法典》第一百零三条", "refusal": "无法回答", "json": "B", "tags": "B", "length": "B",
"repetition": "B"}


def row(truth: str, **extra: Any) -> dict[str, Any]:
    return {"ground_truth": truth, "extra_info": extra}


# --- multiple choice ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("答案是B", "B"), ("选B", "B"), ("(B)", "B"), ("（Ｂ）", "B"), ("故选：B。", "B"), ("b", "B"), ("B. 阿司匹林", "B"), ("答案：ACD", "ACD"), ("答案为A、C、D", "ACD"),
        ("应选A和C", "AC"), (r"\boxed{B}", "B"), ("<answer>B</answer>", "B"), ("A和D", "AD"), ("The answer is (C).", "C"), ("正确答案是 **D**", "D"), ("选项B符合题意", "B"),
        ("选C项", "C"), ("答案选【D】", "D"), ("【答案】 A", "A"), ("综上，D", "D"), ("根据题意，应当选择的是B", "B"), ("正确的是B", "B"), ("B是正确的", "B"), ("选a", "A"),
        ("所以正确的选项为B和C。", "BC"), ("答案：C。解析：A项错误，B项错误", "C"), ("A错误，B正确，C错误，D错误", "B"), ("A、B均正确", "AB"),
        ("<think>A? 选A</think>答案是C", "C"), ("不选A，排除B，C错误，选D", "D"), ("正确答案不是A，而是B", "B"), ("难道答案是A吗？不，答案是C", "C"),
        ("<think>选A", ""), ("我认为这道题考察维生素C的作用", ""), ("A.甲 B.乙 C.丙 D.丁", ""), ("Because it is a test", ""), ("A不正确", ""), ("", ""),
        ("ABCD", "ABCD"), ("A B C D", "ABCD"), ("A\nB\nC\nD", "ABCD"), ("答案是A或B", "AB"), ("答案是A，答案是B，答案是C，答案是D", "D"),
    ],
)  # fmt: skip
def test_the_letters_that_an_answer_chooses(text: str, letters: str) -> None:
    assert "".join(sorted(chosen(text))) == letters


FORMS = ["选{}", "答案是{}。", "({})", "{}、", "{} ", "{}正确，", "或{}", "答案：{}\n", "{}\n"]


@given(st.lists(st.sampled_from(FORMS), min_size=4, max_size=4), st.permutations("ABCD"))
@settings(max_examples=300, deadline=None)
def test_naming_every_letter_never_beats_one_guess(forms: list[str], order: list[str]) -> None:
    """Whatever the wording, such a text earns for at most one of the four possible truths."""
    text = "".join(form.format(letter) for form, letter in zip(forms, order, strict=True))
    assert sum(choice(text, row(letter)) for letter in "ABCD") <= 1


def test_several_right_letters_all_or_in_part() -> None:
    assert choice("选ACD", row("A、C、D")) == 1 and choice("选AC", row("ACD")) == 0 and choice("选AC", row("ACD"), partial=True) == pytest.approx(2 / 3)
    assert choice("选ABC", row("ACD"), partial=True) == choice("选ABCD", row("ACD"), partial=True) == 0


# --- numbers -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("三百二十五", 325), ("一百零八", 108), ("一百二", 120), ("一万五", 15000), ("一万零五", 10005), ("两千五", 2500), ("十五", 15), ("二〇二四", 2024), ("壹佰贰拾", 120),
        ("一亿二千万", 120_000_000), ("十亿", 10**9), ("一千零一", 1001), ("九千九百九十九万", 99_990_000), ("零", 0), ("两三", None), ("百", None), ("万一", None), ("一好",
        None), ("", None),
    ],
)  # fmt: skip
def test_chinese_numerals(text: str, value: int | None) -> None:
    assert chinese_integer(text) == value


def _spell(value: int) -> str:
    """An independent writer of numerals, digit by digit."""
    if value < 10:
        return "零一二三四五六七八九"[value]
    for size, name in ((10**8, "亿"), (10**4, "万"), (1000, "千"), (100, "百"), (10, "十")):
        if value >= size:
            head, tail = divmod(value, size)
            return _spell(head) + name + ("" if not tail else ("零" if tail < size // 10 else "") + _spell(tail))
    raise AssertionError


@given(st.integers(0, 10**12 - 1))
@settings(max_examples=400, deadline=None)
def test_every_numeral_is_read_back(value: int) -> None:
    assert chinese_integer(_spell(value)) == value and quantities(f"答案是{_spell(value)}。")[0].value == value and quantities(f"{value:,}")[0].value == value


@pytest.mark.parametrize(
    ("text", "value", "dimension"),
    [
        ("325mg", "0.325", "mass"), ("0.325 克", "0.325", "mass"), ("三两", "150", "mass"), ("三斤半", "1750", "mass"), ("两千克", "2000", "mass"), ("半小时", "1800", "time"),
        ("一个半小时", "5400", "time"), ("2小时30分", "9000", "time"), ("两年半", "30", "months"), ("1元5角", "1.5", "money"), ("1,250.5元", "1250.5", "money"), ("3米5厘米",
        "3.05", "length"),
        ("３７．５℃", "37.5", "degrees"), ("零下五度", "-5", "degrees"), ("３５％", "0.35", ""), ("百分之三十五", "0.35", ""), ("千分之五", "0.005", ""), ("二分之一", "0.5", ""),
        ("一又二分之一", "1.5", ""), ("1/2", "0.5", ""), ("½", "0.5", ""), ("1.2万", "12000", ""), ("1亿2000万", "120000000", ""), ("三点一四", "3.14", ""), ("负五", "-5",
        ""), ("1e3", "1000", ""), ("五个", "5", ""),
    ],
)  # fmt: skip
def test_quantities(text: str, value: str, dimension: str) -> None:
    (found,) = quantities(text)
    assert found.value == Fraction(value) and "".join(name for name, _ in found.dimension) == dimension


@pytest.mark.parametrize("text", ["统一处理", "一般情况", "十分重要", "万一发生", "千万不要", "二氧化碳", "七八天", "", "没有数字"])
def test_words_are_no_numbers(text: str) -> None:
    assert quantities(text) == []


@pytest.mark.parametrize(
    ("text", "truth", "options", "reward"),
    [
        ("答案是三百二十五毫克", "325mg", {}, 1), ("0.325克", "325毫克", {}, 1), ("325克", "325毫克", {}, 0), ("325", "325毫克", {}, 1), ("325",
        "325毫克", {"unit": "required"}, 0),
        ("325元", "325毫克", {"unit": "ignored"}, 1), ("小明有3个苹果，又买了5个，一共8个。", "8", {}, 1), ("3+5=8", "8", {}, 1), ("答案是8，因为3+5=8", "8", {}, 1), ("35%",
        "0.35", {}, 1),
        ("35", "35%", {}, 1), ("35", "35%", {"unit": "required"}, 0), ("0.5", "1/2", {}, 1), ("一半", "1/2", {}, 1), ("3.14", "3.14159", {}, 0), ("3.14",
        "3.14159", {"tolerance": 0.01}, 1),
        ("101", "100", {"relative": 0.01}, 1), ("90分钟", "1.5小时", {}, 1), (r"\boxed{42}", "#### 42", {}, 1), ("1.2万元", "12000元", {}, 1), ("五只", "5个", {}, 1),
        ("因此需要 8 天完成，比原计划少 2 天", "8天", {}, 1), ("5mmol/L", "5 mmol", {}, 0), ("-5", "5", {}, 0), ("8", "8", {"marked_only": True}, 0), ("答案是8",
        "8", {"marked_only": True}, 1),
        ("3+5", "8", {}, 0), ("1、2、3、4、5、6、7、8", "8", {}, 0), ("1 2 3 4 5 6 7 8", "8", {}, 0), ("答案是7或8", "8", {}, 0), ("8~9", "8", {}, 0),
        ("<think>答案是8</think>答案是9", "8", {}, 0), ("<think>8", "8", {}, 0), ("不知道", "8", {}, 0), ("", "8", {}, 0),
    ],
)  # fmt: skip
def test_numeric_answers(text: str, truth: str, options: dict[str, Any], reward: float) -> None:
    assert number(text, row(truth), **options) == reward


@given(st.lists(st.integers(0, 40), min_size=2, max_size=30, unique=True), st.sampled_from(["、", ", ", " ", "或", "和", "/", "; "]))
@settings(max_examples=200, deadline=None)
def test_listing_numbers_earns_for_at_most_one_truth(values: list[int], joint: str) -> None:
    assert sum(number(joint.join(map(str, values)), row(str(v))) for v in range(41)) <= 1


# --- text --------------------------------------------------------------------------------------------------------------------------------------


def test_exact_text_folds_width_case_and_punctuation() -> None:
    assert exact("Ａspirin。", row("aspirin")) == 1 and exact("Aspirin", row("aspirin"), normalise=False) == 0 and exact("乙", row("甲|乙"), separator="|") == 1
    assert exact("<think>甲</think><answer>乙</answer>", row("乙")) == 1 and exact("乙，以及甲", row("乙")) == 0 and exact("", row("。")) == 0


def test_json_and_tags() -> None:
    assert json_object('{"a": 1}', {}) == 1 and json_object('```json\n{"a": 1}\n```', {}, keys=["a", "b"]) == 0.5 and json_object('```json\n{"a": 1}\n```', {}, fence=False) == 0
    assert not any(json_object(text, {}) for text in ('{"a": NaN}', '{"a": 1} 完', '{"a": 1, "a": 2}', "[1]", "", "[" * 100_000))
    assert tags("<think>想</think>\n<answer>答</answer>", {}) == 1 and tags("<think>想</think>答", {}, names=["think"]) == 1
    wrong = ["<think></think><answer>答</answer>", "<think>想</think><answer>答</answer>多余", "<answer>答</answer><think>想</think>", "答"]
    for text in [*wrong, "<think>a<think>b</think></think><answer>c</answer>"]:
        assert tags(text, {}) == 0


def test_references_are_read_with_their_law() -> None:
    found = references("根据《中华人民共和国民法典》第一百零三条、第104条之一和《刑法》，见[3]")
    assert found == {("民法典", "103"), ("民法典", "104-1"), ("刑法", ""), ("", "[3]")}
    law = row("《民法典》第一百零三条")
    assert cite("依据《民法典》第103条", law) == cite("依据民法典第一百零三条", law) == 1 and cite("《刑法》第一百零三条", law) == cite("不知道", law) == 0
    assert cite("《民法典》" + "、".join(f"第{i}条" for i in range(1, 200)), law) < 0.02
    assert cite("见[1]", row("", references=["[1]", "[2]"])) == pytest.approx(2 / 3)


def test_refusing_only_what_has_no_answer() -> None:
    unanswerable, answerable = row("无法回答"), row("B")
    assert refusal("材料中没有提到，无法回答", unanswerable) == refusal("答案是B", answerable) == 1
    assert refusal("答案是B", unanswerable) == refusal("无法确定，但答案是B", unanswerable) == refusal("无法回答", answerable) == refusal("", answerable) == refusal("",
    unanswerable) == 0
    assert refusal("恕难从命", row("B", answerable=False), phrases=["恕难从命"]) == 1


def test_length_and_repetition_cost() -> None:
    assert length("好" * 800, {}) == 0 and length("好" * 900, {}) == -0.5 and length("好" * 5000, {}) == length("  ", {}) == -1
    assert repetition("春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。", {}) == 0 and repetition("好" * 100, {}) < -0.95
    assert -1 <= repetition("你好吗？" * 50, {}) < repetition("你好吗？今天天气不错，你好吗？", {}) <= 0


# --- all of them -------------------------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(REWARDS)), st.text(max_size=80) | st.sampled_from(["答案是B", "三百二十五毫克"]).flatmap(lambda s: st.text(max_size=20).map(lambda t: s + t)))
@settings(max_examples=400, deadline=None)
def test_every_reward_stays_in_its_range_and_is_pure(name: str, text: str) -> None:
    given_row = row(ROWS[name])
    value = REWARDS[name].function(text, given_row)
    assert REWARDS[name].least <= value <= REWARDS[name].most and value == REWARDS[name].function(text, given_row) and given_row == row(ROWS[name])


@pytest.mark.parametrize("name", [name for name, reward in REWARDS.items() if reward.compares])
def test_the_ground_truth_itself_earns_everything_and_nothing_earns_nothing(name: str) -> None:
    assert REWARDS[name].function(ROWS[name], row(ROWS[name])) == REWARDS[name].most and REWARDS[name].function("", row(ROWS[name])) == REWARDS[name].least


def test_a_weighted_sum(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(answer, row, *, most=3):\n    return float(len(answer) <= most)\n", encoding="utf-8")
    parts = [part("choice", 2.0, {}, tmp_path), part("length", 0.5, {"most": 2, "margin": 4}, tmp_path), part("mine.py:short", 1.0, {"most": 4}, tmp_path)]
    scores = each(parts, "答案是B", row("B"))
    assert scores == {"choice": 1.0, "length": -0.5, "short": 1.0} and total(parts, scores) == 2.75


@pytest.mark.parametrize(
    ("code", "why"),
    [("def f(answer, row): return float('nan')", "nan"), ("def f(answer, row): return 1 / 0", "ZeroDivisionError"), ("f = 3", "no function"), ("import nowhere_at_all",
    "does not load")],
)
def test_a_function_of_the_user_that_fails_says_so(tmp_path: Path, code: str, why: str) -> None:
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    with pytest.raises(Unscored, match=why):
        each([part("mine.py:f", 1.0, {}, tmp_path)], "x", row("B"))


def test_a_row_without_what_the_reward_compares_is_an_error() -> None:
    for name, truth in (("choice", "甲乙丙"), ("number", "没有"), ("cite", "没有")):
        with pytest.raises(Unscored, match=name):
            each([part(name, 1.0, {}, Path())], "答案是B", row(truth))


def test_the_folder_runs_alone(tmp_path: Path) -> None:
    """A copy needs the standard library only: it runs in verl's environment."""
    shutil.copytree(Path(rewards.__file__).parent, tmp_path / "sop_rewards", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom pathlib import Path\nimport sop_rewards as r\n"
    code += "print(r.each([r.part('choice', 1.0, {}, Path())], '选B', {'ground_truth': 'B'}))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'choice': 1.0}"


def test_long_and_odd_texts_cost_little_time() -> None:
    """No pattern backtracks its way through a long answer."""
    import time

    pieces = ["选", "A、", "一", "1,", "《", "<think>", "答案是", "第一百", "又", "1 ", "(", "半", "A ", "不", "1/", "=", "1="]
    for name, piece in itertools.product(REWARDS, pieces):
        clock = time.process_time()
        REWARDS[name].function(piece * (20_000 // len(piece)), row(ROWS[name]))
        assert time.process_time() - clock < 2, (name, piece)


# --- before a run ------------------------------------------------------------------------------------------------------------------------------


def lint(names: list[Any], truths: list[str], **extra: Any) -> reward_lint.Table:
    given_rewards = [reward_settings.RewardSetting(**(n if isinstance(n, dict) else {"name": n})) for n in names]
    return reward_lint.table(reward_settings.parts(given_rewards), [Prompt([], {**row(t), "extra_info": extra}, f"row {i}") for i, t in enumerate(truths)])


@pytest.mark.parametrize(
    ("names", "truths"),
    [
        (["choice"], ["A", "B"]), (["tags", "number"], ["8", "9元"]), ([{"name": "tags", "options": {"names": ["think"]}}, "exact"], ["甲", "乙"]),
        (["choice", "length", "repetition"], ["A"]),
        (["refusal", "exact"], ["无法回答", "甲"]), (["refusal"], ["无法回答", "甲", "乙"]), (["cite"], ["《刑法》第一条", "《刑法》第二条"]), (["json", "length"], ["甲"]),
    ],
)  # fmt: skip
def test_right_answers_earn_more_in_the_form_that_is_asked_for(names: list[Any], truths: list[str]) -> None:
    assert lint(names, truths).problem() == ""


@pytest.mark.parametrize(
    ("names", "truths", "told"),
    [
        (["refusal"], ["甲", "乙"], "answers of another row 1.000"), ([{"name": "choice", "weight": -1.0}], ["A", "B"], "right answers earn -1.000"),
        ([{"name": "choice", "weight": 0.01}, {"name": "length", "weight": -1.0, "options": {"least": 2}}, {"name": "exact", "weight": -0.1}], ["A", "B"], "right answers earn"),
    ],
)  # fmt: skip
def test_rewards_that_prefer_wrong_answers_are_found_out(names: list[Any], truths: list[str], told: str) -> None:
    found = lint(names, truths)
    assert told in found.problem()
    with pytest.raises(SopError, match="would not teach") as raised:
        reward_lint.require(found, "refuse")
    assert raised.value.code == DATA and reward_lint.require(found, "warn") is None


def test_required_references_are_part_of_a_right_answer() -> None:
    found = lint(["cite", "exact"], ["可以"], references=["《民法典》第一条", "[2]"])
    assert found.stats()["cite"]["right"] == 1 and found.stats()["cite"]["empty"] == 0 and len(found.lines()) == 4
