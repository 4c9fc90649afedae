"""Personal data in Chinese text: found by pattern, confirmed by checksum or context, masked by a label.

Checksums: resident identity number GB 11643-1999 (ISO 7064 MOD 11-2), bank card Luhn (ISO/IEC 7812-1).
What has no checksum needs a separator, a marker in front of it, or a shape that amounts and drug approval numbers do not have.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple

from .characters import DIGIT, HAN, LETTER, PUNCTUATION, SPACE, SYMBOL, classes, codepoints

if TYPE_CHECKING:
    from .batch import Batch


class Rule(NamedTuple):
    """A pattern whose first group is personal data where `confirm` agrees; `label` stands in its place.

    `shapes` are runs of character classes (L letter, D digit, H Han, P punctuation, S space, Y symbol), one of which a text must contain before the pattern is
    tried; `markers` likewise. Most texts are done after a few substring searches.
    """

    pattern: re.Pattern[str]
    label: str
    shapes: tuple[str, ...]
    markers: tuple[str, ...] = ()
    confirm: Callable[[str], bool] = lambda found: True


def resident_id(number: str) -> bool:
    """True for an 18-digit identity number with a possible birth date and the right check digit."""
    try:
        born = date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(int(d) * w for d, w in zip(number, weights, strict=False))
    return born.year >= 1850 and "10X98765432"[total % 11] == number[17].upper()


def luhn(number: str) -> bool:
    """True if the digits (spaces and hyphens apart) pass the Luhn check."""
    digits = [int(c) for c in reversed(number) if c.isdigit()]
    return len(set(digits)) > 1 and sum(d if i % 2 == 0 else (2 * d - 9 * (d > 4)) for i, d in enumerate(digits)) % 10 == 0


def public_address(text: str) -> bool:
    """True for a public IPv4 address; section numbers such as 1.2.3.4 and private or documentation ranges name nobody."""
    try:
        return ipaddress.IPv4Address(text).is_global and max(map(int, text.split("."))) >= 20
    except ValueError:
        return False


_SURNAMES = (
    "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦尤许何吕施张孔曹严华金魏陶姜戚谢邹喻柏水窦章云苏潘葛范彭郎鲁韦昌马苗凤花方俞任袁柳鲍史唐费廉岑薛雷贺倪汤滕殷罗毕郝邬安常乐于时傅"
    "皮卞齐康伍余元卜顾孟平黄和穆萧尹姚邵湛汪祁毛禹狄米贝明臧计成戴宋茅庞熊纪舒屈项祝董梁杜阮蓝闵席季麻强贾路娄江童颜郭梅盛林刁钟徐邱骆高夏蔡田樊胡凌霍虞万柯管卢莫房裘缪干解应"
    "宗丁宣邓郁单杭洪包诸左石崔吉龚程邢裴陆荣翁荀羊甄曲家封靳井段富巫焦巴谷车侯全班秋仲伊宫宁仇甘厉祖武符刘景詹束龙叶幸司黎乔闻党翟谭劳姬申冉桑桂牛寿边尚温庄晏柴瞿阎连习艾鱼容"
    "向古易戈廖终居衡耿满弘匡国文寇广东欧利师聂关荆"
)
_NAME = rf"(?:欧阳|司马|上官|诸葛|慕容|尉迟|[{_SURNAMES}])[\u4e00-\u9fff]{{1,2}}"

_MOBILE = ("D" * 11, *(f"DDD{a}DDDD{b}DDDD" for a in "PS" for b in "PS"))
_LANDLINE = tuple(f"DDD{between}DDDDDDD" for between in ("P", "S", "Y", "PS"))
_NOT_AN_AMOUNT = r"(?![0-9A-Za-z]|[.][0-9]|\s?[元万亿%％例人个])"  # amounts and counts look like telephone numbers

RULES: dict[str, Rule] = {
    "resident_id": Rule(re.compile(r"(?<![0-9A-Za-z])([1-9][0-9]{5}(?:18|19|20)[0-9]{9}[0-9Xx])(?![0-9A-Za-z])"), "[身份证号]", ("D" * 17,), confirm=resident_id),
    "bank_card": Rule(
        re.compile(r"(?<![0-9A-Za-z.])([3-69][0-9]{3}(?:[ -]?[0-9]{4}){3}(?:[ -]?[0-9]{1,3})?)(?![0-9A-Za-z]|[.][0-9])"),
        "[银行卡号]",
        ("D" * 12, "DDDDSDDDD", "DDDDPDDDD"),
        confirm=luhn,
    ),
    "mobile": Rule(re.compile(r"(?<![0-9A-Za-z.])((?:\+?86[- ]?)?1[3-9][0-9](?:[0-9]{8}|[- ][0-9]{4}[- ][0-9]{4}))" + _NOT_AN_AMOUNT), "[手机号]", _MOBILE),
    "landline": Rule(
        re.compile(r"(?<![0-9A-Za-z])((?:[(（]0[1-9][0-9]{1,2}[)）]\s?|0[1-9][0-9]{1,2}[-－—– ])[0-9]{7,8}(?:\s?[-转]\s?[0-9]{1,6})?)(?![0-9A-Za-z])"),
        "[电话号码]",
        _LANDLINE,
    ),
    "plate": Rule(
        re.compile(
            r"([京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼][A-HJ-NP-Z][·•.]?"
            r"(?=[A-HJ-NP-Z0-9]{0,5}[0-9])(?:[A-HJ-NP-Z0-9]{5,6}|[A-HJ-NP-Z0-9]{4}[学警港澳挂使领]))(?![A-Za-z0-9])"
        ),
        "[车牌号]",
        ("HLD", "HLL", "HLP"),
    ),
    "passport": Rule(
        re.compile(r"(?:护照|通行证|[Pp]assport)[^\n。；]{0,10}?(?<![A-Za-z0-9])([A-Z]{1,2}[0-9]{7,8})(?![A-Za-z0-9])"),
        "[护照号]",
        ("LDDDDDDD",),
        ("护照", "通行证", "assport"),
    ),
    "email": Rule(
        re.compile(r"(?<![A-Za-z0-9._%+-])([A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,12})(?![A-Za-z0-9])"),
        "[邮箱]",
        ("PL", "PD"),
        ("@",),
    ),
    "ip": Rule(re.compile(r"(?<![0-9.])([0-9]{1,3}(?:\.[0-9]{1,3}){3})(?![0-9]|\.[0-9])"), "[IP地址]", ("DPDPD", "DPDDPD", "DPDDDPD"), confirm=public_address),
    "wechat": Rule(
        re.compile(
            r"(?:微信号?|[Ww]e[Cc]hat|[Ww]eixin|[VvWw]信|(?<![A-Za-z])(?:VX|vx|WX|wx))(?:[号为是：:\s]|ID){0,4}"
            r"(?<![A-Za-z0-9])([A-Za-z][A-Za-z0-9_-]{5,19})(?![A-Za-z0-9])"
        ),
        "[微信号]",
        ("LL", "LD", "LP"),
        ("微信", "eChat", "echat", "eixin", "V信", "v信", "W信", "w信", "VX", "vx", "WX", "wx"),
    ),
    "qq": Rule(
        re.compile(r"(?:(?<![A-Za-z])[Qq]{2}|扣扣|企鹅号)[群号码为是：:\s]{0,5}([1-9][0-9]{4,10})(?![0-9])"),
        "[QQ号]",
        ("DDDDD",),
        ("QQ", "qq", "Qq", "qQ", "扣扣", "企鹅号"),
    ),
    "name": Rule(
        re.compile(
            r"(?:姓\s?名|患者姓名|病人姓名|(?:患者|病人|患儿|(?:主治|主管|经治|责任)?医[生师]|护士|联系人))\s?[：:]\s?"
            rf"({_NAME})(?![\u4e00-\u9fff])"
        ),
        "[姓名]",
        ("HPH", "HPS", "HSP"),
        ("：", ":"),
    ),
}
DEFAULT_RULES = tuple(name for name in RULES if name != "name")
_CLASS = {"S": SPACE, "H": HAN, "L": LETTER, "D": DIGIT, "P": PUNCTUATION, "Y": SYMBOL}
_SHAPES = {name: tuple(bytes(_CLASS[c] for c in shape) for shape in rule.shapes) for name, rule in RULES.items()}


def mask(text: str, names: Sequence[str] = DEFAULT_RULES) -> tuple[str, Counter[str]]:
    """The text with personal data replaced by labels, and the number of hits per rule."""
    kinds = classes(codepoints(text)).tobytes()
    return _masked(text, [name for name in names if any(shape in kinds for shape in _SHAPES[name]) and _marked(text, RULES[name])])


def _marked(text: str, rule: Rule) -> bool:
    return not rule.markers or any(marker in text for marker in rule.markers)


def mask_batch(batch: Batch, names: Sequence[str] = DEFAULT_RULES) -> dict[int, tuple[str, Counter[str]]]:
    """`mask` for many texts at once: text number -> (text, hits), of those with hits only."""
    kinds, ends = _without_runs_of_han(batch)
    found: dict[int, list[str]] = {}
    for name in names:
        for i in sorted({i for shape in _SHAPES[name] for i in _texts_with(shape, kinds, ends)}):
            if _marked(batch.texts[i], RULES[name]):
                found.setdefault(i, []).append(name)
    masked = {i: _masked(batch.texts[i], rules) for i, rules in found.items()}
    return {i: (text, hits) for i, (text, hits) in masked.items() if hits}


def _without_runs_of_han(batch: Batch) -> tuple[bytes, list[int]]:
    """The classes of all characters, a run of Han characters as one (no shape asks for two), and where each text ends."""
    import numpy as np

    han = batch.kinds == HAN
    han[:-1] &= han[1:]
    if len(han):
        han[-1] = False
    left = ~han
    counts = [np.count_nonzero(left[low:high]) for low, high in zip(batch.starts.tolist(), batch.ends.tolist(), strict=True)]
    return batch.kinds[left].tobytes(), np.cumsum(counts, dtype=np.int64).tolist()


def _texts_with(shape: bytes, kinds: bytes, ends: Sequence[int]) -> Iterator[int]:
    """The texts in which a run of character classes begins."""
    at = kinds.find(shape)
    while at >= 0:
        i = bisect_right(ends, at)
        yield i
        at = kinds.find(shape, ends[i])


def _masked(text: str, names: Sequence[str]) -> tuple[str, Counter[str]]:
    """The text after these rules."""
    hits: Counter[str] = Counter()
    for name in names:
        rule = RULES[name]

        def replacement(m: re.Match[str], rule: Rule = rule, name: str = name) -> str:
            if not rule.confirm(m[1]):
                return m[0]
            hits[name] += 1
            start = m.start(1) - m.start()
            return m[0][:start] + rule.label + m[0][start + len(m[1]) :]

        text = rule.pattern.sub(replacement, text)
    return text, hits


def mask_data(value: Any, names: Sequence[str], hits: Counter[str]) -> Any:
    """The same inside the data of tool calls and tool results: strings, numbers that are personal, and JSON in strings, which stays JSON."""
    if isinstance(value, dict):
        return {k: mask_data(v, names, hits) for k, v in value.items()}
    if isinstance(value, list):
        return [mask_data(v, names, hits) for v in value]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return value
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            inner: Counter[str] = Counter()
            masked = mask_data(json.loads(value), names, inner)
            hits.update(inner)
            return json.dumps(masked, ensure_ascii=False) if inner else value
    text, found = mask(str(value), names)
    hits.update(found)
    return text if found else value
