"""F30: no space at the k-th write of `sop data process`: exit 6, the old artifact intact, no new name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from self_model_sop.artifact import Target, content_hash, differences
from self_model_sop.data.records import write_jsonl

# The k-th write to a file of the output tree fails with ENOSPC, wherever it comes from: every file is opened through one audited function.
CODE = """
import builtins, errno, io, os, sys
from pathlib import Path

out, fail_at = sys.argv[1], int(sys.argv[2])
count = 0
real_open = io.open


def opened(file, mode="r", *rest, **options):
    f = real_open(file, mode, *rest, **options)
    if out in str(file) and any(c in mode for c in "wax+"):
        write = f.write

        def failing(data):
            global count
            count += 1
            if count == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            return write(data)

        try:
            f.write = failing
        except AttributeError:
            return Proxy(f, failing)
    return f


class Proxy:
    def __init__(self, inner, failing):
        self._inner, self.write = inner, failing

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._inner.close()


io.open = builtins.open = opened
from self_model_sop.data.process import main

code = main(sys.argv[3:])
print("writes", count)
raise SystemExit(code)
"""


def run(folder: Path, fail_at: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, str(folder / "out"), str(fail_at), "--input", str(folder / "in.jsonl"), "--output_dir", str(folder / "out"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows(count: int) -> list[dict[str, str]]:
    return [{"text": f"第{i}条：" + "，".join(str(i * 7919 * k % 99991) for k in range(12))} for i in range(count)] + [{"text": "短"}] * 3


def fail_at_every(folder: Path, step: int) -> None:
    write_jsonl(folder / "in.jsonl", rows(40))
    assert run(folder, 0).returncode == 0
    before = json.loads((folder / "out" / "manifest.json").read_text(encoding="utf-8"))
    names = {str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*")}
    write_jsonl(folder / "in.jsonl", rows(60))
    whole = run(folder, 0, "--output_dir", str(folder / "fresh"))
    assert whole.returncode == 0
    total, k = 10_000, 1
    while k <= total:
        done = run(folder, k, "--overwrite")
        if done.returncode == 0:
            break
        assert done.returncode == 6, done.stderr
        assert "No space left" in done.stderr and "MiB free" in done.stderr and "Traceback" not in done.stderr
        manifest = folder / "out" / "manifest.json"
        if manifest.exists():
            assert differences(Target(folder / "out"), json.loads(manifest.read_text(encoding="utf-8")), deep=True) == []
            assert content_hash(json.loads(manifest.read_text(encoding="utf-8"))) == content_hash(before)
            assert {str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*") if not any(x.startswith(".") for x in p.relative_to(folder / "out").parts)} == names
        k += step
    assert k > 50  # as many writes as that were made to fail
    assert run(folder, 0, "--overwrite").returncode == 0
    assert content_hash(json.loads((folder / "out" / "manifest.json").read_text(encoding="utf-8"))) == content_hash(
        json.loads((folder / "fresh" / "manifest.json").read_text(encoding="utf-8"))
    )


@pytest.mark.slow
def test_f30_some_writes(tmp_path: Path) -> None:
    fail_at_every(tmp_path, 29)


@pytest.mark.exhaustive
def test_f30_every_write(tmp_path: Path) -> None:
    fail_at_every(tmp_path, 1)
