"""F92: an output that was changed by hand is named by `sop runs verify`, exit 3, however it was changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from light_stages import WRITE, WriteConfig
from self_model_sop.errors import DATA, SopError
from self_model_sop.ops import runs


def same_size_and_time(path: Path) -> None:
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"line", b"LINE", 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "edited": (lambda p: p.write_text("{}\n"), "changed since it was made"),
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-3]), "changed since it was made"),
    "appended": (lambda p: p.write_bytes(p.read_bytes() + b"{}\n"), "changed since it was made"),
    "removed": (lambda p: p.unlink(), "missing"),
    "one byte, same size and time": (same_size_and_time, "changed since it was made"),
    "replaced by a folder": (lambda p: (p.unlink(), p.mkdir()), "changed since it was made"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_verify_names_the_file(tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    WRITE.run(WriteConfig(output_dir=tmp_path / "out", files=3))
    edit, word = CHANGES[change]
    edit(tmp_path / "out/part/001.jsonl")
    assert runs.main(["verify", str(tmp_path)]) == DATA
    captured = capsys.readouterr()
    assert f"part/001.jsonl: {word}" in captured.out and "000.jsonl" not in captured.out and "1 artifacts are not what they should be" in captured.err


@pytest.mark.parametrize("change", [c for c in CHANGES if "same size" not in c])
def test_the_next_run_does_not_build_on_it(tmp_path: Path, change: str) -> None:
    config = WriteConfig(output_dir=tmp_path / "out", files=3)
    WRITE.run(config)
    CHANGES[change][0](tmp_path / "out/part/001.jsonl")
    with pytest.raises(SopError, match=r"part/001\.jsonl") as caught:
        WRITE.run(config)
    assert caught.value.code == DATA
