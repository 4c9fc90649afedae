"""F91: one changed byte of an input changes the fingerprint, and `sop runs verify` calls everything downstream stale. Real data stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.errors import DATA, OK
from self_model_sop.ops import run as ops_run
from self_model_sop.ops import runs
from self_model_sop.ops.pipeline import load_pipeline
from self_model_sop.ops.steps import Pipeline

SAMPLE = Path(__file__).parents[2] / "data_process/sample_data"
PIPELINE = """\
name: p
shared:
  tokenizer: {work_dir: "${root}/tokenizer", corpus.inputs: ["${process}/pretrain"]}
stages:
  - fetch:   {stage: data.fetch, with: {dataset_name: raw}}
  - process: {stage: data.process, with: {input: ["${fetch}"]}}
  - corpus:  {stage: tokenizer.corpus}
"""


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config").mkdir()
    (tmp_path / "raw/pretrain").mkdir(parents=True)
    shutil.copy(SAMPLE / "pretrain/health_handouts.jsonl", tmp_path / "raw/pretrain")
    (tmp_path / "config/p.yaml").write_text(PIPELINE)
    monkeypatch.chdir(tmp_path)
    ops_run.run(pipeline(tmp_path))
    return tmp_path


def pipeline(project: Path) -> Pipeline:
    return load_pipeline(project / "config/p.yaml")


def states(project: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    runs.main(["verify", str(project / "runs"), "--json"])
    return {Path(row["path"]).parent.name if row["path"].endswith("*") else Path(row["path"]).name: row for row in json.loads(capsys.readouterr().out)}


def test_one_byte(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["verify", "runs"]) == OK
    before = {step.id: step.target for step in pipeline(done).steps}
    fingerprints = {name: json.loads(target.manifest.read_text())["fingerprint"] for name, target in before.items()}
    raw = done / "raw/pretrain/health_handouts.jsonl"
    content = raw.read_bytes()
    raw.write_bytes(content.replace("的".encode(), "地".encode(), 1))

    assert runs.main(["verify", "runs"]) == DATA
    found = states(done, capsys)
    assert len(found) == 3 and all(row["stale"] for row in found.values()), found
    assert "changed since" in found["fetch"]["stale"][0]

    redone = ops_run.run(pipeline(done))
    assert not any(a.skipped for a in redone)
    assert all(a.manifest["fingerprint"] != fingerprints[step.id] for a, step in zip(redone, pipeline(done).steps, strict=True))
    assert runs.main(["verify", "runs"]) == OK

    raw.write_bytes(content)
    assert [a.manifest["fingerprint"] for a in ops_run.run(pipeline(done))] == list(fingerprints.values()), "the old question again"


def test_the_chain_leads_from_the_last_artifact_to_the_raw_file(done: Path) -> None:
    """F93 for the data stages: what an artifact was made from is the output of another one with the same hash, or raw data."""
    found = runs.find(done / "runs")
    runs.connect(found)
    names = {f.manifest["stage"]: f for f in found if f.manifest}
    assert [s.manifest["stage"] for s in names["tokenizer.corpus"].sources if s.manifest] == ["data.process"]
    assert [s.manifest["stage"] for s in names["data.process"].sources if s.manifest] == ["data.fetch"]
    assert names["data.fetch"].sources == [] and names["data.fetch"].manifest
    (raw,) = names["data.fetch"].manifest["inputs"].values()
    assert Path(raw["path"]).is_relative_to(done / "raw")
    for item in found:
        assert item.manifest and item.manifest["code"]["package"] and item.manifest["libraries"]["python"] and item.manifest["config"]
