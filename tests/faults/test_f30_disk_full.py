"""F30: no space at any write: exit 6 and how much there is, the old artifact intact, no new name; and a rerun with space succeeds."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from self_model_sop import artifact
from self_model_sop.artifact import Target
from self_model_sop.errors import DISK, OK

TESTS = Path(__file__).parents[1]
CHILD, LIGHT = str(TESTS / "faulty_child.py"), str(TESTS / "light_stages.py")


def child(mode: str, k: int, out: Path, *rest: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CHILD, mode, str(k), str(out), *rest], capture_output=True, text=True, check=False, timeout=60)


def content(out: Path) -> str | None:
    manifest = artifact.read_manifest(Target(out).manifest)
    if manifest is None:
        return None
    assert artifact.differences(Target(out), manifest, deep=True) == []
    return artifact.content_hash(manifest)


def fail_at(k: int, out: Path) -> bool:
    """True if the k-th write failed; False where there are fewer writes."""
    assert child("count", 0, out, "files=3", "word=old").returncode == OK
    before = content(out)
    done = child("full", k, out, "files=4", "word=new", "--overwrite")
    if done.returncode == OK:
        return False
    assert done.returncode == DISK and "No space left on device" in done.stderr and "MiB free" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert content(out) in (before, None), "the old artifact, or one that is marked incomplete; never a new name without its manifest"
    assert child("count", 0, out, "files=4", "word=new", "--overwrite").returncode == OK
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "part"] and len(list((out / "part").iterdir())) == 4
    return True


def test_a_sample_of_writes(tmp_path: Path) -> None:
    for n, k in enumerate(random.Random(30).sample(range(1, 20), 4)):
        fail_at(k, tmp_path / str(n))
    assert fail_at(2, tmp_path / "second")


@pytest.mark.exhaustive
def test_every_write(tmp_path: Path) -> None:
    k = 1
    while fail_at(k, tmp_path / str(k)):
        k += 1
    assert k > 10


def test_until_publishing_the_old_artifact_is_untouched(tmp_path: Path) -> None:
    """All writes of the build happen in the work folder: a disk that fills up there costs nothing."""
    out = tmp_path / "out"
    child("count", 0, out, "files=3", "word=old")
    before = content(out)
    for k in (2, 5, 7):
        assert child("full", k, out, "files=4", "word=new", "--overwrite").returncode == DISK
        assert content(out) == before is not None


def test_a_limit_of_the_system_on_file_size(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = subprocess.run(
        [sys.executable, "-B", LIGHT, "data", "write", "lines=5000", f"output_dir={tmp_path / 'out'}"], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == DISK and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert not Target(tmp_path / "out").manifest.exists() and not (tmp_path / "out/data.jsonl").exists()


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    """A file system of 256 KiB in a mount namespace of its own."""
    mount = tmp_path / "small"
    mount.mkdir()
    write = f"{sys.executable} -B {LIGHT} data write output_dir={mount}/out"
    commands = f"mount -t tmpfs -o size=256k none {mount} && {write} lines=20 >/dev/null && {write} lines=50000 --overwrite; echo code $?; ls -A {mount}/out; {write} lines=20"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", commands], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert f"code {DISK}" in done.stdout and "No space left on device" in done.stderr and "(0 MiB free)" in done.stderr
    assert "data.jsonl\nmanifest.json" in done.stdout and "up to date" in done.stdout, "the old artifact is intact and still answers"
