"""The sections of the report; each is empty where the run has nothing for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ..eval.table import interval, points
from ..redact import redact
from ..train.alignment import interval as interval_of_pairs
from ..yaml_source import display
from . import charts, tokens
from .charts import Series, Spot
from .gather import Piece, Story
from .words import SETS, Text, both, device_name, duration, number, percent, portion, reason, size, stage_name

_COUNTED = ("distinct_1", "distinct_2", "repetition", "chars", "stopped", "refused", "overlap")
_COUNT_NAMES = {
    "distinct_1": Text("distinct-1", "distinct-1"), "distinct_2": Text("distinct-2", "distinct-2"), "repetition": Text("repetition", "重复率"), "chars": Text("characters", "字数"),
    "stopped": Text("ended by itself", "自然结束"), "refused": Text("declined", "拒答"), "overlap": Text("overlap with reference", "与参考重合"),
}  # fmt: skip


class Section(NamedTuple):
    """A part of the page with its place in the menu."""

    id: str
    title: Text
    lead: Text
    body: str


def all_sections(story: Story, samples: int) -> Iterator[Section]:
    """In the order of the page."""
    yield data(story)
    yield tokenizer(story, samples)
    yield training(story)
    yield evaluation(story)
    yield answers(story)
    yield parity(story)
    yield cost(story)
    yield lineage(story)
    yield reproduce(story)


def panel(*parts: str) -> str:
    """A box around something; nothing around nothing."""
    return f'<div class="panel">{"".join(parts)}</div>' if any(parts) else ""


def heading(text: Text, more: str = "") -> str:
    """The first line of a panel."""
    return f'<h3 class="first">{both(text)}{more}</h3>'


def table(header: Sequence[Text | str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """Cells are HTML, the header is text; the first `words` columns hold words, the others numbers."""
    if not rows:
        return ""
    side = ['class="l"' if i < words else "" for i in range(len(header))]
    head = "".join(f"<th {c}>{both(h)}</th>" for c, h in zip(side, header, strict=True))
    body = "".join("<tr>" + "".join(f"<td {c}>{cell}</td>" for c, cell in zip(side, row, strict=True)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# --- data ---------------------------------------------------------------------------------------------------------------------------------


def data(story: Story) -> Section:
    """The funnel of each set."""
    rows: dict[str, Mapping[str, Any]] = {}
    masked: dict[str, int] = {}
    for piece in story.of("data.process"):
        rows |= piece.stats["sets"]
        for kind, n in (piece.stats.get("pii") or {}).items():
            masked[kind] = masked.get(kind, 0) + n
    if not rows:
        return Section("data", Text("Data", "数据"), Text("", ""), "")
    rows = {name: rows[name] for name in sorted(rows, key=lambda n: [*SETS, n].index(n))}
    total, kept = sum(s["total"] for s in rows.values()), sum(s["kept"] for s in rows.values())
    lead = Text(
        f"{total:,} rows came in, {kept:,} were kept. Every other row is accounted for: rows = kept + dropped + quarantined, in each set.",
        f"读入 {total:,} 行，保留 {kept:,} 行。其余每一行都有去处：总数 = 保留 + 丢弃 + 隔离。",
    )
    kinds = (("t-train", Text("training", "训练")), ("t-val", Text("held out", "留出验证")), ("t-drop", Text("dropped", "丢弃")), ("t-quar", Text("quarantined", "隔离")))
    legend = "".join(f'<span><i class="{c}"></i>{both(t)}</span>' for c, t in kinds)
    personal = Text(f"personal data masked: {sum(masked.values())} ({', '.join(masked)})", f"已遮盖个人信息 {sum(masked.values())} 处（{'、'.join(masked)}）")
    more = f"<span>{both(personal)}</span>" if masked else ""
    head = f"<span></span><span></span><small>{both(Text('rows → training + held out', '读入 → 训练 + 留出'))}</small>"
    body = panel(f'<div class="funnel">{head}{"".join(_funnel(n, s) for n, s in rows.items())}</div><div class="chips">{legend}{more}</div>') + panel(_reasons(rows))
    return Section("data", Text("Data", "数据"), lead, body)


def _funnel(name: str, s: Mapping[str, Any]) -> str:
    dropped, quarantined = sum(s["dropped"].values()), sum(s["quarantined"].values())
    parts = (("t-train", s["train"]), ("t-val", s["validation"]), ("t-drop", dropped), ("t-quar", quarantined))
    whole = sum(n for _, n in parts) or 1
    track = "".join(f'<i class="{c}" style="width:{100 * n / whole:.2f}%" data-tip="{n:,}"></i>' for c, n in parts if n)
    shown = f"{s['total']:,} → {s['train']:,} + {s['validation']:,}"
    return f'<b>{both(SETS.get(name, Text(name, name)))}</b><div class="track">{track}</div><span>{shown}</span>'


def _reasons(rows: Mapping[str, Mapping[str, Any]]) -> str:
    codes = sorted({r for s in rows.values() for part in ("dropped", "quarantined") for r, n in s[part].items() if n})
    body = [[both(reason(c)), *(f"{n:,}" if (n := s["dropped"].get(c, 0) + s["quarantined"].get(c, 0)) else "·" for s in rows.values())] for c in codes]
    return table([Text("left out because", "未保留的原因"), *(SETS.get(n, Text(n, n)) for n in rows)], body)


# --- tokenizer ----------------------------------------------------------------------------------------------------------------------------


def tokenizer(story: Story, samples: int) -> Section:
    """Before and after, in numbers and in colour."""
    piece = story.last("tokenizer.evaluate")
    title = Text("Tokenizer", "分词器")
    if piece is None:
        return Section("tokenizer", title, Text("", ""), "")
    s, new = piece.stats, piece.stats.get("new_tokens") or {}
    used = f"{new.get('used_on_test', 0):,}"
    lead = Text(
        f"{new.get('count', 0):,} new tokens were appended, {used} of them are used on held-out text. Old tokens keep their ids; text without them encodes as before.",
        f"追加了 {new.get('count', 0):,} 个新词元，其中 {used} 个在留出文本中被用到。旧词元编号不变；不含新词元的文本编码与之前相同。",
    )
    shown, first_new = tokens.samples(story, samples)
    legend = Text(
        "A box is a token; underlined ones are new. A small number: so many tokens share one character.",
        "每个色块是一个词元，带下划线的是新词元。小数字表示几个词元合成一个字。",
    )
    pictures = panel(*(tokens.picture(x, first_new) for x in shown), f'<div class="chips">{both(legend)}</div>') if shown else ""
    report = piece.read("report.json") or {}
    return Section("tokenizer", title, lead, pictures + f'<div class="two">{panel(_sources(report, s))}{panel(_curve(report))}</div>')


def _sources(report: Mapping[str, Any], stats: Mapping[str, Any]) -> str:
    rows = []
    for name, part in [*report.get("sources", {}).items(), ("all", report.get("all"))]:
        if part:
            label = both(SETS.get(name, Text("all", "全部") if name == "all" else Text(name, name)))
            rows.append([label, f"{part['before']['tokens_per_char']:.3f}", f"{part['after']['tokens_per_char']:.3f}", f'<b class="down">{percent(-part["reduction"])}</b>'])
    changed = {k: n for k, n in stats["changed_regression_lines"].items() if n}
    kept = [k for k, n in stats["changed_regression_lines"].items() if not n]
    lines = Text(f"Lines that encode as before, all of them: {', '.join(kept)}.", f"全部行编码不变：{'、'.join(kept)}。")
    lines = lines + (Text(f" Shorter now, for they hold Han characters: {', '.join(changed)}.", f"含汉字而变短：{'、'.join(changed)}。") if changed else "")
    return heading(Text('Tokens per character', '每字词元数')) + table(["", Text("before", "之前"), Text("after", "之后"), Text("change", "变化")], rows) + (
        f'<div class="chips">{both(lines)}</div>'
    )


def _curve(report: Mapping[str, Any]) -> str:
    curve = [(0.0, 0.0), *((float(r["tokens"]), float(r["reduction"])) for r in report.get("curve") or ())]
    if len(curve) < 3:
        return ""
    head = Text("What fewer new tokens would give", "更少的新词元能达到多少")
    chart = charts.lines([Series(head, charts.thinned(curve, 60), 5)], x=Text("new tokens", "新词元数"), y=Text("tokens saved", "节省的词元"), percent=True, height=262)
    return heading(head) + chart


# --- training -----------------------------------------------------------------------------------------------------------------------------


def training(story: Story) -> Section:
    """Loss curves and what each training did."""
    pieces = story.trainings
    curves = "".join(panel(heading(stage_name(p.stage), f" <small>{escape(p.id)}</small>"), _losses(p)) for p in pieces)
    wrapped = f'<div class="two">{curves}</div>' if len(pieces) > 1 else curves
    lead = Text("Loss in nats per token (of preferences: of a pair), so comparable within one curve only.", "损失单位为每词元 nat（偏好学习为每对样本），只能在同一条曲线内比较。")
    tables = panel(_trained([p for p in pieces if "algorithm" not in p.stats])) + panel(_preferred([p for p in pieces if p.stage in ("train.dpo", "train.reward")]))
    tables += panel(_rewarded([p for p in pieces if p.stage == "train.grpo" and p.stats.get("engine") == "trl"]))
    return Section("training", Text("Training", "训练"), lead, wrapped + tables if pieces else "")


def _losses(piece: Piece) -> str:
    rows = piece.rows("metrics.jsonl")
    offset, phase, last, marks = 0, None, 0, []
    series: dict[str, list[charts.Point]] = {"loss": [], "eval_loss": []}
    for row in rows:
        if row.get("phase") != phase:
            offset, phase, last = offset + last, row.get("phase"), 0
            marks.append((float(offset), str(phase)))
        last = int(row.get("step", 0))
        for key, found in series.items():
            if isinstance(row.get(key), (int, float)):
                found.append((float(offset + last), float(row[key])))
    s = piece.stats
    if not series["eval_loss"] and s.get("eval_loss_before") and s.get("eval_loss_after") is not None:
        series["eval_loss"] = [(0.0, float(s["eval_loss_before"])), (float(s["steps"]), float(s["eval_loss_after"]))]
    shown = [Series(Text("training", "训练"), charts.thinned(series["loss"]), 1)] if series["loss"] else []
    shown += [Series(Text("held out", "留出验证"), charts.thinned(series["eval_loss"]), 2, dots=True)] if series["eval_loss"] else []
    return charts.lines(shown, x=Text("step", "步"), y=Text("loss", "损失"), marks=marks if len(marks) > 1 else ())


def _preferred(pieces: Sequence[Piece]) -> str:
    """Held-out accuracy and margin of preference training."""
    rows = []
    for p in pieces:
        s = p.stats
        names = ("train_loss_first", "train_loss_last", "eval_accuracy_before", "eval_accuracy_after", "eval_margin_before", "eval_margin_after")
        measures = [f"{s[k]:.3f}" if s.get(k) is not None else "" for k in names]
        if measures[3]:
            low, high = interval_of_pairs(s)
            measures[3] += f" ({low:.3f}-{high:.3f})"
        rows.append([both(stage_name(p.stage)), escape(str(s["algorithm"])), f"{s['rows']['kept']:,}", f"{s['steps']:,}", *measures])
    header: list[Text | str] = [
        "", Text("method", "方法"), Text("pairs", "样本对"), Text("steps", "步数"), Text("loss: first", "损失：起"), Text("last", "止"),
        Text("held-out accuracy: before", "留出集正确率：前"), Text("after (95 %)", "后（95 %）"), Text("margin: before", "奖励差：前"), Text("after", "后"),
    ]  # fmt: skip
    return table(header, rows) if rows else ""


def _rewarded(pieces: Sequence[Piece]) -> str:
    """Mean rewards of training by rewards."""
    rows = []
    for p in pieces:
        s = p.stats
        greedy = [(s[f"reward_{when}"] or {}).get("sum") for when in ("before", "after")]
        measures = (f"{v:.3f}" if v is not None else "" for v in (*greedy, s["reward_sampled_first"], s["reward_sampled_last"]))
        rows.append([both(stage_name(p.stage)), escape(str(s["algorithm"])), f"{s['rows']['kept']:,}", f"{s['steps']:,}", *measures])
    header: list[Text | str] = [
        "", Text("method", "方法"), Text("prompts", "提示数"), Text("updates", "更新步数"), Text("mean reward: before", "平均奖励：前"), Text("after", "后"),
        Text("sampled answers: first", "采样回答：起"), Text("last", "止"),
    ]  # fmt: skip
    return table(header, rows) if rows else ""


def _trained(pieces: Sequence[Piece]) -> str:
    if not pieces:
        return ""
    rows = []
    for p in pieces:
        s, seconds = p.stats, float(p.stats.get("train_seconds") or 0)
        loss = [f"{s[k]:.3f}" if isinstance(s.get(k), (int, float)) else "" for k in ("train_loss_first", "train_loss_last", "eval_loss_before", "eval_loss_after")]
        change = _coloured(s["eval_loss_after"] / s["eval_loss_before"] - 1) if loss[2] and loss[3] else ""
        trainable = max((ph["trainable"] for ph in s.get("phases") or ()), default=None)
        speed = f"{s['tokens'] / seconds:,.0f}/s" if seconds else ""
        size = [f"{s['steps']:,}", number(s["tokens"]), number(trainable) if trainable else ""]
        rows.append([both(stage_name(p.stage)), *size, *loss, change, both(duration(seconds)), speed])
    header: list[Text | str] = [
        "", Text("steps", "步数"), Text("tokens", "词元"), Text("trainable", "可训练参数"), Text("loss: first", "损失：起"), Text("last", "止"),
        Text("held out: before", "留出：前"), Text("after", "后"), Text("change", "变化"), Text("time", "用时"), Text("tokens", "词元速度"),
    ]  # fmt: skip
    return table(header, rows)


def _coloured(change: float, *, more_is_better: bool = False) -> str:
    good = (change > 0) == more_is_better and abs(change) >= 0.0005
    return f'<b class="{"down" if good else "up" if abs(change) >= 0.0005 else ""}">{percent(change)}</b>'


# --- evaluation ---------------------------------------------------------------------------------------------------------------------------


def evaluation(story: Story) -> Section:
    """The table with intervals, a chart per set, the guard and contamination."""
    title = Text("Evaluation", "评测")
    lead = Text(
        "Every model on the same held-out sets. Bits per byte compare different vocabularies; lower is better.",
        "所有模型使用同样的留出数据。每字节比特数可以跨词表比较，越低越好。",
    ) + Text(
        " Small print: 95\u00a0% intervals (bootstrap over documents and questions, paired for changes; Wilson for shares).",
        "小字为 95\u00a0% 区间（按文档与题目自助抽样，变化为配对抽样；正确率用 Wilson 区间）。",
    )
    piece, exams = story.comparison, story.exams
    if piece is None and not exams:
        return Section("evaluation", title, lead, "")
    stats = piece.stats if piece else {"models": {}, "bits": {}, "sft": {}}
    plots = [*_bit_plots(stats), *_exam_plots(exams)]
    wrapped = f'<div class="plots">{"".join(plots)}</div>'
    return Section("evaluation", title, lead, panel(_models(story, stats, exams)) + wrapped + panel(_subjects(exams)) + panel(_trust(stats)))


def _models(story: Story, stats: Mapping[str, Any], exams: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys([*stats["models"], *exams]))
    texts, sets = list(next(iter(stats["bits"].values()), {})), list(next(iter(exams.values()), {}))
    header: list[Text | str] = [Text("model", "模型"), Text("parameters", "参数"), Text("vocabulary", "词表")]
    header += [Text(f"{t}: bits per byte", f"{t}：每字节比特") for t in texts] + ([Text("answers: bits per byte", "回答：每字节比特")] if stats.get("sft") else [])
    header += [Text(f"{n}: right", f"{n}：正确率") for n in sets]
    stages = {p.id: both(stage_name(p.stage)) for p in story.pieces}
    rows = []
    for name in names:
        info = stats["models"].get(name)
        row = [f"<b>{escape(name)}</b><small>{stages.get(name, '')}</small>", number(info["parameters"]) if info else "", f"{info['vocabulary']:,}" if info else ""]
        row += [_bits(stats["bits"].get(name, {}).get(t)) for t in texts] + ([_bits(stats["sft"].get(name))] if stats.get("sft") else [])
        rows.append([*row, *(_right(exams.get(name, {}).get(n)) for n in sets)])
    return table(header, rows)


def _bits(part: Mapping[str, Any] | None) -> str:
    if not part:
        return ""
    against = part.get("against_first") or {}
    change = f" {_coloured(against['change'])}" if against else ""
    low, high = (against.get("low"), against.get("high")) if against else (part.get("low"), part.get("high"))
    small = "" if low is None or high is None else f"<small>{percent(low)} … {percent(high)}</small>" if against else f"<small>{low:.3f} … {high:.3f}</small>"
    return f"{part['bits_per_byte']:.3f}{change}{small}"


def _right(part: Mapping[str, Any] | None) -> str:
    if not part:
        return ""
    against = part.get("against_first")
    return escape(interval(part)) + (f"<small>{escape(points(against)).replace('-', '−')}</small>" if against else f"<small>{part['right']:,} / {part['total']:,}</small>")


def _bit_plots(stats: Mapping[str, Any]) -> Iterator[str]:
    for text in next(iter(stats["bits"].values()), {}):
        found = {model: bits[text] for model, bits in stats["bits"].items()}
        rows = [Spot(m, b["bits_per_byte"], b.get("low"), b.get("high"), f"{b['bits_per_byte']:.3f}", 1 if i == len(found) - 1 else 3) for i, (m, b) in enumerate(found.items())]
        head = Text(f"{text}: bits per byte, lower is better", f"{text}：每字节比特数，越低越好")
        first = next(iter(found.values()))
        yield panel(heading(head), charts.spots(rows, zero=first["bits_per_byte"]))


def _exam_plots(exams: Mapping[str, Any]) -> Iterator[str]:
    for name in next(iter(exams.values()), {}):
        found = {model: sets[name] for model, sets in exams.items() if name in sets}
        rows = [
            Spot(m, 100 * p["accuracy"], 100 * p["low"], 100 * p["high"], f"{100 * p['accuracy']:.1f} %", 1 if i == len(found) - 1 else 3) for i, (m, p) in enumerate(found.items())
        ]
        head = Text(f"{name}: questions right, higher is better", f"{name}：选择题正确率，越高越好")
        yield panel(heading(head), charts.spots(rows, zero=rows[0].value, unit=" %"))


def _subjects(exams: Mapping[str, Any]) -> str:
    """Right answers by category or subject, folded away."""
    parts = []
    for name, first in next(iter(exams.values()), {}).items():
        for key, title in (("categories", Text("by category", "按类别")), ("subjects", Text("by subject", "按科目"))):
            if len(first[key]) > 1:
                rows = [[escape(s), f"{first[key][s]['total']:,}", *(escape(interval(sets[name][key][s])) for sets in exams.values() if name in sets)] for s in first[key]]
                header: list[Text | str] = ["", Text("questions", "题数"), *exams]
                parts.append(f"<details><summary>{escape(name)}: {both(title)}</summary>{table(header, rows)}</details>")
    return "".join(parts)


def _trust(stats: Mapping[str, Any]) -> str:
    """The forgetting guard and contamination, as two tables."""
    guard = []
    for e in stats.get("guard") or []:
        shown, limit = (escape(e[k]).replace("-", "−") for k in ("shown", "limit_shown"))
        guard.append([escape(e["model"]), escape(e["set"]), shown, limit, both(Text("exceeded", "超过") if e["broken"] else Text("held", "未超过"))])
    found = []
    for name, part in (stats.get("contamination") or {}).items():
        found.append([escape(name), f"{part['items']:,}", f"{part['found']:,}", portion(part["share"]), _clean(stats, name)])
    out = ""
    if guard:
        header = [Text("model", "模型"), Text("general set", "通用集"), Text("change", "变化"), Text("allowed", "允许"), Text("forgetting guard", "遗忘警戒线")]
        out += heading(Text("Forgetting guard", "遗忘警戒线")) + table(header, guard, words=2)
    if found:
        without = Text("last model: all items → without them", "最后的模型：全部 → 剔除后")
        header = [Text("set", "评测集"), Text("items", "样本"), Text("in the training data", "出现在训练数据"), Text("share", "占比"), without]
        title = Text("Contamination: 13 letters in a row shared with the training data", "数据污染：与训练数据有连续 13 字相同")
        out += f"<h3>{both(title)}</h3>" + table(header, found)
    return out


def _clean(stats: Mapping[str, Any], name: str) -> str:
    """The last model's figure on all items and on those that the training data does not contain."""
    last = list(stats["models"])[-1]
    bits, exam = stats["bits"].get(last, {}).get(name, {}), (stats.get("exams") or {}).get(last, {}).get(name, {})
    if "clean_bits_per_byte" in bits:
        return f"{bits['bits_per_byte']:.3f} → {bits['clean_bits_per_byte']:.3f}"
    return f"{portion(exam['accuracy'])} → {portion(exam['clean_accuracy'])}" if "clean_accuracy" in exam else "–"


