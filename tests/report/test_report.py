"""The report of a run: what it says first, that it is safe to open, and how a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from self_model_sop import artifact
from self_model_sop.artifact import Target, hash_input
from self_model_sop.errors import SopError
from self_model_sop.ops import report
from self_model_sop.report import charts
from self_model_sop.report.gather import gather, licence_of
from self_model_sop.report.verdict import headline, judge

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><script>alert(1)</script><img src=http://example.com/x onerror=alert(2)>"


def put(folder: Path, stage: str, stats: dict[str, Any], *, inputs: dict[str, Path] | None = None, files: dict[str, str] | None = None, seconds: float = 60.0, **more: Any) -> Path:
    """An artifact on disk, published as a stage does it."""
    work = folder / ".work-x"
    work.mkdir(parents=True)
    for name, text in (files or {"out.txt": stage}).items():
        (work / name).write_text(text, encoding="utf-8")
    found = {name: hash_input(path) for name, path in (inputs or {}).items()}
    order = {"data": 1, "tokenizer": 2, "train": 3, "eval": 4}[stage.partition(".")[0]]
    manifest = {
        "schema": 1, "stage": stage, "status": "complete", "fingerprint": artifact.sha256_json([stage, str(folder)]), "pipeline": None, "config": {}, "paths": {}, "inputs": found,
        "stats": stats, "seed": 0, "code": {"package": "0", "stage": 1}, "libraries": {"python": "3"}, "device": "cpu: x86_64", "started": f"2026-01-01T00:0{order}:00Z",
        "seconds": seconds, "peak_memory_mib": 512, "folder": str(folder), **more,
    }  # fmt: skip
    artifact.publish(Target(folder), work, manifest)
    return folder


def bits(value: float, change: float | None = None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    against = {"against_first": {"change": change, "low": low, "high": high}} if change is not None else {}
    return {"bits_per_byte": value, "low": value - 0.1, "high": value + 0.1, "tokens_per_char": 1.0, **against}


def comparison(**changes: Any) -> dict[str, Any]:
    """Models whose names sort the other way round than they were measured."""
    stats: dict[str, Any] = {
        "order": ["zero", "best"], "models": {"best": {"parameters": 2_000_000, "vocabulary": 1500}, "zero": {"parameters": 1_000_000, "vocabulary": 1000}},
        "bits": {"best": {"domain": bits(1.8, -0.1, -0.12, -0.08), "general": bits(1.02, 0.02, 0.01, 0.03)}, "zero": {"domain": bits(2.0), "general": bits(1.0)}},
        "sft": {}, "exams": {}, "prompts": ["问？" + EVIL], "references": [None],
        "answers": {m: {"greedy": [{"text": EVIL}], "counts": {"distinct_1": 0.5, "chars": 9.0}} for m in ("best", "zero")},
        "guard": [{"model": "best", "set": "general", "kind": "bits", "broken": False, "shown": "+2.0 %", "limit_shown": "+5.0 %"}],
        "contamination": {"domain": {"items": 10, "found": 0, "share": 0.0, "positions": []}},
    }  # fmt: skip
    return {**stats, **changes}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "README.md").write_text("# Data\n\nLicence: CC-BY-4.0\n", encoding="utf-8")
    (raw / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    root = tmp_path / "run"
    sets = {"pretrain": {"total": 10, "kept": 8, "train": 7, "validation": 1, "dropped": {"duplicates": 1}, "quarantined": {"bad_json": 1}}}
    data = put(root / "process", "data.process", {"sets": sets, "pii": {"mobile": 2}}, inputs={"input": raw})
    curve = "".join(json.dumps({"phase": "full", "step": i, "loss": 3.0 / (i + 1)}) + "\n" for i in range(30))
    trained = put(root / "sft", "train.sft", {"steps": 30, "tokens": 5000, "train_seconds": 10.0}, inputs={"train": data}, files={"metrics.jsonl": curve, "w.txt": "w"})
    put(root / "compare", "eval.compare", comparison(), inputs={"model best": trained})
    return root


class Words(HTMLParser):
    """The text of a page, and every attribute that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.skip = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.skip = tag in ("style", "script")
        self.loads += [f"{k}={v}" for k, v in attrs if k in ("src", "srcset", "action", "data") or (k in ("href", "xlink:href") and not str(v).startswith(("#", "data:")))]

    def handle_endtag(self, tag: str) -> None:
        self.skip = False

    def handle_data(self, data: str) -> None:
        if not self.skip:
            self.text.append(data)


