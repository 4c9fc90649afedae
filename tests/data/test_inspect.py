"""The page of `sop data inspect`: what it must show, and that nothing in the data can become part of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from self_model_sop.data import inspect, preference, process
from self_model_sop.data.inspect import Config
from self_model_sop.data.inspect_page import render
from self_model_sop.data.process import ProcessConfig
from self_model_sop.data.records import write_jsonl

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_process" / "sample_data"


class Tags(HTMLParser):
    """Every tag and attribute of a page, and its plain text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path, **options: object) -> str:
    manifest, views = inspect.inspect(Config(input=folder, **options))  # type: ignore[arg-type]
    return render(manifest, views)


def test_the_sample_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process.run(process.Config(input=SAMPLE, output_dir=tmp_path / "final"))
    assert inspect.main(["--input", str(tmp_path / "final")]) == 0
    page = (tmp_path / "final.inspect.html").read_text(encoding="utf-8")
    assert "final.inspect.html" in capsys.readouterr().out
    shown = Tags(page)
    examples = ["duplicates: 8 of 8", "near_duplicates: 10 of 10", "empty_turn: 1 of 1", "quarantined: 1 of 1"]
    for said in (*examples, "gb18030", "Largest clusters", "[手机号]", "242 kept rows", "59 rows were changed"):
        assert said in shown.text, said
    assert "<del>&lt;br/&gt;</del>" in page  # before and after
    assert "13800000001" not in page
    assert not re.search(r"src\s*=|url\(|@import|<script|href=(?!\"#)", page)
    _, views = inspect.inspect(Config(input=tmp_path / "final"))
    assert [(v.name, sum(v.lengths), sum(v.han)) for v in views] == [("pretrain", 242, 242), ("finetune", 434, 434), ("reward", 110, 110)]
    assert [len(v.clusters) for v in views] == [18, 5, 0] or len(views[0].clusters) == 10
    assert all(text for v in views for _, lines in v.clusters for _, _, text in lines)


def test_nothing_in_the_data_becomes_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><a href='javascript:x'>\u202e反\u200b转</a>&lt;b&gt;"
    rows = [{"text": f"{evil}第{i}段，收缩压<140mmHg，" + "一二三四五六七八九十"[i % 10] * 3 + f"编号{i * 7919}。"} for i in range(30)]
    name = "a<b>&'.jsonl"
    write_jsonl(tmp_path / name, [*rows, *rows[:5], {"text": "短<i>"}])
    (tmp_path / name).open("a").write('{"text": "<svg onload=1>"\n')
    process.run(process.Config(input=tmp_path / name, output_dir=tmp_path / "out", process=ProcessConfig(near_dedup=False)))
    page = page_of(tmp_path / "out")
    shown = Tags(page)
    allowed = "html head meta title style body h1 h2 h3 p small table tr th td div nav a details summary span svg rect text b ins del"
    assert shown.tags <= set(allowed.split())
    harmless = "lang charset name content http-equiv class style href id open viewbox role x y width height text-anchor"
    assert shown.attributes <= set(harmless.split())
    assert "onload=1" in shown.text and "alert(1)" in shown.text and "U+202E" in shown.text and "\u202e" not in page and "\u200b" not in page


def test_personal_data_and_credentials_stay_out_even_where_a_run_kept_them(tmp_path: Path) -> None:
    text = "联系电话13800000001，邮箱someone@example.com，患者：张三丰。令牌 hf_abcdefghijklmnopqrstuv。"
    write_jsonl(tmp_path / "in.jsonl", [{"text": text + f"第{i}次<br>"} for i in range(5)] + [{"text": "短13800000001"[:5]}])
    process.run(process.Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out", process=ProcessConfig(pii="keep")))
    page = page_of(tmp_path / "out")
    assert "[手机号]" in page and not any(secret in page for secret in ("13800000001", "someone@", "张三丰", "hf_abcdef"))


def test_without_samples_there_is_no_text_of_the_data(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"text": "独一无二的一段文字，<p>不应出现</p>。"}] * 3 + [{"text": "短"}])
    process.run(process.Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out"))
    page = page_of(tmp_path / "out", samples=0)
    assert "独一无二" not in page and "too_short" in page and "duplicates" in page


def test_one_file_and_preference_artifacts(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"text": f"第{i}段普通文字，编号{i * 7919}。"} for i in range(20)])
    process.run(process.Config(input=tmp_path / "in.jsonl", output=tmp_path / "clean.jsonl"))
    assert "20 kept rows" in page_of(tmp_path / "clean.jsonl")
    preference.run(preference.Config(input=SAMPLE, output_dir=tmp_path / "p"))
    assert "chosen_equals_rejected: 1 of 1" in Tags(page_of(tmp_path / "p" / "reward")).text


def test_the_input_may_be_gone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"text": f"<p>第{i}段普通文字</p><br/>编号{i * 7919}。"} for i in range(20)])
    process.run(process.Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out"))
    assert "Before and after: 20" in page_of(tmp_path / "out")
    (tmp_path / "in.jsonl").unlink()
    assert "Before and after" not in page_of(tmp_path / "out")


@pytest.mark.parametrize("what", ["empty", "missing"])
def test_what_is_no_artifact_is_refused(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["--input", str(tmp_path if what == "empty" else tmp_path / "no")]) == 2
    assert "Traceback" not in capsys.readouterr().err
