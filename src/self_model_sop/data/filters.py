"""Filters: one function each, answering None (keep) or a reason.

Repetition follows Gopher (Rae et al. 2021, arXiv:2112.11446, table A1), carried over to characters: Chinese has no spaces, a word is one to two characters,
and statutes repeat their phrases, so thresholds are set where 3,500 laws and a medical textbook lose nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..config import option
from ..errors import missing_extra
from .characters import HAN, HANGUL, KANA, LETTER, PUNCTUATION, SPACE, SYMBOL, classes
from .formats import Message
from .ngrams import hash_windows
from .perplexity import PerplexityConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .batch import Batch
    from .characters import Codes
    from .ngrams import Bits

    Hashes = NDArray[np.uint32]

REFUSALS = (
    "作为一个AI", "作为一个人工智能", "作为AI语言模型", "作为一个语言模型", "作为人工智能", "作为一名AI", "我是一个AI语言模型", "我无法回答这个问题", "我不能回答这个问题",
    "抱歉，我无法", "抱歉，我不能", "对不起，我无法", "对不起，我不能", "As an AI", "as an AI language model", "I'm sorry, but I can't", "I cannot fulfill",
)  # fmt: skip
BOILERPLATE = (
    "页面不存在", "您访问的页面", "请开启JavaScript", "enable JavaScript", "登录后查看", "扫码关注", "点击下载APP", "All Rights Reserved", "版权所有", "ICP备", "免责声明：本站",
    "lorem ipsum", "正在加载", "404 Not Found",
)  # fmt: skip
ABUSIVE = (
    "傻逼", "煞笔", "操你", "草泥马", "他妈的", "滚蛋", "去死", "贱人", "婊子", "狗日", "王八蛋", "脑残", "智障", "废物东西", "不要脸", "死全家", "fuck", "shit", "bitch",
    "asshole",
)  # fmt: skip
NEGATIVE = ("真垃圾", "太垃圾", "垃圾公司", "垃圾产品", "骗子公司", "大骗子", "骗钱", "恶心", "差评", "气死", "坑人", "黑心", "太差", "后悔死", "讨厌死", "烂透", "有病吧")
POSITIVE = ("好评", "满意", "喜欢", "感谢", "谢谢", "很好", "推荐", "优秀", "不错", "开心", "放心", "耐心", "专业", "负责")


@dataclass(frozen=True, kw_only=True)
class RepetitionConfig:
    """`filters.repetition:` shares of a pretraining text, in characters without whitespace."""

    enabled: bool = option(True, "look at repetition at all")
    duplicate_lines: float = option(0.3, "largest share of lines that repeat an earlier one")
    duplicate_line_chars: float = option(0.2, "largest share of characters in such lines")
    top_ngrams: tuple[float, ...] = option((0.2, 0.2, 0.25), "largest share of the most frequent 2-, 3-, 4-gram")
    duplicate_ngrams: dict[str, float] = option(help="n -> largest share of characters in n-grams that occurred before", factory=lambda: {"10": 0.65, "20": 0.55})


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """`filters:` what else decides about a row; those about text quality concern pretraining text only."""

    min_han_ratio: float = option(0.0, "least share of Han characters among the letters; 0: off")
    languages: tuple[str, ...] = option((), "kept languages (zh, en, ja, ...); empty: all. By script; py3langid (extra zh) decides the rest")
    max_symbol_ratio: float = option(0.3, "largest share of symbols (neither letters, digits nor punctuation)")
    max_punctuation_ratio: float = option(0.5, "largest share of punctuation")
    max_bullet_lines: float = option(0.95, "largest share of lines that begin with a bullet, in texts of at least 10 lines")
    max_ellipsis_lines: float = option(0.3, "largest share of lines that end with an ellipsis, in texts of at least 5 lines")
    boilerplate: tuple[str, ...] = option(BOILERPLATE, "a text of fewer than 200 characters with one of these is dropped; empty: off")
    refusals: tuple[str, ...] = option((), "a dialogue whose last answer begins with one of these (within 30 characters) is dropped; `default` stands for a built-in list")
    repetition: RepetitionConfig = option(factory=RepetitionConfig)
    perplexity: PerplexityConfig = option(factory=PerplexityConfig)


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """`parts:` lengths of the parts of a preference row, in characters."""

    max_prompt_chars: int | None = option(None, "rows with a longer prompt (all its turns) are dropped: prompt_too_long")
    min_answer_chars: int | None = option(None, "rows of which one answer is shorter are dropped: answer_too_short")
    max_answer_chars: int | None = option(None, "rows of which one answer is longer are dropped: answer_too_long")


# --- characters ---------------------------------------------------------------------------------------------------------------------------


def counts(codes: Codes) -> list[int]:
    """How many characters of each class (SPACE, HAN, ...), [8]."""
    import numpy as np

    return [int(n) for n in np.bincount(classes(codes), minlength=8)]


def counts_of(batch: Batch) -> list[list[int]]:
    """The same for every text, [texts, 8]."""
    import numpy as np

    found = np.zeros(8 * len(batch.texts), np.int64)
    for low in range(0, len(batch.codes), _TOGETHER):
        found += np.bincount(batch.owners[low : low + _TOGETHER] << np.uint32(3) | batch.kinds[low : low + _TOGETHER], minlength=len(found))
    out: list[list[int]] = found.reshape(-1, 8).tolist()
    return out


def han_ratio(count: Sequence[int], config: FilterConfig) -> str | None:
    """low_han_ratio: too few Han characters among all letters."""
    letters = count[HAN] + count[LETTER] + count[KANA] + count[HANGUL]
    return "low_han_ratio" if config.min_han_ratio and count[HAN] < config.min_han_ratio * letters else None


def symbols(count: Sequence[int], config: FilterConfig) -> str | None:
    """too_many_symbols, too_much_punctuation: tables of numbers, drawings, debris."""
    total = sum(count) - count[SPACE]
    if count[SYMBOL] > config.max_symbol_ratio * total:
        return "too_many_symbols"
    return "too_much_punctuation" if count[PUNCTUATION] > config.max_punctuation_ratio * total else None


def language(text: str, count: Sequence[int], config: FilterConfig) -> str | None:
    """wrong_language: by script where the script decides, else by py3langid."""
    return "wrong_language" if config.languages and language_of(text, count) not in config.languages else None


def language_of(text: str, count: Sequence[int]) -> str:
    """A language code. Kana or Hangul veto Chinese; mostly Han is Chinese (statistical detectors misname a quarter of classical Chinese)."""
    letters = max(1, count[HAN] + count[LETTER] + count[KANA] + count[HANGUL])
    if count[HANGUL] > 0.2 * letters:
        return "ko"
    if count[KANA] > 0.1 * letters:
        return "ja"
    if count[HAN] > 0.3 * letters:
        return "zh"
    try:
        import py3langid
    except ImportError:
        raise missing_extra("py3langid", "zh") from None
    return str(py3langid.classify(text[:2000])[0])


# --- lines and repetition -----------------------------------------------------------------------------------------------------------------

NOTICE = 200  # a notice of a web site has fewer characters
_TOGETHER = 1 << 20  # characters counted together
_LEAST = 100  # characters of a text in which repetition means something
_OWNER_BITS = 10  # of a 32-bit key, for the number of a text among those looked at together
_BULLETS = frozenset("•●○■□◆▪‣·-*–—➢")
_ELLIPSES = ("…", "...", "。。。")


def line_shapes(lines: Sequence[str], config: FilterConfig) -> str | None:
    """bullet_lines, ellipsis_lines: link lists and teasers."""
    if len(lines) >= 10 and sum(x[0] in _BULLETS for x in lines) > config.max_bullet_lines * len(lines):
        return "bullet_lines"
    return "ellipsis_lines" if len(lines) >= 5 and sum(x[-1] in "….。" and x.endswith(_ELLIPSES) for x in lines) > config.max_ellipsis_lines * len(lines) else None


def repetition(codes: Codes, lines: Sequence[str], config: RepetitionConfig, *, ngrams: bool = True) -> str | None:
    """duplicate_lines, top_ngram, duplicate_ngrams. `codes`: [chars]; `lines`: not empty ones, stripped; `ngrams`: whether n-grams may be repeated (`may_repeat`)."""
    if not config.enabled or len(codes) < _LEAST:
        return None
    if len(lines) > 1 and (len(set(lines)) < len(lines)):
        seen: set[str] = set()
        repeated = [x for x in lines if x in seen or seen.add(x)]  # type: ignore[func-returns-value]
        if len(repeated) > config.duplicate_lines * len(lines) or sum(map(len, repeated)) > config.duplicate_line_chars * sum(map(len, lines)):
            return "duplicate_lines"
    if not ngrams:
        return None
    text = codes[classes(codes) != SPACE]
    if len(text) < _LEAST:
        return None
    most = _most_frequent(text)
    grams = _Grams(text)
    for n, limit in enumerate(config.top_ngrams, 2):
        if most * n > limit * len(text) and _most_frequent(grams.of(n)) * n > limit * len(text):  # no n-gram is more frequent than its rarest character
            return "top_ngram"
    for size, limit in config.duplicate_ngrams.items():
        n = int(size)
        if n <= len(text) and _repeated_share(grams, n, len(text), limit) > limit:
            return "duplicate_ngrams"
    return None


def may_repeat(batch: Batch, config: RepetitionConfig) -> Bits:
    """Mask of the texts whose n-grams must be looked at one by one; for all others `repetition` would find none too frequent, [texts].

    Bounds that are quick to count for many texts: no n-gram is more frequent than the fullest of 256 buckets of 2-grams, and no more n-grams are repeated than shorter ones.
    """
    import numpy as np

    out = np.ones(len(batch.texts), bool)
    sizes = [int(n) for n in config.duplicate_ngrams]
    shortest = min(sizes, default=2)
    for low in range(0, len(batch.texts), 1 << _OWNER_BITS):
        high = min(len(batch.texts), low + (1 << _OWNER_BITS))
        inside = slice(int(batch.starts[low]), int(batch.ends[high - 1]))
        solid = batch.kinds[inside] != SPACE
        codes, owner = batch.codes[inside][solid], batch.owners[inside][solid] - np.uint32(low)
        length = np.bincount(owner, minlength=high - low)
        bucket = owner << np.uint32(8) | hash_windows(codes, 2, 32) >> np.uint32(24)
        fullest = np.bincount(bucket, minlength=256 * (high - low)).reshape(-1, 256).max(axis=1)
        key = owner << np.uint32(32 - _OWNER_BITS) | hash_windows(codes, shortest, 32) >> np.uint32(_OWNER_BITS)
        key.sort()
        again = key[1:][key[1:] == key[:-1]]
        repeats = np.bincount(again >> np.uint32(32 - _OWNER_BITS), minlength=high - low)
        fine = np.ones(high - low, bool)
        for n, limit in enumerate(config.top_ngrams, 2):
            fine &= fullest * n <= limit * length
        for size, limit in config.duplicate_ngrams.items():
            fine &= repeats * int(size) <= limit * length
        out[low:high] = (length >= _LEAST) & ~fine
    return out


class _Grams:
    """Hashes of the n-grams at every position, longer ones put together from shorter ones. 32 bits: a collision in a document moves no share."""

    def __init__(self, codes: Hashes) -> None:
        self._known = {1: codes}

    def of(self, n: int) -> Hashes:
        import numpy as np

        if n not in self._known:
            a, b = self.of(n - n // 2), self.of(n // 2)
            k = len(self._known[1]) - n + 1
            h = a[:k] * np.uint32(0x9E3779B1 + 2 * n)
            h ^= h >> np.uint32(15)
            h += b[n - n // 2 : n - n // 2 + k]
            h *= np.uint32(0x85EBCA77)
            h ^= h >> np.uint32(13)
            self._known[n] = h
        return self._known[n]


def _most_frequent(values: NDArray[Any]) -> int:
    import numpy as np

    s = np.sort(values)
    edges = np.flatnonzero(s[1:] != s[:-1])
    return int(np.diff(edges, prepend=-1, append=len(s) - 1).max())


def _repeated_share(grams: _Grams, n: int, length: int, limit: float) -> float:
    """Share of characters inside n-grams that occurred before (overlaps count once); an upper bound where that already passes.

    The bound needs two fast sorts instead of a slow one: a run of repeated n-grams ends where the (n+1)-gram is new, so there are at most
    repeats(n) - repeats(n+1) runs, and a run of k of them covers k + n - 1 characters.
    """
    import numpy as np

    here = grams.of(n)
    repeats = _repeats(here)
    bound = n * repeats / length
    if bound > limit and n < length:
        bound = min(bound, (repeats + (n - 1) * (repeats - _repeats(grams.of(n + 1)))) / length)
    if bound <= limit:
        return bound
    order = np.argsort(here, kind="stable")
    s = here[order]
    again = order[1:][s[1:] == s[:-1]]
    change = np.zeros(length + 1, np.int32)
    np.add.at(change, again, 1)
    np.add.at(change, again + n, -1)
    return float((np.cumsum(change[:-1]) > 0).mean())


def _repeats(values: Hashes) -> int:
    """How many values occurred before."""
    import numpy as np

    s = np.sort(values)
    return int(np.count_nonzero(s[1:] == s[:-1]))


# --- phrases ------------------------------------------------------------------------------------------------------------------------------


def boilerplate(text: str, phrases: Sequence[str]) -> str | None:
    """boilerplate: a short text that is a notice of a web site."""
    return "boilerplate" if len(text) < NOTICE and any(phrase in text for phrase in phrases) else None


def refusal(messages: Sequence[Message], config: FilterConfig) -> str | None:
    """refusal: the last answer begins with a phrase of the list."""
    if not config.refusals:
        return None
    phrases = [p for item in config.refusals for p in (REFUSALS if item == "default" else (item,))]
    head = next((m["content"] for m in reversed(messages) if m["role"] == "assistant"), "")[:60]
    return "refusal" if any(-1 < head.find(p) <= 30 for p in phrases) else None


def sentiment(text: str) -> str | None:
    """negative_sentiment: abuse and angry spam, by a small lexicon.

    polarity = (positive - negative - 2 abusive) / (positive + negative + 2 abusive), counted in words of three short lists; a text is dropped where polarity
    is at most -0.5 and such words make up at least 2 per 100 characters. Illness, death or crime are in no list: clinical and legal text is not "negative".
    """
    abusive, negative, positive = (sum(text.count(w) for w in words) for words in (ABUSIVE, NEGATIVE, POSITIVE))
    against = negative + 2 * abusive
    if not against or 100 * (against + positive) < 2 * len(text):
        return None
    return "negative_sentiment" if (positive - against) / (positive + against) <= -0.5 else None


# --- dialogues and preferences ------------------------------------------------------------------------------------------------------------


def dialogue(messages: Sequence[Message], max_turns: int | None = None) -> str | None:
    """empty_dialogue, system_in_middle, empty_turn, two_users_in_a_row, two_assistants_in_a_row, ends_with_human, no_assistant, too_many_turns."""
    if not messages:
        return "empty_dialogue"
    roles = [m["role"] for m in messages]
    if "system" in roles[1:]:
        return "system_in_middle"
    if any(not m["content"].strip() and not m.get("tool_calls") for m in messages if m["role"] != "system"):
        return "empty_turn"
    for before, after in pairwise(messages):
        if before["role"] == after["role"] and before["role"] in ("user", "assistant") and not before.get("tool_calls"):
            return f"two_{before['role']}s_in_a_row"
    if roles[-1] == "user":
        return "ends_with_human"
    if "assistant" not in roles or "user" not in roles:
        return "no_assistant" if "assistant" not in roles else "no_user"
    return "too_many_turns" if max_turns is not None and roles.count("user") > max_turns else None


def preference(prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message], limits: PartConfig) -> str | None:
    """empty_prompt, empty_chosen, empty_rejected, answer_not_last, chosen_equals_rejected, prompt_too_long, answer_too_short, answer_too_long."""
    for name, part in (("prompt", prompt[-1:]), ("chosen", chosen), ("rejected", rejected)):
        if not any(m["content"].strip() or m.get("tool_calls") for m in part):
            return f"empty_{name}"
    if any(part[-1]["role"] != "assistant" for part in (chosen, rejected)):
        return "answer_not_last"
    said = [[(m["role"], re.sub(r"\s+", "", m["content"]), m.get("tool_calls")) for m in part] for part in (chosen, rejected)]
    if said[0] == said[1]:
        return "chosen_equals_rejected"
    asked, *answers = (sum(len(m["content"]) for m in part) for part in (prompt, chosen, rejected))
    if limits.max_prompt_chars is not None and asked > limits.max_prompt_chars:
        return "prompt_too_long"
    if limits.min_answer_chars is not None and min(answers) < limits.min_answer_chars:
        return "answer_too_short"
    return "answer_too_long" if limits.max_answer_chars is not None and max(answers) > limits.max_answer_chars else None
