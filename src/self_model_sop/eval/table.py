"""The comparison as a table: plain lines for the terminal, Markdown for the artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COUNTS = (
    ("distinct_1, distinct_2", "shares of different character n-grams over all answers"),
    ("repetition", "share of an answer's 4-grams that it had before"),
    ("stopped", "share that ended by itself"),
    ("refused", "share that declines to answer"),
    ("overlap", "character ROUGE-L with the reference, where there is one"),
)


def in_order(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results as a manifest holds them (keys sorted), with the models in the order in which they were measured: the first is what the others are compared with."""
    order = results.get("order") or list(results["models"])
    by_model = ("models", "bits", "sft", "answers", "exams")
    return {key: {m: value[m] for m in order if m in value} if key in by_model else value for key, value in results.items()}


def rows_of(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per model; changes are against the first model."""
    names = list(results["models"])
    if not names:
        return [], []
    texts = list(results["bits"].get(names[0], {}))
    exams = results.get("exams") or {}
    header = ["model", "parameters", "vocabulary"]
    for text in texts:
        header += [f"{text}: bits/byte", "change", "tokens/char"]
    if results["sft"]:
        header += ["assistant: nats/token", "bits/byte", "change"]
    for name in exams.get(names[0], {}):
        header += [f"{name}: right", "change"]
    rows = []
    for name in names:
        info = results["models"][name]
        row = [name, f"{info['parameters'] / 1e6:.1f} M", f"{info['vocabulary']:,}"]
        for text in texts:
            bits = results["bits"][name][text]
            row += [f"{bits['bits_per_byte']:.3f}", relative(bits.get("against_first")), f"{bits['tokens_per_char']:.2f}"]
        if results["sft"]:
            sft = results["sft"][name]
            row += [f"{sft['nats_per_token']:.3f}", f"{sft['bits_per_byte']:.3f}", relative(sft.get("against_first"))]
        for part in exams.get(name, {}).values():
            row += [interval(part), points(part.get("against_first"))]
        rows.append(row)
    return header, rows


def relative(against: Mapping[str, Any] | None) -> str:
    """`-5.9 % (-7.1 to -4.6)`: change against the first model, with the 95 % interval where there is one."""
    if not against:
        return ""
    span = f" ({100 * against['low']:+.1f} to {100 * against['high']:+.1f})" if against.get("low") is not None else ""
    return f"{100 * against['change']:+.1f} %{span}"


def interval(part: Mapping[str, Any]) -> str:
    """`41.3 % (36.0-46.8)`: accuracy and its 95 % Wilson interval."""
    return f"{100 * part['accuracy']:.1f} % ({100 * part['low']:.1f}-{100 * part['high']:.1f})"


def points(against: Mapping[str, Any] | None) -> str:
    """`+3.1 points (+0.4 to +5.9)`: change of an accuracy against the first model, 95 % interval of the paired bootstrap."""
    return f"{100 * against['difference']:+.1f} points ({100 * against['low']:+.1f} to {100 * against['high']:+.1f})" if against else ""


def as_text(results: Mapping[str, Any]) -> list[str]:
    """The table in aligned columns, and what the guard says."""
    results = in_order(results)
    return [*text_table(*rows_of(results)), *guard_lines(results)]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns: names to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip() for line in [header, *rows]]


def guard_lines(results: Mapping[str, Any]) -> list[str]:
    """One line per general set and model, and one per contaminated set."""
    lines = []
    for entry in results.get("guard") or []:
        state = "LOST" if entry["broken"] else "kept"
        lines.append(f"forgetting guard: {entry['model']} on {entry['set']}: {entry['shown']}, at most {entry['limit_shown']} allowed: {state}")
    for name, part in (results.get("contamination") or {}).items():
        lines.append(f"contamination: {part['found']} of {part['items']} items of {name} overlap the training data ({part['share']:.1%})")
    return lines


def as_markdown(results: Mapping[str, Any]) -> str:
    """The table, then the answers side by side."""
    lines = ["# Comparison", "", *markdown_table(*rows_of(results)), ""]
    lines += ["Bits per byte and per character compare models of different vocabularies; nats per token do not. Lower is better.", ""]
    lines += ["In brackets 95 % intervals: bootstrap over documents or questions, paired for changes; Wilson for shares of right answers.", ""]
    lines += [f"* {line}" for line in guard_lines(results)] + ([""] if guard_lines(results) else [])
    if not results["answers"]:
        return "\n".join(lines)
    lines += ["## Answers (greedy)", ""]
    for i, prompt in enumerate(results["prompts"]):
        rows = [[n, _cell(a["greedy"][i]["text"])] for n, a in results["answers"].items()]
        reference = (results.get("references") or [None] * (i + 1))[i]
        rows += [["reference", _cell(reference)]] if reference else []
        lines += [f"**{_cell(prompt)}**", "", *markdown_table(["model", "answer"], rows), ""]
    counts = {name: a["counts"] for name, a in results["answers"].items()}
    keys = list(next(iter(counts.values())))
    lines += markdown_table(["model", *keys], [[name, *(f"{c[k]:.2f}" for k in keys)] for name, c in counts.items()])
    return "\n".join([*lines, "", "; ".join(f"{name}: {meaning}" for name, meaning in COUNTS) + ".", ""])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; empty where there is no header."""
    if not header:
        return []
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] + ["---:"] * (len(header) - 1), *rows]]


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\r", "").replace("\n", "<br>") or "(empty)"