def answers(story: Story) -> Section:
    """The greedy answers of all models to each prompt, sampled ones folded away."""
    piece = story.comparison
    found = (piece.stats.get("answers") or {}) if piece else {}
    title, lead = Text("Answers", "回答对比"), Text("Greedy answers to the same prompts, through the same rendering.", "对同样的问题、同样的模板，贪心解码的回答。")
    if piece is None or not found:
        return Section("answers", title, lead, "")
    prompts, references = piece.stats["prompts"], piece.stats.get("references") or []
    body = "".join(_asked(q, found, i, references[i] if i < len(references) else None) for i, q in enumerate(prompts))
    rows = [[f"<b>{escape(m)}</b>", *(f"{a['counts'][k]:.2f}" if k != "chars" else f"{a['counts'][k]:.0f}" for k in _COUNTED if k in a["counts"])] for m, a in found.items()]
    keys = [k for k in _COUNTED if k in next(iter(found.values()))["counts"]]
    return Section("answers", title, lead, body + panel(table(["", *(_COUNT_NAMES[k] for k in keys)], rows)))


def _asked(question: str, found: Mapping[str, Any], i: int, reference: str | None) -> str:
    cells = []
    for n, (model, a) in enumerate(found.items()):
        empty = both(Text("(empty)", "（空）"))
        more = "".join(f"<p>{escape(s['text']) or empty}</p>" for s in (a.get("sampled") or [[]] * (i + 1))[i])
        folded = f"<details><summary>{both(Text('sampled', '采样'))}</summary>{more}</details>" if more else ""
        last = " last" if n == len(found) - 1 else ""
        cells.append(f'<div class="answer{last}"><h4>{escape(model)}</h4>{escape(a["greedy"][i]["text"].strip()) or empty}{folded}</div>')
    if reference:
        cells.append(f'<div class="answer ref"><h4>{both(Text("reference", "参考答案"))}</h4>{escape(reference)}</div>')
    return f'<div class="panel ask"><h3>{escape(question)}</h3><div class="answers">{"".join(cells)}</div></div>'