def words(path: Path) -> Words:
    parser = Words()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


# --- the story ------------------------------------------------------------------------------------------------------------------------------


def test_the_story_is_the_last_model_against_the_first(run: Path) -> None:
    verdict = judge(gather(run))
    assert [(f.value, f.what.en) for f in verdict.gains] == [("−10.0\xa0%", "bits per byte on “domain” text")]
    assert [(f.value, f.what.en) for f in verdict.losses] == [("+2.0\xa0%", "bits per byte on “general” text")]
    said = headline(gather(run), verdict)
    assert said.en == "The new model predicts “domain” text 10.0\xa0% better. It predicts “general” text 2.0\xa0% worse. It took 3 min."
    assert "改善 10.0" in said.zh and "变差 2.0" in said.zh and "3 分钟" in said.zh
    assert [v for v, _ in verdict.costs][1:3] == ["5,000", "0.5 GiB"]


def test_nothing_lost_is_said_and_what_an_interval_cannot_tell_is_no_change(tmp_path: Path) -> None:
    stats = comparison()
    stats["bits"]["best"]["general"] = bits(1.001, 0.001, -0.01, 0.012)
    put(tmp_path / "compare", "eval.compare", stats)
    verdict = judge(gather(tmp_path))
    assert not verdict.losses and [f.what.en for f in verdict.same] == ["bits per byte on “general” text"]
    assert "Nothing measured was lost." in headline(gather(tmp_path), verdict).en
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert "Nothing: no measured figure got worse." in page and "没有：所有测量指标均未变差。" in page


def test_multiple_choice_counts_by_its_interval(tmp_path: Path) -> None:
    def part(accuracy: float, **against: float) -> dict[str, Any]:
        more = {"against_first": against} if against else {}
        return {"right": 1, "total": 10, "accuracy": accuracy, "low": 0.0, "high": 1.0, "subjects": {}, "categories": {}, **more}

    exams = {"best": {"quiz": part(0.5, difference=0.2, low=0.1, high=0.3), "law": part(0.4, difference=-0.1, low=-0.3, high=0.1)}, "zero": {"quiz": part(0.3), "law": part(0.5)}}
    put(tmp_path / "compare", "eval.compare", comparison(exams=exams))
    verdict = judge(gather(tmp_path))
    assert [f.value for f in verdict.gains if "quiz" in f.what.en] == ["+20.0"] and [f.value for f in verdict.same] == ["−10.0"]
    assert "gets 20.0 points more of “quiz” right" in headline(gather(tmp_path), verdict).en


def test_a_run_without_a_comparison_is_told_by_what_it_has(tmp_path: Path) -> None:
    put(tmp_path / "sft", "train.sft", {"steps": 5, "tokens": 10, "eval_loss_before": 2.0, "eval_loss_after": 1.0})
    verdict = judge(gather(tmp_path))
    assert [f.value for f in verdict.gains] == ["−50.0\xa0%"]
    assert report.write(tmp_path).is_file()


def test_lineage_names_licences_and_follows_artifacts(run: Path) -> None:
    story = gather(run)
    assert [(r.name, r.licence, r.into) for r in story.raw] == [("raw", "CC-BY-4.0", "process")]
    assert {p.id: p.sources for p in story.pieces} == {"process": [], "sft": ["process"], "compare": ["sft"]}


