"""Personal data is found by pattern and confirmed by checksum or context."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from self_model_sop.data.pii import DEFAULT_RULES, RULES, luhn, mask, mask_data, resident_id

ALL = tuple(RULES)


def make_id(draw: random.Random) -> str:
    body = f"99{draw.randint(0, 9999):04d}{draw.randint(1930, 2020)}{draw.randint(1, 12):02d}{draw.randint(1, 28):02d}{draw.randint(0, 999):03d}"
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    return body + "10X98765432"[sum(int(d) * w for d, w in zip(body, weights, strict=True)) % 11]


def make_card(draw: random.Random) -> str:
    body = "62" + "".join(str(draw.randint(0, 9)) for _ in range(16))
    return next(body + str(c) for c in range(10) if luhn(body + str(c)))


def test_checksums_decide() -> None:
    draw = random.Random(1)
    for _ in range(200):
        number = make_id(draw)
        assert mask(f"身份证{number}。")[0] == "身份证[身份证号]。"
        wrong = number[:-1] + ("0" if number[-1] != "0" else "1")
        assert not resident_id(wrong)
        card = make_card(draw)
        assert mask(f"卡号{card}，")[0] == "卡号[银行卡号]，"
        spaced = " ".join([card[:4], card[4:8], card[8:12], card[12:16], card[16:]])
        assert mask(f"卡号 {spaced} 。")[1]["bank_card"] == 1
        assert not luhn(card[:-1] + str((int(card[-1]) + 1) % 10))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("电话13800000001，", "电话[手机号]，"),
        ("打138-0000-0002（张护士）", "打[手机号]（张护士）"),
        ("+86 138 0000 0003", "[手机号]"),
        ("科室座机：010-00000005", "科室座机：[电话号码]"),
        ("(0571)87654321转8001", "[电话号码]"),
        ("京A12345与粤BD12345", "[车牌号]与[车牌号]"),
        ("护照号码为E12345678。", "护照号码为[护照号]。"),
        ("a.b+c@mail.example.com.cn", "[邮箱]"),
        ("来自8.8.8.8的请求", "来自8.8.8.8的请求"),
        ("来自123.56.78.90的请求", "来自[IP地址]的请求"),
        ("微信号：abc_12345", "微信号：[微信号]"),
        ("加V信hello-888", "加V信[微信号]"),
        ("QQ：12345678", "QQ：[QQ号]"),
        ("患者姓名：张三丰，男", "患者姓名：[姓名]，男"),
        ("主治医师：欧阳明", "主治医师：[姓名]"),
    ],
)
def test_found(text: str, masked: str) -> None:
    assert mask(text, ALL)[0] == masked


@pytest.mark.parametrize(
    "text",
    [
        "国药准字H20012345",
        "国药准字S20053042",
        "共13800000001元",
        "收缩压140-160mmHg",
        "2021-03-26至2021-04-01",
        "第1.2.3.4条",
        "192.168.1.1",
        "GB 11643-1999",
        "ISBN 978-7-5326-1234-5",
        "13812345678901234567890",
        "版本10.2.3.1",
        "患者：主诉头痛",
        "苏A级景区",
        "京东",
        "微信支付",
        "QQ音乐",
        "白细胞3.5×10⁹/L",
        "邮箱@",
        "1234567890123456789",
        "18岁以上",
        "批号20230115001",
    ],
)
def test_not_personal(text: str) -> None:
    assert mask(text, ALL) == (text, Counter())


def test_names_are_optional() -> None:
    assert "name" not in DEFAULT_RULES
    assert mask("患者：张三，男")[0] == "患者：张三，男"


def test_data_of_tools_stays_data() -> None:
    hits: Counter[str] = Counter()
    call = json.dumps({"name": "query", "arguments": {"phone": "13800000001", "n": 13800000002, "ok": True, "note": "a"}})
    masked = json.loads(mask_data(call, DEFAULT_RULES, hits))
    assert masked["arguments"] == {"phone": "[手机号]", "n": "[手机号]", "ok": True, "note": "a"}
    assert hits == {"mobile": 2}
    untouched = '{"a":  1}'
    assert mask_data(untouched, DEFAULT_RULES, hits) == untouched
    assert mask_data({"x": ["13800000001", None, 1.5]}, DEFAULT_RULES, hits) == {"x": ["[手机号]", None, 1.5]}