# --- parity, cost, lineage ----------------------------------------------------------------------------------------------------------------


def parity(story: Story) -> Section:
    """Whether exported models say what the trained one says, where an export measured it."""
    rows = [[escape(p.id), escape(p.stage), *([escape(k), escape(_plain(v))])] for p in story.pieces for k, v in _flat(p.stats.get("parity"))]
    lead = Text("The exported model against the one that was trained.", "导出的模型与训练所得模型的一致性。")
    header = [Text("artifact", "产物"), Text("stage", "阶段"), Text("measure", "指标"), Text("value", "数值")]
    return Section("parity", Text("Parity", "导出一致性"), lead, panel(table(header, rows, words=3)))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif value is not None and not isinstance(value, (list, tuple)):
        yield name, value


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def cost(story: Story) -> Section:
    """Time and memory of each stage."""
    rows = [(stage_name(p.stage), float(p.manifest["seconds"]), duration(p.manifest["seconds"])) for p in story.pieces if p.manifest["seconds"] >= 0.5]
    memory = [(stage_name(p.stage), float(m), f"{m / 1024:.1f} GiB") for p in story.pieces if (m := p.manifest.get("peak_memory_mib") or 0) >= 200]
    total, peak = duration(story.seconds), f"{story.peak_mib / 1024:.1f} GiB"
    device = device_name(str(story.pieces[-1].manifest["device"]))
    lead = Text(f"{total.en} of work in all, {peak} of memory at most, on {device.en}.", f"总用时 {total.zh}，内存最多 {peak}，设备为 {device.zh}。")
    left = panel(heading(Text('Time', '用时')), charts.bars(rows))
    right = panel(heading(Text('Peak memory', '内存峰值')), charts.bars(memory))
    return Section("cost", Text("Cost", "代价"), lead, f'<div class="two">{left}{right}</div>')


