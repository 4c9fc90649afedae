"""How a lint report looks: lines, samples coloured by mask in the terminal, and a page without outside resources."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import console

if TYPE_CHECKING:
    from .proof import LintReport


def show(report: LintReport, limit: int = 1500) -> None:
    """The report and its samples in the terminal: learned text green, the rest dim, control tokens bold."""
    from rich.text import Text

    screen = console.rich_console()
    for sample in report.samples:
        text = Text(f"── {sample.title}: {sample.learned} of {sample.tokens} tokens are learned\n", style="bold")
        left = limit
        for piece, learned, special in sample.pieces:
            text.append(piece[:left], style=("green" if learned else "dim") + (" bold" if special else ""))
            left -= len(piece)
            if left <= 0:
                text.append(" …", style="dim")
                break
        screen.print(text)
    console.say("\n".join(lines(report)))


def lines(report: LintReport) -> list[str]:
    """The counts as lines of text."""
    share = report.learned / report.tokens if report.tokens else 0
    dropped = "".join(f", {reason} {count:,}" for reason, count in sorted(report.dropped.items()))
    out = [
        f"template: {report.template}",
        f"rows: {report.total:,} = {report.kept:,} kept + {sum(report.dropped.values()):,} dropped{dropped}",
        f"tokens: {report.tokens:,}, of which {report.learned:,} are learned ({share:.1%}), in {report.turns:,} turns",
        f"proof: {report.kept - report.unproven_rows:,} of {report.kept:,} rows decode to the assistant's text and end markers, and nothing else",
    ]
    if report.connectives:
        out.append("template text inside learned turns: " + ", ".join(f"{text!r} x {count:,}" for text, count in report.connectives.most_common(12)))
    return [*out, *(f"note: {note}" for note in report.notes), *(f"not proven: {why}" for why in report.unproven)]


_STYLE = (
    "body{font:15px/1.6 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}pre{white-space:pre-wrap;border:1px solid #8884;padding:1em;border-radius:6px}"
    ".y{background:#2c84}.n{color:#8889}.c{font-weight:700;outline:1px solid #8886;border-radius:3px}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}"
)


def html(report: LintReport) -> str:
    """The report as one page without any outside resource."""
    from html import escape

    facts = "".join(f"<li>{escape(line)}</li>" for line in lines(report))
    shown = []
    for sample in report.samples:
        spans = "".join(f'<span class="{"y" if learned else "n"}{" c" if special else ""}">{escape(text)}</span>' for text, learned, special in sample.pieces)
        shown.append(f"<h2>{escape(sample.title)}: {sample.learned} of {sample.tokens} tokens are learned</h2><pre>{spans}</pre>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>What is learned</title><style>{_STYLE}</style>'
    legend = '<p><span class="y">learned</span> &middot; <span class="n">context</span> &middot; <span class="n c">control token</span></p>'
    return f"{head}<h1>What is learned</h1><ul>{facts}</ul>{legend}{''.join(shown)}</html>\n"