def test_licences_are_read_or_left_open(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "LICENSE").write_text("MIT License\n\nPermission is hereby granted", encoding="utf-8")
    assert licence_of(tmp_path / "a" / "b") == "MIT" and licence_of(tmp_path) == ""


# --- the page -------------------------------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_loads_nothing_and_runs_nothing_of_the_data(run: Path) -> None:
    path = report.write(run)
    found, text = words(path), path.read_text(encoding="utf-8")
    assert path.stat().st_size < 3_000_000 and found.loads == []
    assert found.tags.count("script") == 1 and "img" not in found.tags and EVIL in "".join(found.text), "what the data says is shown as text"
    assert "@import" not in text and "url(" not in text and "default-src 'none'" in text


def test_both_languages_and_the_wanted_one_first(run: Path) -> None:
    for language, lang, auto in (("auto", "en", True), ("zh", "zh", False), ("en", "en", False)):
        text = report.write(run, run / "page.html", language=language).read_text(encoding="utf-8")
        assert f'<html lang="{lang}" data-lang="{lang}"' in text and ('data-auto="1"' in text) == auto
    assert len(re.findall('class="en"', text)) == len(re.findall('class="zh"', text)) > 40


def test_no_secret_and_no_home_path(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "canary-value-123456")
    put(run / "x", "train.pretrain", {"steps": 1, "tokens": 1}, config={"note": "canary-value-123456"})
    text = report.write(run).read_text(encoding="utf-8")
    assert "canary-value" not in text and str(run.parent) not in text


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SopError, match="no finished artifact"):
        gather(tmp_path)
    assert report.main([str(tmp_path / "absent")]) == 2 and report.main([str(tmp_path)]) == 3
    assert "fix: give the folder of a run" in capsys.readouterr().err


def test_the_command_says_where_the_page_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(run), "-o", str(tmp_path / "page.html"), "--lang", "zh", "--samples", "0"]) == 0
    assert (tmp_path / "page.html").is_file() and "page.html: 0.0" in capsys.readouterr().out


def test_ticks_are_round_and_cover() -> None:
    assert charts.ticks(0, 10) == [0, 2, 4, 6, 8, 10] and charts.ticks(0.0, 0.07, 3) == [0.0, 0.025, 0.05]
    assert charts.ticks(5, 5) and charts.ticks(float("nan"), 1.0) == []
    assert len(charts.thinned([(float(i), 1.0) for i in range(5000)])) == 400


# --- in a browser ---------------------------------------------------------------------------------------------------------------------------


MEASURE = """<script>addEventListener("load", () => {
const bottom = s => Math.round(document.querySelector(s).getBoundingClientRect().bottom);
document.body.dataset.bottoms = ["h1", ".gain", ".loss", ".cost"].map(bottom).join();
document.body.dataset.asked = performance.getEntriesByType("resource").map(e => e.name).join(" ");
});</script>"""


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's DOM after it has loaded in headless Chromium at 1280 x 800, and what it wrote to the console."""
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,800", "--enable-logging=stderr", f"--user-data-dir={profile}"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_the_story_first_without_errors_or_requests(run: Path, tmp_path: Path) -> None:
    text = report.write(run, tmp_path / "page.html", language="en").read_text(encoding="utf-8")
    shown = tmp_path / "shown.html"
    shown.write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    dom, console = browse(shown, tmp_path / "profile")
    bottoms = re.search(r'data-bottoms="([\d,]+)"', dom)
    assert console == [] and 'data-asked=""' in dom
    assert bottoms and all(0 < int(v) <= 800 for v in bottoms[1].split(",")), "headline, gains, losses and cost lie in the first 1280 x 800 view"
    shown.write_text(text.replace("</body>", '<img src="https://example.com/x.png">' + MEASURE + "</body>"), encoding="utf-8")
    assert browse(shown, tmp_path / "profile")[1], "the page's own policy refuses requests, and says so"
