"""Every YAML file in config/ is valid for the command that reads it, and every stage's defaults are too."""

from __future__ import annotations

from pathlib import Path

import pytest

from self_model_sop.ops.config import check_file, kind_of
from self_model_sop.stages import STAGES

ROOT = Path(__file__).parents[1]
FILES = sorted(p for p in (ROOT / "config").rglob("*.yaml") if p.parent.name not in ("pipeline",))


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "config")))
def test_it_is_valid(path: Path) -> None:
    assert check_file(path, check_paths=False).name


@pytest.mark.parametrize("entry", [e for e in STAGES if e.config], ids=lambda e: e.name)
def test_it_is_recognised_by_its_place(entry: object) -> None:
    name = getattr(entry, "name", "")
    readers = [e.name for e in STAGES if e.config == getattr(entry, "config", "")]
    assert kind_of(ROOT / getattr(entry, "config", "")).name == readers[0] and name in readers


@pytest.mark.parametrize("path", sorted((ROOT / "config/pipeline").glob("*.yaml")), ids=lambda p: p.name)
def test_pipelines_name_real_stages(path: Path) -> None:
    from self_model_sop.config import ConfigError
    from self_model_sop.ops.pipeline import load_pipeline

    try:
        pipeline = load_pipeline(path)
    except ConfigError as error:  # data beside the project may be absent; everything else must be right
        absent = [p for p in error.problems if "no such file or folder" in p.what and ("../shared" in p.what or "shared/" in p.what)]
        assert error.problems == absent
        pytest.skip("the pipeline's data is not here")
    assert len(pipeline.steps) > 3
