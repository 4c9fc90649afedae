"""The page of `sop data inspect`: one file, nothing from outside, every text escaped and every invisible character shown."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .perplexity import LEVELS
from .rows import SHOWN

if TYPE_CHECKING:
    from .inspect import SetView

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the page itself forbids every request and every script
_STYLE = """
:root{--text:#1c2430;--dim:#68707c;--line:#d9dee5;--back:#fff;--kept:#2a9d6f;--gone:#d0792b;--bad:#b8444b;--add:#2a9d6f33;--del:#d0444b33}
@media(prefers-color-scheme:dark){:root{--text:#e3e7ec;--dim:#98a1ad;--line:#39424e;--back:#12161b;--add:#2a9d6f55;--del:#d0444b55}}
*{box-sizing:border-box}
body{font:15px/1.6 system-ui,"PingFang SC","Noto Sans CJK SC","Microsoft YaHei",sans-serif;color:var(--text);background:var(--back);max-width:64rem;margin:auto;padding:1.5rem 1rem}
h1{font-size:1.6rem;margin:.2rem 0}h2{margin:2.6rem 0 .4rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}h3{margin:1.6rem 0 .4rem;font-size:1.05rem}
small,.dim{color:var(--dim)}nav{margin-top:1rem}nav a{margin-right:1rem;color:inherit}
table{border-collapse:collapse;width:100%}td,th{padding:.2rem .6rem;text-align:left;vertical-align:top}td.n,th.n{text-align:right;white-space:nowrap}td.w{width:46%}
.bar{height:.95rem;min-width:1px;border-radius:2px;background:var(--gone)}.bar.kept{background:var(--kept)}.bar.bad{background:var(--bad)}
.two{display:grid;grid-template-columns:1fr 1fr;gap:2rem}@media(max-width:44rem){.two{grid-template-columns:1fr}}
details{border:1px solid var(--line);border-radius:6px;margin:.4rem 0;padding:.3rem .8rem}summary{cursor:pointer}
.row{border-top:1px solid var(--line);padding:.35rem 0;overflow-wrap:anywhere}.row:first-of-type{border-top:0}.where{color:var(--dim);font-size:.8rem;display:block}
.text{white-space:pre-wrap}.u{font-size:.7em;border:1px solid var(--line);border-radius:3px;padding:0 .2em;color:var(--dim)}
ins{background:var(--add);text-decoration:none}del{background:var(--del)}svg{width:100%;height:auto}svg text{font-size:11px;fill:var(--dim)}svg rect{fill:var(--kept)}
"""
WINDOW = 2 * SHOWN  # characters of an example
_SHORT = ("10", "20", "50", "100", "200", "500", "1k", "2k", "5k", "10k", "20k", "50k", "100k", "more")


def render(manifest: Mapping[str, Any], views: Sequence[SetView]) -> str:
    """The whole page."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    links = "".join(f'<a href="#set-{i}">{_text(view.name)}</a>' for i, view in enumerate(views))
    body = "".join([*_top(manifest), f"<nav>{links}</nav>", *(_set(i, view) for i, view in enumerate(views))])
    return f'<!doctype html><html lang="en"><head>{head}<title>What became of the data</title><style>{_STYLE}</style></head><body>{body}</body></html>\n'


def _text(text: str) -> str:
    """Escaped; control, format and private characters, and half surrogates, as their numbers."""
    return "".join(escape(c) if c in "\n\t" or unicodedata.category(c)[0] != "C" else f'<span class="u">U+{ord(c):04X}</span>' for c in text)


def _top(manifest: Mapping[str, Any]) -> Iterator[str]:
    stats = manifest["stats"]
    yield f"<h1>What became of the data <small>数据去向</small></h1><p class='dim'>{_text(manifest['stage'])}, {_text(str(manifest['started']))}, {manifest['seconds']} s</p>"
    yield "<h3>Files <small>输入文件</small></h3><table><tr><th>file<th>format<th>encoding<th class='n'>rows<th>set</tr>"
    for f in stats["files"]:
        cells = "".join(f"<td>{_text(str(f[key]))}" for key in ("name", "format", "encoding"))
        yield f"<tr>{cells}<td class='n'>{f['rows']:,}<td>{_text(f['set'])}</tr>"
    yield "</table>"
    if stats["left_alone"]:
        yield f"<p class='dim'>left alone: {_text('; '.join(stats['left_alone']))}</p>"
    if stats["pii"]:
        yield "<h3>Personal data <small>个人信息（已处理的次数）</small></h3>" + _bars([(rule, n, "bad") for rule, n in sorted(stats["pii"].items(), key=lambda x: -x[1])])


def _set(number: int, view: SetView) -> str:
    return "".join(
        [
            f'<h2 id="set-{number}">{_text(view.name)}</h2>',
            _funnel(view),
            _histograms(view),
            _changes(view),
            _personal(view),
            _clusters(view),
            _examples(view),
        ]
    )


def _bars(rows: Sequence[tuple[str, int, str]], total: int = 0) -> str:
    most = max((n for _, n, _ in rows), default=0) or 1
    lines = []
    for name, n, kind in rows:
        share = f"<td class='n'>{100 * n / total:.1f} %" if total else ""
        lines.append(f"<tr><td>{_text(name)}<td class='n'>{n:,}{share}<td class='w'><div class='bar {kind}' style='width:{100 * n / most:.2f}%'></div></tr>")
    return f"<table>{''.join(lines)}</table>"


def _funnel(view: SetView) -> str:
    s = view.stats
    total = s["total"] + s["added_by_split"]
    rows = [("total", s["total"], "kept")]
    if s["added_by_split"]:
        rows.append(("added by splitting", s["added_by_split"], "kept"))
    rows += [("kept", s["kept"], "kept"), ("  train", s["train"], "kept"), ("  validation", s["validation"], "kept")]
    rows += [(reason, n, "gone") for reason, n in sorted(s["dropped"].items(), key=lambda x: -x[1])]
    rows += [(f"quarantined: {reason}", n, "bad") for reason, n in sorted(s["quarantined"].items(), key=lambda x: -x[1])]
    changed = f"{s['texts_changed']:,} rows were changed by cleaning or masking; {s['characters']:,} characters read."
    return f"<h3>Funnel <small>漏斗</small></h3>{_bars(rows, total)}<p class='dim'>{changed}</p>"


def _histograms(view: SetView) -> str:
    if not view.looked_at:
        return ""
    lengths = _columns(view.lengths, _SHORT)
    han = _columns(view.han, tuple(f"{10 * (i + 1)}%" for i in range(10)))
    note = f"{view.looked_at:,} kept rows"
    return (
        f"<div class='two'><div><h3>Characters <small>长度（小于）</small></h3>{lengths}</div><div><h3>Han among letters <small>汉字占比（小于）</small></h3>{han}</div></div>"
        f"<p class='dim'>{note}; under each bar its upper end.</p>{_perplexities(view.stats.get('perplexity'))}"
    )


def _perplexities(found: dict[str, Any] | None) -> str:
    """How unusual all judged texts were, kept or not, with the limit."""
    if not found:
        return ""
    columns = _columns([found["texts"].get(str(low), 0) for low in LEVELS], [f"{low:,}" for low in LEVELS])
    sample = f"order {found['order']}, sample of {found['sample_characters']:,} characters"
    middle = f"; held-out texts of the sample: median {found['held_out_median']:,}" if "held_out_median" in found else ""
    note = f"limit {found['limit']:,}; {sample}{middle}; all judged texts, under each bar its lower end"
    return f"<h3>Perplexity per character <small>困惑度（不小于）</small></h3>{columns}<p class='dim'>{note}</p>"


def _columns(values: Sequence[int], names: Sequence[str]) -> str:
    width, height, most = 476, 130, max(values) or 1
    step = width / len(values)
    parts = []
    for i, (value, name) in enumerate(zip(values, names, strict=True)):
        tall, middle = 100 * value / most, (i + 0.5) * step
        parts.append(f"<rect x='{i * step + 3:.1f}' y='{112 - tall:.1f}' width='{step - 6:.1f}' height='{tall:.1f}'><title>{value:,}</title></rect>")
        parts.append(f"<text x='{middle:.1f}' y='{height - 4}' text-anchor='middle'>{escape(name)}</text>")
        if value:
            parts.append(f"<text x='{middle:.1f}' y='{108 - tall:.1f}' text-anchor='middle'>{value:,}</text>")
    return f"<svg viewBox='0 -4 {width} {height + 4}' role='img'>{''.join(parts)}</svg>"


def _block(title: str, chinese: str, body: str, *, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{title} <small>{chinese}</small></summary>{body}</details>" if body else ""


def _row(where: str, body: str) -> str:
    return f"<div class='row'><span class='where'>{_text(where)}</span><div class='text'>{body}</div></div>"


def _changes(view: SetView) -> str:
    body = "".join(_row(where, _difference(before, after)) for where, before, after in view.changed)
    return _block(f"Before and after: {len(view.changed)} examples", "清洗前后", body, opened=True)


def _difference(before: str, after: str) -> str:
    """One text with what went and what came; a difference at the very end only says that both were cut."""
    out = []
    steps = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    cut = max(len(before), len(after)) >= WINDOW and steps[-1][0] != "equal"
    for kind, a, b, c, d in steps[:-1] if cut else steps:
        if kind == "equal":
            out.append(_text(before[a:b]))
            continue
        if b > a:
            out.append(f"<del>{_text(before[a:b])}</del>")
        if d > c:
            out.append(f"<ins>{_text(after[c:d])}</ins>")
    return "".join(out) + (" …" if cut else "")


def _personal(view: SetView) -> str:
    return _block(f"Personal data, masked: {len(view.personal)} examples", "已遮盖的个人信息", "".join(_row(where, _text(text)) for where, text in view.personal))


def _clusters(view: SetView) -> str:
    body = ""
    for size, lines in view.clusters:
        shown = "".join(f"<span class='where'>{escape(what)}: {_text(where)}</span><div class='text'>{_text(text)}</div>" for what, where, text in lines)
        body += f"<div class='row'><b>{size} rows</b>{shown}</div>"
    return _block(f"Largest clusters of duplicates: {len(view.clusters)}", "最大的重复簇", body)


def _examples(view: SetView) -> str:
    parts = ["<h3>Examples by reason <small>各原因示例</small></h3>"] if view.examples or view.quarantined else []
    for reason, rows in sorted(view.examples.items()):
        parts.append(_block(f"{_text(reason)}: {len(rows)} of {view.stats['dropped'].get(reason, 0):,}", "已删除", "".join(_row(where, _text(text)) for where, text in rows)))
    bad = "".join(_row(f"{where} {reason}", _text(text)) for where, reason, text in view.quarantined)
    return "".join([*parts, _block(f"quarantined: {len(view.quarantined)} of {sum(view.stats['quarantined'].values()):,}", "无法读取", bad)])