def lineage(story: Story) -> Section:
    """What came from outside with its licence, and what was made from what."""
    unknown = both(Text("not stated beside the file", "文件旁未注明"))
    raw = [[f"<b>{escape(r.name)}</b>", size(r.size), escape(r.licence) or unknown, escape(r.into), f"<code>{r.sha256[:16]}</code>"] for r in story.raw]
    made = [[f"<b>{escape(p.id)}</b>", both(stage_name(p.stage)), escape(", ".join(p.sources)) or "–", f"<code>{p.hash[:16]}</code>"] for p in story.pieces]
    lead = Text("Every figure above leads back to these files. Hashes are SHA-256.", "以上每个数字都可以追溯到这些文件。哈希为 SHA-256。")
    head = heading(Text("From outside", "外部输入"))
    inputs = head + table([Text("input", "输入"), Text("size", "大小"), Text("licence", "许可证"), Text("used by", "用于"), Text("hash", "哈希")], raw, words=1)
    header = [Text("artifact", "产物"), Text("stage", "阶段"), Text("made from", "来自"), Text("content hash", "内容哈希")]
    outputs = f"<h3>{both(Text('Made here', '本次产物'))}</h3>" + table(header, made, words=3)
    return Section("lineage", Text("Lineage", "来源"), lead, panel(inputs, outputs))


