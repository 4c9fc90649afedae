"""Numbers and quantities in Chinese text: 三百二十五毫克, 1,250.5, ３５％, 二分之一, 1.2万, 一个半小时, 2小时30分.

Values are exact fractions; a unit carries its dimension and its factor, so that 0.325 g equals 325 mg.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

_DIGITS = dict(zip("零〇一二三四五六七八九", (0, *range(10)), strict=True)) | dict(zip("壹贰叁肆伍陆柒捌玖", range(1, 10), strict=True)) | {"两": 2, "貳": 2, "參": 3, "陸": 6}
_SMALL = {"十": 10, "百": 100, "千": 1000, "拾": 10, "佰": 100, "仟": 1000}
_LARGE = {"万": 10**4, "亿": 10**8, "萬": 10**4, "億": 10**8}
_CHARS = "".join([*_DIGITS, *_SMALL, *_LARGE])

_PLAIN = _CHARS.replace("两", "")
_WHOLE = rf"[{_CHARS}](?:[{_PLAIN}]|(?<=[百千万亿])两(?=[百千万]))*"  # elsewhere 两 is a unit: 三两
_CHINESE = rf"{_WHOLE}(?:点[零〇一二三四五六七八九]+)?"
_ARABIC = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+"
_SIGN = r"(?:(?<![\w.)])[+-]|负|零下)?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})\s*(?:"
    rf"(?P<of>{_WHOLE}|\d+)分之(?P<share>{_CHINESE}|{_ARABIC})"
    rf"|(?P<arabic>{_ARABIC})(?:\s*/\s*(?P<under>\d{{1,20}}(?:\.\d{{1,20}})?)(?![\d.]))?(?P<scale>[十百千万亿萬億]{{0,2}})"
    rf"|(?P<half>半(?=[^\w]|$|个|小时|天|年|月|斤|两|片|米|公|升|数|以|，|。)|一半)"
    rf"|(?P<chinese>{_CHINESE})"
    r")",
)

_Dimension = tuple[tuple[str, int], ...]


# dimension: units = how many of the dimension's own; ...
_TABLE = """
mass: 微克 μg ug mcg = 1/1000000; 毫克 mg = 1/1000; 克 g = 1; 两 = 50; 斤 = 500; 千克 公斤 kg = 1000; 吨 t = 1000000
volume: 微升 μl = 1/1000000; 毫升 ml cc = 1/1000; 分升 dl = 1/10; 升 l = 1; 立方米 m3 = 1000
length: 微米 μm = 1/1000000; 毫米 mm = 1/1000; 厘米 公分 cm = 1/100; 分米 dm = 1/10; 米 m = 1; 千米 公里 km = 1000
area: 平方厘米 cm2 = 1/10000; 平方米 平米 m2 = 1; 公顷 = 10000; 平方公里 平方千米 km2 = 1000000
time: 毫秒 ms = 1/1000; 秒 秒钟 s = 1; 分钟 min = 60; 刻钟 = 900; 小时 钟头 时 h = 3600; 天 日 d = 86400; 周 星期 礼拜 = 604800
months: 月 个月 = 1; 季度 = 3; 年 周年 = 12
money: 角 毛 = 1/10; 元 块 块钱 人民币 = 1
energy: 焦 焦耳 j = 1; 千焦 kj = 1000; 卡 cal = 4184/1000; 千卡 大卡 kcal = 4184
pressure: 帕 pa = 1; 毫米汞柱 mmhg = 133322/1000; 千帕 kpa = 1000; 兆帕 mpa = 1000000
amount: 微摩尔 μmol umol = 1/1000000; 毫摩尔 mmol = 1/1000; 摩尔 mol = 1
degrees: 度 摄氏度 °c ℃ ° = 1
points: 分 = 1
count: 国际单位 iu = 1
"""


def _units() -> dict[str, tuple[str, Fraction]]:
    """Text of a unit -> (dimension, factor to the unit that the dimension counts in)."""
    found: dict[str, tuple[str, Fraction]] = {}
    for line in _TABLE.strip().splitlines():
        dimension, _, entries = line.partition(": ")
        for entry in entries.split("; "):
            names, _, factor = entry.partition(" = ")
            found |= {name: (dimension, Fraction(factor)) for name in names.split()}
    return found


_UNITS = _units()
_WORDS = re.compile("|".join(re.escape(u) + (r"(?![a-z])" if u.isascii() else "") for u in sorted(_UNITS, key=len, reverse=True)), re.IGNORECASE)
_COUNTERS = re.compile(r"(?:[个只名位条件本张次人例种项套台辆片粒颗枚支瓶盒岁号倍步页]|人次)")
_SHARES = {**dict.fromkeys(("时", "小时", "钟头"), ("time", Fraction(60))), **dict.fromkeys(("元", "角", "块", "毛"), ("money", Fraction(1, 100)))}  # what 分 is behind them
_FOLLOWS = re.compile(r"\s|[^\w]|$")
_ALONE = re.compile(r"(?:[是为得约共有第负=:：(（、,，]|等于|大概|结果)\s*$")


@dataclass(frozen=True)
class Quantity:
    """A number with its unit, as found at `start:end` of the folded text.

    `value` is in the unit that the dimension counts in (grams, litres, metres, seconds, months, yuan); `number` is as written. `dimension` is empty for a bare number
    and for counted things (5 个); `percent` marks 35 %, whose value is 0.35.
    """

    value: Fraction
    number: Fraction
    dimension: _Dimension = ()
    factor: Fraction = Fraction(1)
    percent: bool = False
    start: int = 0
    end: int = 0


def fold(text: str) -> str:
    """Full-width and compatibility characters in their plain form (NFKC), exponents kept apart from the digits before them; the minus signs become `-`."""
    text = re.sub(r"[²³]", lambda m: {"²": "2", "³": "3"}[m[0]], re.sub(r"(?<=\d)([⁰¹²³⁴-⁹]+)", r"^\1", text))
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("µ", "μ")
    return re.sub(r"[−–—](?=\s*\d)", "-", text).replace("，", ",").replace("÷", "/")


def chinese_integer(text: str) -> int | None:
    """The number that numerals spell (三百二十五, 一万五, 二〇二四), or None where they spell none."""
    if not text or len(text) > 100 or any(c not in _CHARS for c in text):
        return None
    if all(c in _DIGITS for c in text):
        if len(text) == 2 and "零" not in text and "〇" not in text and _DIGITS[text[1]] - _DIGITS[text[0]] == 1:
            return None  # 两三, 七八: about so many
        return int("".join(str(_DIGITS[c]) for c in text))
    total = section = 0
    digit: int | None = None
    unit = 1  # of the last magnitude, for the short form 一万五
    for i, char in enumerate(text):
        if char in _DIGITS:
            if digit not in (None, 0):
                return None
            digit = _DIGITS[char]
            if digit == 0:
                unit = 10
        elif char in _SMALL:
            if digit is None:
                if char not in "十拾" or (section and text[i - 1] not in "零〇"):
                    return None
                digit = 1
            section += digit * _SMALL[char]
            unit, digit = _SMALL[char], None
        else:
            if digit is None and not section and not total:
                return None
            whole = section + (digit or 0)
            if _LARGE[char] == 10**8:
                total, unit = (total + whole) * 10**8, 10**8
            elif not whole:
                total, unit = total * 10**4, 10**4
            else:
                total, unit = total + whole * 10**4, 10**4
            section, digit = 0, None
    if digit is not None:
        section += digit * (unit // 10 if unit > 10 else 1)
    return total + section


def quantities(text: str, *, folded: bool = False) -> list[Quantity]:
    """Every quantity of a text, in order; adjacent ones of one dimension, the larger unit first (2小时30分), are one."""
    text = text if folded else fold(text)
    out: list[Quantity] = []
    previous = ""  # the unit text of the last one
    for found, unit in _found(text):
        last = out[-1] if out else None
        gap = text[last.end : found.start] if last else " "
        if last and not gap.strip("零又 ") and "\n" not in gap and last.dimension:
            special = _SHARES.get(previous) if unit == "分" else None
            if special:
                found = _of(found, *special)
            if found.dimension == last.dimension and len(found.dimension) == 1 and found.factor < last.factor and not last.percent:
                out[-1] = Quantity(last.value + found.value, last.number, last.dimension, last.factor, False, last.start, found.end)
                previous = unit
                continue
        out.append(found)
        previous = unit
    return out


def _found(text: str) -> Iterator[tuple[Quantity, str]]:
    at = 0
    while match := _NUMBER.search(text, at):
        at = max(match.end(), match.start() + 1)
        number = _value(match)
        if number is None:
            continue
        start, end = match.start() + len(match[0]) - len(match[0].lstrip()), match.end()
        mixed = re.compile(rf"\s*又\s*(?:([{_CHARS}\d]+)分之([{_CHARS}\d]+)|(\d+)/(\d+))").match(text, end)
        if mixed:
            below, above = (mixed[1], mixed[2]) if mixed[1] else (mixed[4], mixed[3])
            part = _fraction(above, below)
            if part is not None:
                number, end = number + part, mixed.end()
        if match["arabic"] and match["scale"]:
            number, end = _smaller(text, number, match["scale"], end)
        if match["chinese"] and not _stands(text, match):
            continue
        found, unit, end = _with_unit(text, number, start, end)
        yield found, unit
        at = max(end, at)


_BELOW = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)(千万|百万|十万|万|千|百)")


def _smaller(text: str, number: Fraction, scale: str, end: int) -> tuple[Fraction, int]:
    """1亿2000万, 3万5千: what is added right behind a number with a magnitude."""
    while part := _BELOW.match(text, end):
        if _magnitude(part[2]) >= _magnitude(scale):
            break
        number, scale, end = number + Fraction(part[1]) * _magnitude(part[2]), part[2], part.end()
    return number, end


def _magnitude(scale: str) -> int:
    product = 1
    for char in scale:
        product *= {**_SMALL, **_LARGE}[char]
    return product


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["sign"] in ("-", "负", "零下") else 1
    if match["of"]:
        number = _fraction(match["share"], match["of"])
    elif match["arabic"]:
        number = Fraction(match["arabic"].replace(",", "")) if len(match["arabic"]) <= 100 and not re.search(r"[eE][+-]?\d{4}", match["arabic"]) else None
        if number is not None and match["under"]:
            number = number / Fraction(match["under"]) if Fraction(match["under"]) else None
        number = number * _magnitude(match["scale"] or "") if number is not None else None
    elif match["half"]:
        number = Fraction(1, 2)
    else:
        number = _numeral(match["chinese"])
    return None if number is None else sign * number


def _fraction(above: str, below: str) -> Fraction | None:
    top, bottom = _numeral(above), Fraction(10) ** {"百": 2, "千": 3, "万": 4}[below] if below in ("百", "千", "万") else _numeral(below)
    return top / bottom if top is not None and bottom else None


def _numeral(text: str) -> Fraction | None:
    """A number in Chinese or Arabic digits."""
    if re.fullmatch(_ARABIC, text):
        if len(text) > 100:
            return None
        return Fraction(text.replace(",", ""))
    whole, _, part = text.partition("点")
    number = chinese_integer(whole)
    if number is None:
        return None
    return Fraction(number) + (Fraction(int("".join(str(_DIGITS[c]) for c in part)), 10 ** len(part)) if part else 0)


def _stands(text: str, match: re.Match[str]) -> bool:
    """Whether a single Chinese numeral is a number here, and no part of a word (统一, 一般, 十分重要)."""
    word = match["chinese"]
    if len(word) > 1:
        return True
    after = text[match.end() : match.end() + 3]
    if word == "十" and after.startswith("分") and not after.startswith(("分钟", "分之")):
        return False
    if _FOLLOWS.match(after) or after.startswith(("分之", "又")):
        before = text[max(match.start() - 6, 0) : match.start()]
        return not before[-1:].isalpha() or bool(_ALONE.search(before)) or not after.strip()
    return bool(_WORDS.match(after) or _COUNTERS.match(after) or after.startswith("半"))


def _with_unit(text: str, number: Fraction, start: int, end: int) -> tuple[Quantity, str, int]:
    """The quantity whose unit follows at `end`; with 个 and 半 (一个半小时, 两年半)."""
    percent = re.compile(r"\s*(%|‰|个百分点)").match(text, end)
    if percent:
        value = number / (1000 if percent[1] == "‰" else 100)
        return Quantity(value, number, (), Fraction(1), True, start, percent.end()), "%", percent.end()
    if re.compile(r"(百|千|万)分之").match(text, start):
        return Quantity(number, number * 100, (), Fraction(1), True, start, end), "%", end
    middle = re.compile(r"\s*个?半(?=个|小时|钟头|月|天|年)").match(text, end)
    if middle:
        number, end = number + Fraction(1, 2), middle.end()
    found = re.compile(r"\s*(?:多|余|来)?\s*(?:个(?=小时|钟头|月|星期|礼拜|季度))?").match(text, end)
    at = found.end() if found else end
    unit = _WORDS.match(text, at)
    if not unit:
        counter = _COUNTERS.match(text, at)
        end = counter.end() if counter else end
        return Quantity(number, number, (), Fraction(1), False, start, end), "", end
    dimension, factor = _UNITS[unit[0].lower()]
    parts: dict[str, int] = {dimension: 1}
    name, end = unit[0], unit.end()
    while below := re.compile(r"\s*[/每]\s*").match(text, end):
        other = _WORDS.match(text, below.end())
        counter = _COUNTERS.match(text, below.end())
        if other:
            kind, by = _UNITS[other[0].lower()]
            parts[f"per {kind}"] = -1  # mg/kg stays a unit of its own
            factor, end = factor / by, other.end()
        elif counter:
            end = counter.end()
        else:
            break
    if text.startswith("半", end) and not _WORDS.match(text, end + 1) and not text.startswith("个", end + 1):
        number, end = number + Fraction(1, 2), end + 1
    quantity = Quantity(number * factor, number, tuple(sorted((k, v) for k, v in parts.items() if v)), factor, False, start, end)
    return quantity, name, end


def _of(found: Quantity, dimension: str, factor: Fraction) -> Quantity:
    return Quantity(found.number * factor, found.number, ((dimension, 1),), factor, False, found.start, found.end)
