"""The comparison as a table: plain lines for the terminal, Markdown for the artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def rows_of(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per model; changes are against the first model."""
    names = list(results["models"])
    if not names:
        return [], []
    texts = list(results["bits"].get(names[0], {}))
    header = ["model", "parameters", "vocabulary"]
    for text in texts:
        header += [f"{text}: bits/byte", "change", "tokens/char"]
    if results["sft"]:
        header += ["assistant: nats/token", "bits/byte", "change"]
    rows = []
    for name in names:
        info = results["models"][name]
        row = [name, f"{info['parameters'] / 1e6:.1f} M", f"{info['vocabulary']:,}"]
        for text in texts:
            bits, first = results["bits"][name][text], results["bits"][names[0]][text]
            row += [f"{bits['bits_per_byte']:.3f}", _change(bits["bits_per_byte"], first["bits_per_byte"]), f"{bits['tokens_per_char']:.2f}"]
        if results["sft"]:
            sft, first = results["sft"][name], results["sft"][names[0]]
            row += [f"{sft['nats_per_token']:.3f}", f"{sft['bits_per_byte']:.3f}", _change(sft["bits_per_byte"], first["bits_per_byte"])]
        rows.append(row)
    return header, rows


def _change(value: float, first: float) -> str:
    return "" if value == first else f"{100 * (value / first - 1):+.1f} %"


def as_text(results: Mapping[str, Any]) -> list[str]:
    """The table in aligned columns."""
    header, rows = rows_of(results)
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in [header, *rows]]


def as_markdown(results: Mapping[str, Any]) -> str:
    """The table, then the answers side by side."""
    header, rows = rows_of(results)
    lines = ["# Comparison", "", *_markdown_table(header, rows), ""]
    lines += ["Bits per byte and per character compare models of different vocabularies; nats per token do not. Lower is better.", ""]
    if not results["answers"]:
        return "\n".join(lines)
    lines += ["## Answers (greedy)", ""]
    for i, prompt in enumerate(results["prompts"]):
        lines += [f"**{_cell(prompt)}**", "", *_markdown_table(["model", "answer"], [[n, _cell(a["greedy"][i]["text"])] for n, a in results["answers"].items()]), ""]
    counts = {name: a["counts"] for name, a in results["answers"].items()}
    keys = list(next(iter(counts.values())))
    lines += _markdown_table(["model", *keys], [[name, *(f"{c[k]:.2f}" for k in keys)] for name, c in counts.items()])
    lines += ["", "distinct_n: share of different character n-grams over all answers; repetition: share of an answer's 4-grams that it had before;"]
    lines += ["stopped: share that ended by itself.", ""]
    return "\n".join(lines)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not header:
        return []
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] + ["---:"] * (len(header) - 1), *rows]]


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\r", "").replace("\n", "<br>") or "(empty)"
