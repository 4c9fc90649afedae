"""F95: a manifest of a newer version is refused clearly by everything that reads manifests, and nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from light_stages import WRITE, WriteConfig
from self_model_sop.errors import USAGE, SopError
from self_model_sop.ops import runs


def test_newer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    WRITE.run(WriteConfig(output_dir=tmp_path / "out"))
    path = tmp_path / "out/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    before = path.read_bytes()
    with pytest.raises(SopError, match=r"written by a newer version \(manifest schema 99") as caught:
        WRITE.run(WriteConfig(output_dir=tmp_path / "out"), overwrite=True)
    assert caught.value.code == USAGE and "upgrade" in str(caught.value)
    for verb in ("ls", "verify"):
        assert runs.main([verb, str(tmp_path)]) == USAGE
        assert "newer version" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_no_manifest_of_ours(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(SopError, match="this is no manifest"):
        WRITE.run(WriteConfig(output_dir=tmp_path / "out"))
    assert (tmp_path / "out/manifest.json").read_text() == '{"name": "a web app"}'
