"""`sop run`: checks everything first, does what is not up to date, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import light_stages
from self_model_sop import stages
from self_model_sop.config import ConfigError
from self_model_sop.errors import DATA, OK, USAGE, SopError
from self_model_sop.ops import run as ops_run
from self_model_sop.ops.pipeline import load_pipeline
from self_model_sop.ops.steps import Pipeline

PIPELINE = """\
name: small
root: runs/small
shared:
  data: {seed: 3}
stages:
  - first:  {stage: data.write, config: config/write.yaml, with: {source: raw/head.txt}}
  - second: {stage: data.write, with: {lines: 5, output_dir: "${root}/elsewhere"}}
  - both:   {stage: data.join, with: {input: ["${first}", "${second}/data.jsonl"], table: {a: 1}}}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stages, "STAGES", stages.STAGES)
    light_stages.add_to_table()
    (tmp_path / "config/pipeline").mkdir(parents=True)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/head.txt").write_text("head ", encoding="utf-8")
    (tmp_path / "config/write.yaml").write_text("lines: 4\nword: hello\n", encoding="utf-8")
    (tmp_path / "config/pipeline/small.yaml").write_text(PIPELINE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(project: Path, text: str | None = None, *overrides: str) -> Pipeline:
    path = project / "config/pipeline/small.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    return load_pipeline(path, overrides)


def problems(project: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(project, text, *overrides)
    return [str(p) for p in caught.value.problems]


def test_references_and_settings(project: Path) -> None:
    first, second, both = load(project).steps
    assert first.target.folder == project / "runs/small/first"
    assert (first.config.lines, first.config.word, first.config.seed, first.config.source) == (4, "hello", 3, project / "raw/head.txt")
    assert second.target.folder == project / "runs/small/elsewhere"
    assert both.config.input == (project / "runs/small/first", project / "runs/small/elsewhere/data.jsonl")
    folders = {"first": first.target.folder, "second": second.target.folder}
    assert both.needs(folders) == {"first", "second"} and not first.needs(folders)


def test_runs_once_and_then_only_what_depends_on_a_change(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = ops_run.run(load(project))
    assert [a.skipped for a in done] == [False, False, False]
    assert (project / "runs/small/both/count.txt").read_text() == "9\n"
    assert json.loads((project / "runs/small/first/data.jsonl").read_text().splitlines()[0]) == {"text": "headhello 0.0"}
    capsys.readouterr()

    assert all(a.skipped for a in ops_run.run(load(project)))
    assert capsys.readouterr().out.count(": up to date -> ") == 3

    assert [a.skipped for a in ops_run.run(load(project, PIPELINE.replace("lines: 5", "lines: 6")))] == [True, False, False]
    assert "lines: 5 -> 6" in capsys.readouterr().out
    assert [a.skipped for a in ops_run.run(load(project, PIPELINE.replace("lines: 5", "lines: 6").replace("a: 1", "a: 2")))] == [True, True, False]


def test_cosmetic_change_and_moved_project_stay_up_to_date(project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    ops_run.run(load(project))
    assert all(a.skipped for a in ops_run.run(load(project, None, "first.note=seen", "first.pause=0.001")))
    moved = tmp_path_factory.mktemp("moved") / "项目 two"
    project.rename(moved)
    monkeypatch.chdir(moved)
    assert all(a.skipped for a in ops_run.run(load(moved)))


def test_from_does_again_what_is_up_to_date(project: Path) -> None:
    pipeline = load(project)
    before = [a.manifest for a in ops_run.run(pipeline)]
    after = ops_run.run(pipeline, first=pipeline.index("second"))
    assert [a.skipped for a in after] == [True, False, False]
    assert [a.manifest["fingerprint"] for a in after] == [m["fingerprint"] for m in before]
    with pytest.raises(SopError, match="no stage 'secnd'") as caught:
        pipeline.index("secnd")
    assert "second" in str(caught.value)


def test_dry_run_says_what_would_run_and_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(project / "config/pipeline/small.yaml")
    assert ops_run.main([path, "--dry-run"]) == OK
    assert not (project / "runs").exists()
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] first (data.write): to run (not there yet) -> runs/small/first",
        "[2/3] second (data.write): to run (not there yet) -> runs/small/elsewhere",
        "[3/3] both (data.join): to run (not there yet) -> runs/small/both",
    ]
    assert ops_run.main(["small"]) == OK
    capsys.readouterr()
    assert ops_run.main([path, "--dry-run", "second.lines=7"]) == OK
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("[1/3] first (data.write): up to date")
    assert "lines: 5 -> 7" in out[1] and "after second" in out[2]


def test_an_artifact_of_another_hand_is_not_replaced(project: Path) -> None:
    light_stages.WRITE.run(light_stages.WriteConfig(output_dir=project / "runs/small/first", lines=9))
    with pytest.raises(SopError, match="made with other settings") as caught:
        ops_run.run(load(project))
    assert caught.value.code == USAGE and "lines: 9 -> 4" in str(caught.value)
    assert not any(a.skipped for a in ops_run.run(load(project), overwrite=True))


def test_edited_output_is_made_again(project: Path) -> None:
    ops_run.run(load(project))
    (project / "runs/small/first/data.jsonl").write_text("edited\n")
    assert [a.skipped for a in ops_run.run(load(project))] == [False, True, True], "the same bytes come out, so nothing follows"


def test_a_failing_stage_keeps_those_before_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(project / "config/pipeline/small.yaml")
    assert ops_run.main([path, "second.word=fail"]) == DATA
    assert "asked to fail" in capsys.readouterr().err
    assert [a.skipped for a in ops_run.run(load(project))] == [True, False, False]


def test_all_problems_at_once_before_anything_runs(project: Path) -> None:
    text = PIPELINE.replace("stage: data.join", "stage: data.joint").replace("raw/head.txt", "raw/heads.txt").replace("lines: 5", "linse: 5").replace("${first}", "${frist}")
    text = text.replace("name: small", "name: small\nrooot: x").replace("config/write.yaml", "config/wirte.yaml")
    found = problems(project, text)
    assert [f.split(": ", 1)[0].rsplit(":", 1)[1] for f in found] == ["2", "7", "7", "8", "9"]
    joined = "\n".join(found)
    for text in ("unknown key 'rooot'; did you mean 'root'?", "did you mean 'head.txt'?", "did you mean 'write.yaml'?", "did you mean 'lines'?", "did you mean 'data.join'?"):
        assert text in joined
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("${first}", "${both}"), "${both} is a later stage, or this one"),
        (("${first}", "${frist}"), "${frist} names no stage; did you mean ${first}?"),
        (("- second:", "- first:"), "two stages have the id 'first'"),
        (("- second:", "- root:"), "'root' is no id"),
        (("shared:", "sharde:"), "unknown key 'sharde'; did you mean 'shared'?"),
        (("  data: {seed: 3}", "  date: {seed: 3}"), "unknown key 'date'; did you mean 'data'?"),
        (("seed: 3", "sead: 3"), "unknown key 'sead'; did you mean 'seed'?"),
        (("stage: data.join", "stage: infer.chat"), "infer.chat makes no artifact"),
        (("/elsewhere", "/first"), "writes to the same place as 'first'"),
        (("lines: 5", "lines: five"), "lines: expected integer, got \"five\""),
        (("lines: 5", "lines: -5"), "lines: must not be negative"),
        (("with: {lines", "with: {huggingface.offline: true, lines"), "second: its huggingface settings (source, endpoint, offline, cache_dir) differ from those of 'first'"),
        (("with: {lines", "wiht: {lines"), "unknown key 'wiht'; did you mean 'with'?"),
        (("stages:", "evaluation: {after: [first, frist], texts: {t: raw/head.txt}}\nstages:"), "evaluation.after: no stage 'frist'; did you mean 'first'?"),
    ],
)
def test_problems_of_a_pipeline(project: Path, change: tuple[str, str], expected: str) -> None:
    found = problems(project, PIPELINE.replace(*change))
    assert any(expected in line for line in found), found
    assert all(line.startswith("config/pipeline/small.yaml:") for line in found), found


def test_overrides(project: Path) -> None:
    pipeline = load(project, None, "root=other", "shared.data.seed=8", "first.lines=2", "both.table.b=2")
    assert pipeline.root == project / "other"
    assert [s.config.seed for s in pipeline.steps] == [8, 8, 8]
    assert pipeline.steps[0].config.lines == 2
    assert pipeline.steps[2].config.table == {"a": 1, "b": 2}
    assert "did you mean 'first'?" in problems(project, PIPELINE, "frist.lines=2")[0]
    assert "names no key" in problems(project, PIPELINE, "lines=2")[0]


def test_paths_of_overrides_are_relative_to_the_working_directory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "sub").mkdir()
    (project / "sub/mine.txt").write_text("x")
    monkeypatch.chdir(project / "sub")
    pipeline = load(project, None, "first.source=mine.txt", "root=here")
    assert pipeline.steps[0].config.source == project / "sub/mine.txt"
    assert pipeline.root == project / "sub/here"


def test_no_such_pipeline(project: Path) -> None:
    with pytest.raises(SopError, match="no such pipeline") as caught:
        load_pipeline(Path("smal"))
    assert "did you mean 'small'?" in str(caught.value)
