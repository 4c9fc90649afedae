"""Cleaning removes markup and keeps every statement."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from self_model_sop.data.clean import CleanConfig, cleaner, repair_mojibake, strip_links

PRETRAIN = cleaner(CleanConfig(), pretrain=True)
DIALOGUE = cleaner(CleanConfig(), pretrain=False)

STATEMENTS = [
    "收缩压<140mmHg且舒张压>90mmHg",
    "若a<b>c则停药",
    "血糖<3.9mmol/L或>16.7mmol/L",
    "p<0.05",
    "x<y and y>z",
    "WBC 10.5×10⁹/L",
    "体表面积1.73m²",
    "不得少于3次",
    "无发热",
    "未见异常",
    "非瓣膜性房颤",
    "每次5mg/kg，每日2~3次",
    "第二百三十四条第（三）项",
    "≤1.5‰",
    "≥60岁",
    "±2SD",
    "α-受体",
    "37.5℃",
    "H₂O",
    "AT&T",
    "R&D",
    "a & b",
    "1/2片",
    "pH 7.35～7.45",
    "“不”字",
    "《民法典》",
    "Na⁺<135 且 K⁺>5.5",
    "HbA1c<7%",
    "eGFR<30mL/(min·1.73m²)",
    "NYHA Ⅲ级",
    "①②③",
    "（1）",
    "50%~70%",
    "-20℃",
    "#1",
    "C++",
    "<<通知>>",
    "a<b c>d",
    "如 <p 值 的",
    "i<n; i>0",
]


@pytest.mark.parametrize("statement", STATEMENTS)
@pytest.mark.parametrize("clean", [PRETRAIN, DIALOGUE])
def test_statements_survive(statement: str, clean: object) -> None:
    assert callable(clean) and clean(statement) == statement


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([*STATEMENTS, "<", ">", "，", "。", "≥", "5", "mg", "不", "x", "y"]), min_size=1, max_size=8), st.sampled_from(["", "，", "。", "\n", " "]))
def test_texts_of_statements_are_unchanged(parts: list[str], between: str) -> None:
    text = between.join(parts).strip()
    text = re.sub(r"[ \t]+(?=\n)", "", text)
    if re.search(r"<(?:p|b|i|u|s|q|a)\b[^<>]*>", text, re.I) and "</" in text:
        return
    assert PRETRAIN(text) == text
    assert DIALOGUE(text) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=5))
def test_markup_around_statements_goes_alone(parts: list[str]) -> None:
    page = '<div class="c">' + "".join(f"<p>{html.escape(p)}</p>" for p in parts) + "<br/></div>"
    assert PRETRAIN(page) == "\n".join(parts)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_cleaning_never_fails_and_settles(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    once = PRETRAIN(text)
    if not any(mark in once for mark in "<&[`~") and "://" not in once and "www." not in once:
        assert PRETRAIN(once) == once


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("<p>问</p><p>答<br/>二</p>", "问\n答\n二"),
        ("白细胞10<sup>9</sup>/L，H<sub>2</sub>O，x<sup>ab</sup>", "白细胞10⁹/L，H₂O，x^(ab)"),
        ("<ul><li>一</li><li>二</li></ul>", "- 一\n\n- 二"),
        ("<table><tr><td>药</td><td>5mg</td></tr><tr><td>甲</td><td>乙</td></tr></table>", "药 | 5mg\n甲 | 乙"),
        ("<script>var a=1<2;</script>正文<style>p{}</style><!-- 注释 -->", "正文"),
        ("&nbsp;&nbsp;第一段&lt;140&gt;&amp;&#8805;2", "第一段<140>&≥2"),
        ("&lt;p&gt;写作段落", "<p>写作段落"),
        ("&unknown; &nosemicolon AT&amp;T", "&unknown; &nosemicolon AT&T"),
        ('<b>重点</b>和<i>次要</i>，<a href="https://x.cn/a">链接</a>', "重点和次要，链接"),
        ("　　首行缩进\u00a0内部\u3000空格", "首行缩进 内部 空格"),
        ("行尾  \r\n下一行\r再一行\n\n\n\n末", "行尾\n下一行\n再一行\n\n末"),
        ("ＡＢｃ１２３．５％，（中文标点）：；！？", "ABc123.5%，（中文标点）：；！？"),
        ("零\u200b宽\ufeff字\x00符\x1f", "零宽字符"),
        ("⼀⽇ 金", "一日 金"),
        ("详见https://www.example.cn/a_(b)?x=1。好", "详见。好"),
        ("[说明](https://example.cn/x)与![图](http://a.cn/b.png)", "说明与图"),
        ("保留U+2028\u2028的行", "保留U+2028\u2028的行"),
    ],
)
def test_residue_goes(raw: str, clean: str) -> None:
    assert PRETRAIN(raw) == clean


def test_code_is_never_touched() -> None:
    code = "说明：\n```html\n<p>a</p>&nbsp;　　ＡＢ  \n\n\n\n</p>\n```\n以及`<br>`标签"
    assert PRETRAIN(code) == code
    assert DIALOGUE(code) == code


def test_dialogues_about_code_keep_their_tags() -> None:
    text = "用<div>和</div>标签包住段落，例如 <p>你好</p>"
    assert DIALOGUE(text) == text
    assert DIALOGUE("<p>请按时服药。</p><p>忌酒。</p>") == "请按时服药。\n忌酒。"


def test_links_stay_in_dialogues() -> None:
    assert DIALOGUE("见 https://example.cn/a") == "见 https://example.cn/a"
    assert strip_links("邮箱 a@www.example.cn 不是链接") == "邮箱 a@www.example.cn 不是链接"


def test_mojibake_is_repaired_only_where_it_is() -> None:
    original = "患者血压偏高，应当复查。"
    assert repair_mojibake(original.encode().decode("latin-1")) == original
    assert repair_mojibake("Café naïve résumé") == "Café naïve résumé"
    assert PRETRAIN(original.encode().decode("latin-1")) == original


def test_everything_can_be_switched_off() -> None:
    off = cleaner(CleanConfig(html="none", links="none", whitespace=False, controls=False, width=False, mojibake=False), pretrain=True)
    raw = "  <p>Ａ\u3000\u200b&nbsp;https://x.cn</p>\r\n\n\n\n "
    assert off(raw) == raw


def test_traditional_to_simplified_is_optional() -> None:
    pytest.importorskip("opencc")
    assert cleaner(CleanConfig(simplify=True), pretrain=True)("頭髮與發現") == "头发与发现"
    assert PRETRAIN("頭髮") == "頭髮"
