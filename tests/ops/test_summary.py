"""The summary of a pipeline: every table from the manifests' stats, on the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import light_stages
from self_model_sop import stages
from self_model_sop.ops import run as ops_run
from self_model_sop.ops import summary
from self_model_sop.ops.pipeline import load_pipeline

PROCESS: dict[str, Any] = {
    "sets": {
        "pretrain": {
            "total": 267, "kept": 242, "train": 227, "validation": 15, "added_by_split": 0, "quarantined": {"not_json": 1},
            "dropped": {"duplicates": 8, "near_duplicates": 16, "too_long": 0},
        },
        "reward": {"total": 11, "kept": 10, "train": 9, "validation": 1, "added_by_split": 0, "dropped": {"chosen_equals_rejected": 1}, "quarantined": {}},
    },
    "pii": {"mobile": 4},
}  # fmt: skip
TOKENIZER: dict[str, Any] = {
    "tokens_per_char_before": 1.83, "tokens_per_char_after": 0.79, "reduction": 0.5683, "changed_regression_lines": {"english": 0, "code": 0, "japanese": 60},
    "new_tokens": {"count": 1500, "used_on_test": 1322},
}  # fmt: skip


def answer(text: str) -> dict[str, Any]:
    return {"greedy": [{"text": text}, {"text": "x" * 2000}]}


COMPARE: dict[str, Any] = {
    "models": {"base": {"parameters": 134_500_000, "vocabulary": 49_152}, "merge": {"parameters": 135_400_000, "vocabulary": 50_652}},
    "bits": {"base": {"domain": {"bits_per_byte": 2.75}}, "merge": {"domain": {"bits_per_byte": 2.2}}},
    "sft": {"base": {"bits_per_byte": 4.0}, "merge": {"bits_per_byte": 3.0}}, "prompts": ["问题？", "other"],
    "answers": {"base": answer("line [bold]one[/bold]\nwith | and <b>"), "merge": answer("")},
}  # fmt: skip


def test_the_funnel_adds_up() -> None:
    table = summary.data_table("process", PROCESS)
    cells = {row[0]: row[1:] for row in table.rows}
    assert list(table.header) == ["", "pretrain", "reward"] and cells["rows read"] == ["267", "11"] and cells["kept"] == ["242", "10"] and cells["quarantined"] == ["1", "0"]
    assert cells["dropped: near duplicates"] == ["16", "0"] and "dropped: too long" not in cells, "reasons that nothing was dropped for are left out"
    for column in (0, 1):
        read, kept, gone = int(cells["rows read"][column]), int(cells["kept"][column]), sum(int(v[column]) for k, v in cells.items() if k.startswith(("dropped", "quarantined")))
        assert read == kept + gone
    assert table.note == "personal data masked: mobile 4"


def test_the_tokenizer_s_table() -> None:
    table = summary.tokenizer_table(TOKENIZER)
    assert table.rows[0][1:] == ["1.830", "0.790", "-56.8%"]
    assert table.rows[1][2] == "0" and "japanese 60" in table.note and "1,322 of them used" in table.note


def test_models_are_shown_against_the_first() -> None:
    table = summary.models_table(COMPARE)
    assert table.rows == [["base", "134.5 M", "49,152", "2.750", "4.000"], ["merge", "135.4 M", "50,652", "2.200 (-20.0%)", "3.000 (-25.0%)"]]


def test_answers_side_by_side() -> None:
    (table,) = summary.answers_table(COMPARE, 50)
    assert list(table.header) == ["question", "base", "merge"]
    assert table.rows[0] == ["问题？", "line [bold]one[/bold] with | and <b>", "(empty)"]
    assert table.rows[1][1] == "x" * 50 + "…"
    assert list(summary.answers_table({**COMPARE, "answers": {}}, 50)) == []


def test_terminal_markdown_and_json_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(stages, "STAGES", stages.STAGES)
    light_stages.add_to_table()
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text("name: small\nstages:\n  - one: {stage: data.write}\n  - two: {stage: data.join, with: {input: ['${one}']}}\n")
    ops_run.run(load_pipeline(tmp_path / "p.yaml"))
    out = capsys.readouterr().out
    assert "data.write" in out and "2 stages done, 0 up to date" in out and "sop runs verify runs/small" in out
    written = json.loads((tmp_path / "runs/small/summary.json").read_text())
    assert [s["id"] for s in written["stages"]] == ["one", "two"] and written["stages"][1]["stats"] == {"count": 3}
    assert written["peak_memory_mib"] > 0 and all(len(s["content_hash"]) == 64 for s in written["stages"])
    page = (tmp_path / "runs/small/summary.md").read_text()
    assert page.startswith("# small\n") and "| one | data.write | done |" in page
    ops_run.run(load_pipeline(tmp_path / "p.yaml"))
    assert "0 stages done, 2 up to date" in capsys.readouterr().out
    again = json.loads((tmp_path / "runs/small/summary.json").read_text())
    assert [s["content_hash"] for s in again["stages"]] == [s["content_hash"] for s in written["stages"]]
    assert again["seconds_of_work"] == written["seconds_of_work"], "the times are those of the run that did the work"


def test_markdown_cells_are_escaped() -> None:
    assert summary._cell("a|b <c>\nd\\") == "a\\|b &lt;c> d\\\\"