def reproduce(story: Story) -> Section:
    """The commands, the versions, and the settings of each stage."""
    root = display(story.root)
    root = story.root.name if Path(root).is_absolute() else root  # no home path in a page that is passed on
    run = [f"sop run {_short(story.pipeline_file)} root={root}"] if story.pipeline_file else []
    commands = "\n".join([*run, f"sop runs verify {root}", f"sop report {root}"])
    newest = story.pieces[-1].manifest
    versions = ", ".join(f"{k} {v}" for k, v in {"self-model-sop": newest["code"]["package"], **newest["libraries"]}.items())
    settings = "".join(
        f"<details class='more'><summary>{escape(p.id)} <code>{p.manifest['fingerprint'][:12]}</code></summary><pre>{escape(_settings(p))}</pre></details>" for p in story.pieces
    )
    lead = Text("The same inputs and settings give the same fingerprints; verify rehashes every file.", "同样的输入与设置得到同样的指纹；verify 会重新计算每个文件的哈希。")
    body = f"<pre>{escape(redact(commands))}</pre><p>{escape(versions)}; {escape(newest['device'])}</p><h3>{both(Text('Settings of each stage', '各阶段设置'))}</h3>{settings}"
    return Section("reproduce", Text("Reproduce", "复现"), lead, panel(body))


def _settings(piece: Piece) -> str:
    return redact(json.dumps(piece.manifest["config"], ensure_ascii=False, indent=1))


def _short(path: str) -> str:
    """A shipped pipeline by its place below the project."""
    parts = Path(path).parts
    return str(Path(*parts[parts.index("config") :])) if "config" in parts else Path(path).name
