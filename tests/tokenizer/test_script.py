from __future__ import annotations

import pytest

from self_model_sop.tokenizer.script import continues, has_script, only_script, whole


@pytest.mark.parametrize("text", ["患", "a患b", "，", "「", "㐀", "𠀀", "豈"])
def test_chinese_characters_and_punctuation_are_of_the_script(text: str) -> None:
    assert has_script(text)


@pytest.mark.parametrize("text", ["", "plain", "“quoted” — …", "かな", "한국어", "Привет", "😀", "Ａ１ａ", "\u3000"])
def test_other_text_is_not(text: str) -> None:
    assert not has_script(text)


@pytest.mark.parametrize(("beginning", "safe"), [
    ("患".encode()[:2], True),
    (b"\xe6", True),
    ("患者".encode()[:5], True),
    (b" " + "患".encode()[:2], True),
    ("，".encode()[:2], False),  # full-width letters and digits begin so too
    ("｝".encode()[:2], False),
    ("、".encode()[:2], False),  # the ideographic space
    ("か".encode()[:2], False),
    ("é".encode()[:1], False),
    (b"abc", False),
    ("𠀀".encode()[:3], True),
    (b"\xf0", False),
])  # fmt: skip
def test_a_beginning_is_safe_only_if_nothing_else_begins_so(beginning: bytes, safe: bool) -> None:
    assert only_script(beginning) is safe


def test_bytes_inside_a_character_are_told_apart() -> None:
    data = "患".encode()
    assert not continues(data) and continues(data[1:]) and not continues(b"")
    assert whole(data) == "患" and whole(data[:2]) is None
