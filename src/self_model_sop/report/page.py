"""The page: the story at the top, then a section for each thing that was measured. One file, nothing from outside, everything escaped."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib import resources
from typing import Literal

from .. import __version__
from . import sections
from .gather import Story
from .sections import Section
from .verdict import Finding, Note, Verdict, headline, judge
from .words import Text, both, duration, stage_name

Language = Literal["auto", "en", "zh"]
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"  # the page itself forbids every request
_SHOWN = 4  # findings of a card


def render(story: Story, *, language: Language = "auto", samples: int = 4) -> str:
    """The whole page.

    Args:
        story: what was gathered.
        language: shown first; `auto` follows the reader's browser. The other one is a click away.
        samples: held-out texts shown token by token; 0 shows no text of the data.
    """
    verdict = judge(story)
    parts = [s for s in sections.all_sections(story, samples) if s.body]
    lang = "zh" if language == "zh" else "en"
    auto = ' data-auto="1"' if language == "auto" else ""
    title = f"{story.name} · self-model-sop"
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_asset("page.css")}</style>'
    )
    body = "".join([_header(story, parts), "<main>", _hero(story, verdict), *map(_section, parts), "</main>", _footer(story), '<div id="tip"></div>'])
    return f'<!doctype html><html lang="{lang}" data-lang="{lang}"{auto}><head>{head}</head><body>{body}<script>{_asset("page.js")}</script></body></html>\n'


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _header(story: Story, parts: list[Section]) -> str:
    links = "".join(f'<a href="#{s.id}">{both(s.title)}</a>' for s in parts)
    switch = '<div class="lang"><button data-set="zh" lang="zh">中文</button><button data-set="en" lang="en">English</button></div>'
    return f'<header><div class="in"><b>{escape(story.name)}</b><nav>{links}</nav>{switch}</div></header>'


def _section(part: Section) -> str:
    lead = f'<p class="lead">{both(part.lead)}</p>' if part.lead.en else ""
    return f'<section id="{part.id}"><h2>{both(part.title)}</h2>{lead}{part.body}</section>'


# --- the first view -----------------------------------------------------------------------------------------------------------------------


def _hero(story: Story, verdict: Verdict) -> str:
    day = str(story.pieces[0].manifest["started"])[:10]
    stages = len(story.pieces)
    over = Text(f"Report of a run, {day}: {stages} stages, from raw files to a measured model", f"{day} 的运行报告：{stages} 个阶段，从原始文件到经过测量的模型")
    cards = _gains(verdict) + _losses(verdict) + _costs(verdict)
    return f'<div class="hero"><p class="over">{both(over)}</p><h1>{both(headline(story, verdict))}</h1><div class="three">{cards}</div>{_flow(story)}</div>'


def _gains(verdict: Verdict) -> str:
    body = "".join(map(_fact, verdict.gains[:_SHOWN])) or f'<p class="none">{both(Text("No gain was measured.", "没有测出收益。"))}</p>'
    return f'<div class="card gain"><h2>{both(Text("Gained", "获得"))}</h2>{body}{_marks(verdict.same, [])}</div>'


def _losses(verdict: Verdict) -> str:
    nothing = Text("Nothing: no measured figure got worse.", "没有：所有测量指标均未变差。")
    if not (verdict.gains or verdict.same or verdict.losses):
        nothing = Text("Not measured: no two models were compared.", "未测量：没有可对比的模型。")
    body = "".join(map(_fact, verdict.losses[:_SHOWN])) or f'<p class="none">{both(nothing)}</p>'
    return f'<div class="card loss"><h2>{both(Text("Lost", "失去"))}</h2>{body}{_marks([], verdict.notes)}</div>'


def _costs(verdict: Verdict) -> str:
    body = "".join(f'<div class="fact"><span class="big">{both(value)}</span><span class="what">{both(what)}</span></div>' for value, what in verdict.costs)
    return f'<div class="card cost"><h2>{both(Text("Cost", "代价"))}</h2>{body}</div>'


def _fact(finding: Finding) -> str:
    words = f'{both(finding.what)}<span class="small">{both(finding.detail)}</span>'
    return f'<div class="fact"><span class="big">{escape(finding.value)}</span><span class="what">{words}</span></div>'


def _marks(same: list[Finding], notes: list[Note]) -> str:
    lines = [f'<li class="flat">{escape(f.value)} {both(f.what)}: {both(Text("no clear change", "无明显变化"))}<br><small>{both(f.detail)}</small></li>' for f in same]
    lines += [f'<li class="{"warn" if n.bad else "fine"}">{both(n.text)}</li>' for n in notes]
    return f'<ul class="marks">{"".join(lines)}</ul>' if lines else ""


def _flow(story: Story) -> str:
    return f'<div class="flow">{"".join(_steps(story))}</div>'


def _steps(story: Story) -> Iterator[str]:
    """The stages in order; those of the tokenizer as one."""
    groups: list[tuple[str, Text, float]] = []
    for piece in story.pieces:
        group = piece.stage.partition(".")[0]
        name = Text("Tokenizer", "分词器") if group == "tokenizer" else stage_name(piece.stage)
        if groups and group == "tokenizer" and groups[-1][0] == group:
            groups[-1] = (group, name, groups[-1][2] + piece.manifest["seconds"])
        else:
            groups.append((group, name, piece.manifest["seconds"]))
    for group, name, seconds in groups:
        yield f'<div class="f-{escape(group)}"><b>{both(name)}</b>{both(duration(seconds))}</div>'


def _footer(story: Story) -> str:
    text = Text(
        f"Made by self-model-sop {__version__} from the manifests of this run. The page is one file: it loads nothing from anywhere.",
        f"由 self-model-sop {__version__} 根据本次运行的清单生成。本页为单个文件，不加载任何外部内容。",
    )
    return f"<footer>{both(text)}</footer>"
