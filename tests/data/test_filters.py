"""Each filter answers None or its reason."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.data import filters
from self_model_sop.data.characters import codepoints
from self_model_sop.data.filters import FilterConfig, RepetitionConfig

SHARED = Path(__file__).parents[3] / "shared" / "data"
CONFIG = FilterConfig()
PROSE = "糖尿病是一组以慢性高血糖为特征的代谢性疾病，由胰岛素分泌缺陷或作用障碍引起。长期高血糖可损害眼、肾、神经、心脏和血管，应当定期复查糖化血红蛋白，并遵医嘱用药。"


def counted(text: str) -> list[int]:
    return filters.counts(codepoints(text))


def repeated(text: str, config: RepetitionConfig = CONFIG.repetition) -> str | None:
    return filters.repetition(codepoints(text), [x.strip() for x in text.split("\n") if x.strip()], config)


def turns(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_character_classes() -> None:
    assert counted("汉𠀀aé5，.★😀かカ한 \n") == [2, 2, 2, 1, 2, 2, 2, 1]


def test_han_ratio() -> None:
    config = FilterConfig(min_han_ratio=0.5)
    assert filters.han_ratio(counted("汉字abc"), config) == "low_han_ratio"
    assert filters.han_ratio(counted("汉字汉字ab 123 ...."), config) is None
    assert filters.han_ratio(counted("abc"), CONFIG) is None


def test_language_by_script() -> None:
    config = FilterConfig(languages=("zh",))
    assert filters.language("学而时习之，不亦说乎", counted("学而时习之，不亦说乎"), config) is None
    assert filters.language("これは日本語の文章です", counted("これは日本語の文章です"), config) == "wrong_language"
    assert filters.language("한국어 문장입니다", counted("한국어 문장입니다"), config) == "wrong_language"


def test_language_of_the_undecided() -> None:
    pytest.importorskip("py3langid")
    for text, code in (("The patient was discharged on the third day after surgery.", "en"), ("Le patient est sorti de l'hôpital après trois jours.", "fr")):
        assert filters.language_of(text, counted(text)) == code


def test_symbols_and_punctuation() -> None:
    assert filters.symbols(counted("★☆★☆→→汉字"), CONFIG) == "too_many_symbols"
    assert filters.symbols(counted("，。、；：？！汉字"), CONFIG) == "too_much_punctuation"
    assert filters.symbols(counted(PROSE), CONFIG) is None
    assert filters.symbols([0] * 8, CONFIG) is None


def test_line_shapes() -> None:
    assert filters.line_shapes([f"• 链接{i}" for i in range(20)], CONFIG) == "bullet_lines"
    assert filters.line_shapes([f"• 链接{i}" for i in range(9)], CONFIG) is None
    assert filters.line_shapes([f"点击阅读{i}……" for i in range(4)] + ["正文"] * 4, CONFIG) == "ellipsis_lines"


def test_repetition() -> None:
    assert repeated(PROSE * 2) is None
    assert repeated(PROSE * 8) == "duplicate_ngrams"
    assert repeated("\n".join([PROSE] * 3)) == "duplicate_lines"
    assert repeated("哈" * 200) == "top_ngram"
    assert repeated("哈" * 200, RepetitionConfig(enabled=False)) is None
    assert repeated("哈哈哈") is None


def test_repeated_share_equals_its_definition() -> None:
    draw = random.Random(0)
    for _ in range(60):
        text = "".join(draw.choice("甲乙丙丁") for _ in range(draw.randint(100, 160)))
        for n in (3, 5):
            seen: set[str] = set()
            covered = [False] * len(text)
            for i in range(len(text) - n + 1):
                gram = text[i : i + n]
                if gram in seen:
                    covered[i : i + n] = [True] * n
                seen.add(gram)
            share = sum(covered) / len(text)
            grams = filters._Grams(codepoints(text).astype("u4"))
            assert filters._repeated_share(grams, n, len(text), -1.0) == pytest.approx(share)
            assert filters._repeated_share(grams, n, len(text), 0.9) >= share - 1e-12  # a bound, where one is enough


def test_boilerplate_only_in_short_texts() -> None:
    assert filters.boilerplate("您访问的页面不存在", CONFIG.boilerplate) == "boilerplate"
    assert filters.boilerplate(PROSE * 3 + "版权所有", CONFIG.boilerplate) is None


def test_refusals() -> None:
    config = FilterConfig(refusals=("default", "不便透露"))
    dialogue = turns(("user", "问"), ("assistant", "抱歉，作为一个AI语言模型，我无法给出诊断。"))
    assert filters.refusal(dialogue, config) == "refusal"
    assert filters.refusal(dialogue, CONFIG) is None
    assert filters.refusal(turns(("user", "作为一个AI你怎么看"), ("assistant", "请及时就医。")), config) is None
    assert filters.refusal(turns(("user", "问"), ("assistant", "这个不便透露")), config) == "refusal"


@pytest.mark.parametrize(
    "text", ["晚期肝癌患者死亡率高，预后极差，疼痛剧烈。", "被告人故意杀人，手段残忍，判处死刑。", "服务很好，医生耐心，只是停车太差。", PROSE, "城市生活垃圾管理条例"]
)
def test_clinical_and_legal_text_is_not_negative(text: str) -> None:
    assert filters.sentiment(text) is None


@pytest.mark.parametrize("text", ["骗子公司，黑心，差评！", "你他妈的滚蛋，王八蛋", "this is shit, fuck you"])
def test_abuse_is(text: str) -> None:
    assert filters.sentiment(text) == "negative_sentiment"


def test_preferences() -> None:
    def verdict(asked: str, chosen: str, rejected: str, **limits: int) -> str | None:
        return filters.preference(turns(("user", asked)), turns(("assistant", chosen)), turns(("assistant", rejected)), filters.PartConfig(**limits))

    assert verdict("问", "好 的", "好的\n") == "chosen_equals_rejected"
    assert [verdict("问", " ", "坏"), verdict("", "好", "坏"), verdict("问", "好", "\n")] == ["empty_chosen", "empty_prompt", "empty_rejected"]
    assert verdict("问", "好", "坏") is None
    assert verdict("问", "好好", "坏", min_answer_chars=2) == "answer_too_short" and verdict("问", "好好", "坏", max_answer_chars=1) == "answer_too_long"
    assert verdict("问题", "好", "坏", max_prompt_chars=1) == "prompt_too_long"


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")
def test_statutes_are_not_repetition() -> None:
    with gzip.open(SHARED / "laws" / "laws_zh.jsonl.gz", "rt", encoding="utf-8") as f:
        texts = [json.loads(line)["text"] for _, line in zip(range(700), f, strict=False)]
    assert [t[:30] for t in texts if repeated(t) or filters.symbols(counted(t), CONFIG)] == []
