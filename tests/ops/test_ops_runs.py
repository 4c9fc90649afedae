"""`sop runs ls` and `verify`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from light_stages import JOIN, WRITE, JoinConfig, WriteConfig
from self_model_sop.artifact import Target
from self_model_sop.errors import DATA, OK, USAGE
from self_model_sop.ops import runs


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """raw -> first -> second (two levels)."""
    (tmp_path / "raw.txt").write_text("raw ")
    WRITE.run(WriteConfig(output_dir=tmp_path / "runs/first", source=tmp_path / "raw.txt", files=2))
    JOIN.run(JoinConfig(output_dir=tmp_path / "runs/second", input=(tmp_path / "runs/first",)))
    WRITE.run(WriteConfig(output_dir=tmp_path / "runs/third", source=tmp_path / "runs/second/count.txt"))
    WRITE.run(WriteConfig(output_dir=tmp_path / "runs/other"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def states(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    capsys.readouterr()
    runs.main(["verify", str(folder), "--json"])
    return {Path(row["path"]).name: row["state"] for row in json.loads(capsys.readouterr().out)}


def test_all_is_well(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["verify"]) == OK
    captured = capsys.readouterr()
    assert "4 artifacts, 5 files: all as their manifests say" in captured.err and captured.out.count(": ok") == 4
    assert runs.main(["ls"]) == OK
    assert "data.join" in capsys.readouterr().out
    runs.main(["ls", "--json"])
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["ok"] * 4


def test_a_moved_tree_still_verifies(chain: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    shutil.move(chain, moved)
    assert set(states(moved / "runs", capsys).values()) == {"ok"}


def test_an_edited_output_makes_what_follows_stale(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (chain / "runs/first/part/001.jsonl").write_text("{}\n")
    found = states(chain / "runs", capsys)
    assert found["first"] == "part/001.jsonl: changed since it was made"
    assert found["second"].startswith("stale: input input.0 changed since") and "second, which is not what it should be" in found["third"] and found["other"] == "ok"
    assert runs.main(["verify", str(chain / "runs")]) == DATA


def test_an_incomplete_artifact_is_named(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Target(chain / "runs/torn").work("abc").mkdir(parents=True)
    Target(chain / "runs/other").hidden("journal").write_text("{}")
    (chain / "runs/other/manifest.json").unlink()
    found = states(chain / "runs", capsys)
    assert found["torn"] == found["other"] == "incomplete"
    assert runs.main(["verify", str(chain / "runs")]) == DATA
    assert "a run was killed here" in capsys.readouterr().out


def test_an_edited_manifest_is_noticed(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = chain / "runs/other/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["lines"] = 99
    path.write_text(json.dumps(manifest))
    assert states(chain / "runs", capsys)["other"] == "manifest: its fingerprint does not fit its own entries"


def test_an_added_file_is_noticed(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (chain / "runs/other/extra.txt").write_text("x")
    assert states(chain / "runs", capsys)["other"] == "extra.txt: not in the manifest"


def test_foreign_manifests_are_left_alone(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (chain / "runs/web").mkdir()
    (chain / "runs/web/manifest.json").write_text('{"name": "a web app"}')
    assert "web" not in states(chain / "runs", capsys)


def test_usage(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["verify", "gone"]) == USAGE
    (chain / "empty").mkdir()
    assert runs.main(["verify", "empty"]) == DATA
    assert runs.main(["ls", "empty"]) == OK
    assert "no artifacts below empty" in capsys.readouterr().out
