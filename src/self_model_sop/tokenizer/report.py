"""The comparison of two tokenizers as tables, Markdown, and one self-contained HTML page with coloured tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from .settings import Json

_COLOURS = ("#cfe8fc", "#fde2c4", "#d5f2d0", "#f3d6ee", "#fbf3b9", "#d9d7f7")
_SAMPLE_CHARS = 160
_STYLE = """
body{font:15px/1.6 system-ui,"PingFang SC","Noto Sans CJK SC","Microsoft YaHei",sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}th:first-child,td:first-child{text-align:left}
.t{border-radius:.2rem;padding:.05rem .1rem;margin:0 1px;white-space:pre-wrap}.n{font-weight:700;box-shadow:inset 0 -2px 0 #c0392b}
.line{margin:.15rem 0 .15rem;overflow-wrap:anywhere}.label{display:inline-block;width:9rem;color:#777;font-size:13px}h2{margin-top:2rem}
sup{color:#a33;font-size:10px}
"""


class Span(NamedTuple):
    """A stretch of text and the tokens that write it (several where tokens end inside a character)."""

    text: str
    ids: list[int]


class Picture(NamedTuple):
    """One text before and after."""

    source: str
    before: list[Span]
    after: list[Span]


def spans(encoding: Any, text: str) -> list[Span]:
    """The text cut at token borders; tokens that share a character form one span."""
    out: list[Span] = []
    at = 0
    for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
        if out and start < at:
            out[-1] = Span(text[at - len(out[-1].text) : max(stop, at)], [*out[-1].ids, i])
            at = max(stop, at)
            continue
        out.append(Span(text[at:stop], [i]))
        at = stop
    return out


def samples(texts: Sequence[tuple[str, str]], number: int) -> list[tuple[str, str]]:
    """A few texts, evenly spread over the corpus, cut to their first lines."""
    step = max(1, len(texts) // number) if number else 0
    return [(source, text.strip()[:_SAMPLE_CHARS]) for source, text in texts[::step][:number]] if number else []


# --- tables -------------------------------------------------------------------------------------------------------------------------------

Table = tuple[str, list[str], list[list[object]]]


def tables(found: Json) -> Iterator[Table]:
    """(title, header, rows): by source, new tokens and what must not change, regression set, N-curve."""
    header = ["source", "chars", "tokens/char before", "after", "reduction", "bytes/token before", "after", "UNK before", "after"]
    yield "Tokens", header, [_source(name, part) for name, part in [*found["sources"].items(), ("all", found["all"])]]
    yield "Extension", ["what", "value"], [list(r) for r in _facts(found)]
    yield "Regression set (lines encoded differently)", ["text", "changed", "of"], [[k, v, found["regression_lines"][k]] for k, v in found["changed_regression_lines"].items()]
    if found["curve"]:
        step = max(1, len(found["curve"]) // 10)
        rows = [*found["curve"][:-1][step - 1 :: step], found["curve"][-1]]
        shown = [[r["tokens"], f"{r['reduction']:.1%}", r["gain_per_million"]] for r in rows]
        yield "Smaller N (a prefix of the plan)", ["new tokens", "held-out reduction", "gain of the last, per million"], shown


def _source(name: str, part: Json) -> list[object]:
    old, new = part["before"], part["after"]
    numbers = [f"{old['tokens_per_char']:.3f}", f"{new['tokens_per_char']:.3f}", f"{part['reduction']:.1%}", f"{old['bytes_per_token']:.2f}", f"{new['bytes_per_token']:.2f}"]
    return [name, f"{old['chars']:,}", *numbers, f"{old['unk_rate']:.2%}", f"{new['unk_rate']:.2%}"]


def _facts(found: Json) -> Iterator[tuple[str, object]]:
    tokens, lexicon, speed = found["new_tokens"], found["lexicon"], found["speed"]
    count, rows = tokens["count"] or 1, found["rows"]
    dropped = ", ".join(f"{reason} {n}" for reason, n in rows["dropped"].items()) or "none"
    yield "rows read / used / unreadable / dropped", f"{rows['total']} / {rows['kept']} / {rows['quarantined']} / {dropped}"
    yield "base tokens -> extended", f"{found['baseline']['tokens']} -> {found['extended']['tokens']}"
    yield "new tokens used on this text", f"{tokens['used_on_test']} of {tokens['count']} ({tokens['used_on_test'] / count:.1%})"
    if tokens["used_on_training"] is not None:
        yield "new tokens used on training text", f"{tokens['used_on_training']} of {tokens['count']} ({tokens['used_on_training'] / count:.1%})"
    yield "unreachable / shadowing a base token / inside a character", f"{tokens['unreachable']} / {tokens['shadowed']} / {tokens['fragments']}"
    yield "base ids, special ids, template moved", len(found["moved"])
    yield "round trips broken", len(found["round_trip_faults"])
    yield "llama.cpp recognises the pre-tokenizer", "as before" if found["llama_cpp_probe"]["same"] else "no: export with the base's tokenizer.ggml.pre"
    yield "encoding, MB per CPU second", f"{speed['baseline_mb_per_s']} -> {speed['extended_mb_per_s']} (x {speed['ratio']})"
    if lexicon:
        yield "lexicon terms that are one token", f"{lexicon['single_before']} -> {lexicon['single_after']} of {lexicon['terms']}"
        yield "tokens per lexicon term", f"{lexicon['tokens_per_term_before']} -> {lexicon['tokens_per_term_after']}"


def markdown(found: Json) -> str:
    """The report as Markdown."""
    out = ["# Tokenizer comparison", ""]
    for title, header, rows in tables(found):
        out += [
            f"## {title}",
            "",
            f"| {' | '.join(header)} |",
            f"|{'---|' * len(header)}",
            *(f"| {' | '.join(str(c).replace('|', chr(92) + '|') for c in row)} |" for row in rows),
            "",
        ]
    return "\n".join(out)


def html(found: Json, pictures: Sequence[Picture], first_new: int | None) -> str:
    """One page without outside resources; new tokens are underlined, a small number counts the tokens inside one character."""
    body = ["<h1>Tokenizer comparison</h1>"]
    for title, header, rows in tables(found):
        head = "".join(f"<th>{escape(h)}</th>" for h in header)
        lines = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        body.append(f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{lines}</table>")
    if pictures:
        body.append("<h2>Before and after</h2>")
    for source, before, after in pictures:
        for label, line in (("before", before), ("after", after)):
            count = sum(len(s.ids) for s in line)
            body.append(f'<div class="line"><span class="label">{escape(source)}, {label}: {count}</span>{"".join(_coloured(line, first_new))}</div>')
        body.append("<br>")
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Tokenizer comparison</title><style>{_STYLE}</style><body>{"".join(body)}</body></html>\n'


def _coloured(line: Sequence[Span], first_new: int | None) -> Iterator[str]:
    for n, span in enumerate(line):
        new = " n" if first_new is not None and any(i >= first_new for i in span.ids) else ""
        several = f"<sup>{len(span.ids)}</sup>" if len(span.ids) > 1 else ""
        yield f'<span class="t{new}" style="background:{_COLOURS[n % len(_COLOURS)]}">{escape(span.text)}{several}</span>'
