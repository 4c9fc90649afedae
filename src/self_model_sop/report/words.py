"""Text in two languages, escaped: every word of the page goes through here."""

from __future__ import annotations

from html import escape
from typing import NamedTuple


class Text(NamedTuple):
    """The same in English and in Chinese."""

    en: str
    zh: str

    def __add__(self, other: object) -> Text:
        if isinstance(other, Text):
            return Text(self.en + other.en, self.zh + other.zh)
        return Text(self.en + str(other), self.zh + str(other))


def both(text: Text | str) -> str:
    """HTML: both languages, of which the page shows one; a plain string stands for both."""
    if isinstance(text, str):
        return escape(text)
    if text.en == text.zh:
        return escape(text.en)
    return f'<span class="en" lang="en">{escape(text.en)}</span><span class="zh" lang="zh">{escape(text.zh)}</span>'


def join(parts: list[Text]) -> Text:
    """A list within a sentence."""
    if len(parts) < 2:
        return parts[0] if parts else Text("", "")
    return Text(", ".join(p.en for p in parts[:-1]) + " and " + parts[-1].en, "、".join(p.zh for p in parts[:-1]) + "和" + parts[-1].zh)


def duration(seconds: float) -> Text:
    """`15 min`, `2 h 10 min`."""
    if seconds < 60:
        shown = f"{seconds:.0f}" if seconds >= 1 else "<1"
        return Text(f"{shown} s", f"{shown} 秒")
    minutes = round(seconds / 60)
    if minutes < 60:
        return Text(f"{minutes} min", f"{minutes} 分钟")
    return Text(f"{minutes // 60} h {minutes % 60:02d} min", f"{minutes // 60} 小时 {minutes % 60:02d} 分")


def number(value: float) -> str:
    """`71,502`, `1.2 M`."""
    if abs(value) >= 1e9:
        return f"{value / 1e9:.2f} B"
    return f"{value / 1e6:.1f} M" if abs(value) >= 1e6 else f"{value:,.0f}"


def percent(share: float) -> str:
    """`−6.6 %` with a sign; a true minus."""
    return f"{100 * share:+.1f}\u00a0%".replace("-", "−")


def portion(share: float) -> str:
    """`49.9 %`, without a sign."""
    return f"{100 * share:.1f}\u00a0%"


def span(low: float | None, high: float | None) -> Text:
    """`95 % interval −7.1 to −4.6`, of shares, in percent; empty where there is none."""
    if low is None or high is None:
        return Text("", "")
    a, b = (f"{100 * v:+.1f}".replace("-", "−") for v in (low, high))
    return Text(f"95\u00a0% interval {a} to {b}", f"95\u00a0% 区间 {a} 至 {b}")


def size(count: float) -> str:
    """`811 KB`, `518 MB` (powers of 1000)."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


STAGE_NAMES = {
    "data.model": Text("Base model", "基础模型"), "data.fetch": Text("Fetch", "获取数据"), "data.process": Text("Clean and split", "清洗与切分"),
    "data.preference": Text("Preference pairs", "偏好数据"), "tokenizer.baseline": Text("Record the base tokenizer", "记录基础分词器"),
    "tokenizer.corpus": Text("Tokenizer corpus", "分词语料"), "tokenizer.train": Text("Train domain tokenizer", "训练领域分词器"),
    "tokenizer.select": Text("Select new tokens", "挑选新词元"), "tokenizer.extend": Text("Extend the tokenizer", "扩展分词器"),
    "tokenizer.resize": Text("Grow the embeddings", "扩展词向量"), "tokenizer.evaluate": Text("Measure the tokenizer", "评测分词器"),
    "train.pretrain": Text("Continued pretraining", "继续预训练"), "train.sft": Text("Fine-tuning", "指令微调"), "train.merge": Text("Merge the adapter", "合并适配器"),
    "train.reward": Text("Reward model", "奖励模型"), "train.dpo": Text("DPO", "DPO 对齐"), "train.grpo": Text("GRPO", "GRPO 强化学习"), "train.ppo": Text("PPO", "PPO 强化学习"),
    "eval.compare": Text("Compare the models", "模型对比"), "eval.mcq": Text("Multiple choice", "选择题评测"),
}  # fmt: skip

REASONS = {
    "duplicates": Text("exact duplicates", "完全重复"), "exact_duplicate": Text("exact duplicates", "完全重复"), "near_duplicates": Text("near duplicates", "近似重复"),
    "near_duplicate": Text("near duplicates", "近似重复"), "too_short": Text("too short", "过短"), "too_long": Text("too long", "过长"), "empty_turn": Text("empty turn", "空轮次"),
    "empty_answer": Text("empty answer", "回答为空"), "ends_with_human": Text("ends with the user", "以用户结尾"), "ends_with_user": Text("ends with the user", "以用户结尾"),
    "chosen_equals_rejected": Text("chosen equals rejected", "正负样本相同"), "bad_json": Text("broken line", "损坏的行"), "quarantined": Text("quarantined", "隔离"),
    "contaminated": Text("contains evaluation items", "含评测题目"), "language": Text("other language", "其他语言"), "repetition": Text("repetitive", "内容重复"),
}  # fmt: skip

SETS = {"pretrain": Text("pretraining text", "预训练文本"), "finetune": Text("conversations", "对话"), "reward": Text("preference pairs", "偏好数据")}


def device_name(device: str) -> Text:
    """`cpu: x86_64`, `cuda: NVIDIA H200 x 1` in words."""
    kind, _, rest = device.partition(": ")
    return Text(f"a CPU ({rest})", f"CPU（{rest}）") if kind == "cpu" else Text(rest, rest)


def stage_name(stage: str) -> Text:
    """What a stage is called in a report."""
    return STAGE_NAMES.get(stage, Text(stage, stage))


def reason(code: str) -> Text:
    """Why a row was left out."""
    plain = code.replace("_", " ")
    return REASONS.get(code, Text(plain, plain))
