"""What is asked about many texts at once: the same answers as one by one, and never a text passed over that needed work."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from self_model_sop.data import filters, fold, pii
from self_model_sop.data.batch import Batch
from self_model_sop.data.characters import codepoints
from self_model_sop.data.clean import CleanConfig, cleaner, unclean
from self_model_sop.data.filters import FilterConfig

PIECES = [
    "血压",
    "<140mmHg",
    "<br>",
    "<p>",
    "</p>",
    "&nbsp;",
    "&lt;",
    "https://a.cn/b?c=1",
    "www.b.com",
    "：",
    ":",
    "/",
    " ",
    "  \n",
    "\n\n\n",
    "\t",
    "\n",
    "\u3000",
    "\u00a0",
    "\r\n",
    "`x `",
    "``` a\n```",
]
PIECES += [
    "ＡＢ１",
    "．",
    "3．5",
    "％",
    "×",
    "é",
    "Ã©",
    "ä¸\u00adæ–‡",
    "\u200b",
    "\x07",
    "\x85",
    "\u2028",
    "w",
    "13800000001",
    "010-12345678",
    "(010) 1234567",
    "139 0000 1111",
    "+86-138-0000-0001",
    "6222021234567890123",
]
PIECES += [
    "沪A12345",
    "CT",
    "B超",
    "QQ：12345678",
    "微信号: abc_12345",
    "a.b@c.com",
    "8.8.8.8",
    "140/90",
    "患者：张三，",
    "护照E12345678",
    "11010519491231002X",
    "的",
    "。",
    "abc def",
    "ABC",
    "頭髮",
]
texts = st.lists(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), max_size=12)
CONFIGS = [CleanConfig(), CleanConfig(html="none", links="none"), CleanConfig(links="all", mojibake=False), CleanConfig(whitespace=False), CleanConfig(controls=False, width=False)]


@settings(max_examples=600, deadline=None)
@given(texts=texts, config=st.sampled_from(CONFIGS), pretrain=st.booleans())
def test_what_is_called_clean_stays_as_it_is(texts: list[str], config: CleanConfig, pretrain: bool) -> None:
    clean = cleaner(config, pretrain=pretrain)
    for text, dirty in zip(texts, unclean(Batch(texts), config, pretrain=pretrain).tolist(), strict=True):
        assert dirty or clean(text) == text


@settings(max_examples=600, deadline=None)
@given(texts=texts)
def test_personal_data_of_a_batch(texts: list[str]) -> None:
    names = tuple(pii.RULES)
    found = pii.mask_batch(Batch(texts), names)
    for i, text in enumerate(texts):
        assert found.get(i, (text, pii.Counter())) == pii.mask(text, names)


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("mobile", ["13800000001", "138-0000-0001", "138 0000 0001", "138-0000 0001", "+8613800000001", "86-13800000001", "+86 138 0000 0001"]),
        ("landline", ["010-12345678", "0755-1234567", "(010)12345678", "（0755） 1234567", "010 12345678", "010－12345678", "021—12345678-123", "010–1234567"]),
    ],
)
def test_shapes_let_every_number_through(name: str, examples: list[str]) -> None:
    for text in examples:
        assert pii.mask(f"电话{text}。", [name])[1] == {name: 1}, text


@settings(max_examples=400, deadline=None)
@given(texts=texts)
def test_keys_of_a_batch(texts: list[str]) -> None:
    batch = Batch(texts)
    exact = [b"", b"x"] * (len(texts) // 2) + [b""] * (len(texts) % 2)
    assert fold.keys_of(batch.codes, batch.ends, exact) == [fold.key_of(codepoints(t), e) for t, e in zip(texts, exact, strict=True)]


def test_counts_of_a_batch() -> None:
    found = ["", "汉字 abc", "，。", ""]
    assert filters.counts_of(Batch(found)) == [filters.counts(codepoints(t)) for t in found]
    assert filters.counts_of(Batch([])) == []


def some_texts(seed: int) -> list[str]:
    """Around every limit of repetition: few words, many words, a phrase again and again."""
    draw = random.Random(seed)
    out = []
    for _ in range(40):
        words = ["".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(draw.randrange(1, 12))) for _ in range(draw.choice([1, 3, 10, 60]))]
        out.append(draw.choice(["", " ", "，"]).join(draw.choices(words, k=draw.randrange(1, 80))))
    return out


OTHER = filters.RepetitionConfig(top_ngrams=(0.1,), duplicate_ngrams={"5": 0.2, "30": 0.1})


@pytest.mark.parametrize("together", [10, 3])  # 3 bits: eight texts together, so several rounds
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("config", [FilterConfig().repetition, OTHER, filters.RepetitionConfig(duplicate_ngrams={})])
def test_a_text_that_repeats_itself_is_looked_at(seed: int, config: Any, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_OWNER_BITS", together)
    found = some_texts(seed)
    verdicts = [filters.repetition(codepoints(t), [t], config) for t in found]
    looked = filters.may_repeat(Batch(found), config).tolist()
    assert all(look or verdict is None for look, verdict in zip(looked, verdicts, strict=True))
    assert not all(looked)
