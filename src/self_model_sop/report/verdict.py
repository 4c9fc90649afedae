"""What was gained, what was lost, and what it cost: the last model against the first, judged by intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .gather import Story
from .words import Text, device_name, duration, join, number, percent, portion, span

Kind = Literal["gain", "loss", "same"]
_SAME = 0.001  # a change without an interval that is smaller than this is none


@dataclass(frozen=True)
class Finding:
    """One number with its words. `value` is shown large, `detail` small; `phrase` goes on from "the new model ..."."""

    kind: Kind
    value: str
    what: Text
    detail: Text
    phrase: Text


class Note(NamedTuple):
    """A remark without a figure of its own; `bad` is one to look at."""

    text: Text
    bad: bool = False


@dataclass(frozen=True)
class Verdict:
    """The story in three parts."""

    gains: list[Finding]
    losses: list[Finding]
    same: list[Finding]
    costs: list[tuple[str | Text, Text]]
    notes: list[Note]


def headline(story: Story, verdict: Verdict) -> Text:
    """The run in three sentences."""
    gains, losses = (_spoken([f.phrase for f in found[:3]]) for found in (verdict.gains, verdict.losses))
    first = Text("The new model ", "新模型") + join(gains) + Text(". ", "。") if gains else Text("No measured gain. ", "没有测出收益。")
    if losses:
        second = Text("It ", "但") + join(losses) + Text(". ", "。")
    else:
        second = Text("Nothing measured was lost. ", "没有测出损失。") if gains or verdict.same else Text("", "")
    return first + second + Text("It took ", "用时 ") + duration(story.seconds) + Text(".", "。")


def _spoken(phrases: list[Text]) -> list[Text]:
    """"predicts A better, predicts B better" says its verb once."""
    verb = "predicts "
    return [Text(p.en.removeprefix(verb), p.zh) if i and phrases[i - 1].en.startswith(verb) else p for i, p in enumerate(phrases)]


def judge(story: Story) -> Verdict:
    """Sort every measured change; what an interval that holds zero cannot tell from nothing counts as unchanged."""
    found = [*_tokenizer(story), *_texts(story), *_exams(story), *_trained(story)]
    kinds = {kind: [f for f in found if f.kind == kind] for kind in ("gain", "loss", "same")}
    return Verdict(kinds["gain"], kinds["loss"], kinds["same"], list(_costs(story)), list(_notes(story)))


def _tokenizer(story: Story) -> Iterator[Finding]:
    piece = story.last("tokenizer.evaluate")
    if piece is None:
        return
    s = piece.stats
    ratio = f" {s['tokens_per_char_before']:.2f} → {s['tokens_per_char_after']:.2f}"
    detail = Text("tokens per character", "每字词元数") + ratio
    less = s["reduction"] >= 0
    saved = portion(abs(s["reduction"]))
    phrase = Text(f"reads the domain in {saved} {'fewer' if less else 'more'} tokens", f"读领域文本{'少' if less else '多'}用 {saved} 的词元")
    yield Finding(_kind(-s["reduction"], None, None), percent(-s["reduction"]), Text("tokens for held-out domain text", "留出领域文本所需词元"), detail, phrase)


def _texts(story: Story) -> Iterator[Finding]:
    piece = story.comparison
    if piece is None or len(piece.stats["models"]) < 2:
        return
    stats = piece.stats
    first, last = _ends(stats)
    for name, part in stats["bits"][last].items():
        before, against = stats["bits"][first][name], _against(part, stats["bits"][first][name])
        detail = _detail(before["bits_per_byte"], part["bits_per_byte"], against)
        what = Text(f"bits per byte on “{name}” text", f"“{name}”文本每字节比特数")
        kind = _kind(against["change"], against.get("low"), against.get("high"))
        yield Finding(kind, percent(against["change"]), what, detail, _predicts(against["change"], Text(f"“{name}” text", f"“{name}”文本")))
    if last in (stats.get("sft") or {}):
        before, part = stats["sft"][first], stats["sft"][last]
        against = _against(part, before)
        what = Text("bits per byte of held-out answers", "留出回答每字节比特数")
        phrase = _predicts(against["change"], Text("held-out answers", "留出回答"))
        yield Finding(_kind(against["change"], None, None), percent(against["change"]), what, _detail(before["bits_per_byte"], part["bits_per_byte"], against), phrase)


def _predicts(change: float, what: Text) -> Text:
    better = change < 0
    much = portion(abs(change))
    return Text(f"predicts {what.en} {much} {'better' if better else 'worse'}", f"对{what.zh}的预测{'改善' if better else '变差'} {much}")


def _detail(before: float, after: float, against: dict[str, Any]) -> Text:
    interval = span(against.get("low"), against.get("high"))
    return Text(f"{before:.3f} → {after:.3f}", f"{before:.3f} → {after:.3f}") + (Text("; ", "；") + interval if interval.en else "")


def _against(part: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    return dict(part.get("against_first") or {"change": part["bits_per_byte"] / first["bits_per_byte"] - 1})


def _exams(story: Story) -> Iterator[Finding]:
    exams = story.exams
    if len(exams) < 2:
        return
    first, last = next(iter(exams)), list(exams)[-1]
    for name, part in exams[last].items():
        against = part.get("against_first")
        if not against or name not in exams[first]:
            continue
        better = against["difference"] if against["low"] > 0 or against["high"] < 0 else 0.0
        shown = f"{100 * against['difference']:+.1f}".replace("-", "−")
        interval = span(against["low"], against["high"])
        ends = f"{portion(exams[first][name]['accuracy'])} → {portion(part['accuracy'])}"
        detail = Text(f"{ends} of {part['total']:,}; ", f"{part['total']:,} 题，{ends}；") + interval
        what = Text(f"points right on “{name}” questions", f"个百分点：“{name}”选择题正确率")
        more = "more" if better > 0 else "fewer"
        phrase = Text(f"gets {abs(100 * better):.1f} points {more} of “{name}” right", f"“{name}”选择题正确率{'提高' if better > 0 else '下降'} {abs(100 * better):.1f} 个百分点")
        yield Finding("gain" if better > 0 else "loss" if better < 0 else "same", shown, what, detail, phrase)


def _trained(story: Story) -> Iterator[Finding]:
    """Held-out loss of a training stage, where no comparison covers it."""
    if story.comparison is not None:
        return
    for piece in story.trainings:
        before, after = piece.stats.get("eval_loss_before"), piece.stats.get("eval_loss_after")
        if before and after is not None:
            change = after / before - 1
            what, ends = Text(f"held-out loss ({piece.id})", f"留出集损失（{piece.id}）"), f"{before:.3f} → {after:.3f}"
            detail = Text(ends, ends)
            yield Finding(_kind(change, None, None), percent(change), what, detail, _predicts(change, Text("held-out rows", "留出数据")))


def _kind(change: float, low: float | None, high: float | None) -> Kind:
    """Less is better."""
    if low is not None and high is not None and low <= 0 <= high:
        return "same"
    return "same" if abs(change) < _SAME else "gain" if change < 0 else "loss"


def _ends(stats: dict[str, Any]) -> tuple[str, str]:
    names = list(stats["models"])
    return names[0], names[-1]


def _costs(story: Story) -> Iterator[tuple[str | Text, Text]]:
    device = story.trainings[-1].manifest["device"] if story.trainings else story.pieces[-1].manifest["device"]
    where = Text("of work, on ", "总用时，") + device_name(device)
    yield duration(story.seconds), where
    if story.tokens:
        seconds = sum(float(p.stats.get("train_seconds") or 0) for p in story.trainings)
        rate = f", {story.tokens / seconds:,.0f}/s" if seconds else ""
        yield number(story.tokens), Text("tokens trained on", "训练词元") + rate
    if story.peak_mib:
        yield f"{story.peak_mib / 1024:.1f} GiB", Text("peak memory", "内存峰值")
    piece = story.comparison
    if piece is not None:
        first, last = (piece.stats["models"][name] for name in _ends(piece.stats))
        if last["vocabulary"] != first["vocabulary"]:
            more = last["parameters"] - first["parameters"]
            yield f"+{last['vocabulary'] - first['vocabulary']:,}", Text(f"tokens in the vocabulary (+{number(more)} parameters)", f"个新词元（参数 +{number(more)}）")


def _notes(story: Story) -> Iterator[Note]:
    """What did not change although it might have, and whether the figures can be trusted."""
    piece = story.last("tokenizer.evaluate")
    if piece is not None:
        changed = piece.stats["changed_regression_lines"]
        lines = sum(changed.get(k, 0) for k in ("english", "code"))
        if not lines:
            yield Note(Text("Every line of English and code encodes exactly as before", "英文与代码的编码与之前完全一致"))
        else:
            yield Note(Text(f"{lines} lines of English or code encode differently", f"{lines} 行英文或代码的编码有变化"), bad=True)
    compared = story.comparison
    if compared is None:
        return
    for entry in compared.stats.get("guard") or []:
        if entry["model"] == _ends(compared.stats)[1]:
            if entry["broken"]:
                broken = Text(f"Forgetting guard broken on “{entry['set']}”: more than {entry['limit_shown']}", f"遗忘警戒线被突破：“{entry['set']}”超过 {entry['limit_shown']}")
                yield Note(broken, bad=True)
            else:
                held = Text(f"Forgetting guard held on “{entry['set']}” (limit {entry['limit_shown']})", f"遗忘警戒线未被突破：“{entry['set']}”（上限 {entry['limit_shown']}）")
                yield Note(held)
    contamination = compared.stats.get("contamination") or {}
    if contamination:
        found, items = sum(p["found"] for p in contamination.values()), sum(p["items"] for p in contamination.values())
        shared = Text(f"{found} of {items} evaluation items overlap the training data (13 letters in a row)", f"{items} 个评测样本中有 {found} 个与训练数据重合（连续 13 字）")
        yield Note(shared, bad=found > 0)
