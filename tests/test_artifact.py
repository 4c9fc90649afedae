"""Hashes, manifests, locks, and publishing: the old artifact, the new one, or none with a manifest."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from self_model_sop import artifact
from self_model_sop.artifact import Target
from self_model_sop.errors import DATA, LOCKED, USAGE, SopError


def manifest(**more: Any) -> dict[str, Any]:
    return {"schema": 1, "stage": "data.write", "fingerprint": "f" * 64, **more}


def publish(target: Target, files: dict[str, str], *, overwrite: bool = False) -> dict[str, Any]:
    target.folder.mkdir(parents=True, exist_ok=True)
    work = target.work("abc")
    for name, text in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text)
    return artifact.publish(target, work, manifest(), overwrite=overwrite)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file() and "manifest" not in p.name}


def test_publish_lists_what_it_wrote(tmp_path: Path) -> None:
    done = publish(Target(tmp_path / "out"), {"a.jsonl": "{}\n{}\n", "deep/b.txt": "x"})
    a, b = done["outputs"]
    assert (a["path"], a["rows"], a["size"], a["sha256"]) == ("a.jsonl", 2, 6, hashlib.sha256(b"{}\n{}\n").hexdigest())
    assert b["path"] == "deep/b.txt" and "rows" not in b
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == done
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.jsonl", "deep", "manifest.json"], "no debris"


def test_a_new_version_replaces_exactly_the_old_files(tmp_path: Path) -> None:
    target = Target(tmp_path)
    publish(target, {"a.txt": "1", "old/only.txt": "2", "both.txt": "3"})
    (tmp_path / "mine.txt").write_text("of the user")
    publish(target, {"both.txt": "4", "new/n.txt": "5"})
    assert tree(tmp_path) == {"both.txt": "4", "new/n.txt": "5", "mine.txt": "of the user"}
    assert not (tmp_path / "old").exists()


def test_a_file_of_the_user_is_never_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("of the user")
    with pytest.raises(SopError, match=r"files that no manifest names are in the way: a\.txt") as caught:
        publish(Target(tmp_path), {"a.txt": "1"})
    assert caught.value.code == USAGE and (tmp_path / "a.txt").read_text() == "of the user"
    publish(Target(tmp_path), {"a.txt": "1"}, overwrite=True)
    assert (tmp_path / "a.txt").read_text() == "1"


def test_groups_share_a_folder(tmp_path: Path) -> None:
    publish(Target(tmp_path, "one"), {"one.jsonl": "1\n"})
    publish(Target(tmp_path, "two"), {"two.jsonl": "2\n"})
    assert tree(tmp_path) == {"one.jsonl": "1\n", "two.jsonl": "2\n"}
    publish(Target(tmp_path, "one"), {"one.jsonl": "3\n"})
    assert tree(tmp_path) == {"one.jsonl": "3\n", "two.jsonl": "2\n"}


def test_sweep_removes_what_a_killed_run_left_and_nothing_else(tmp_path: Path) -> None:
    target = Target(tmp_path)
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "half.txt").write_text("debris")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/half.txt").write_text("debris")
    target.hidden("journal").write_text(json.dumps({"files": ["half.txt", "sub/half.txt", "never.txt"]}))
    target.work("other").mkdir()
    target.work("same").mkdir()
    (tmp_path / ".manifest.json.tmp-99").write_text("x")
    assert artifact.sweep(target, keep="same") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [target.work("same").name, "mine.txt"]


def test_sweep_after_the_manifest_was_written_keeps_the_files(tmp_path: Path) -> None:
    target = Target(tmp_path)
    publish(target, {"a.txt": "1"})
    target.hidden("journal").write_text(json.dumps({"files": ["a.txt"]}))
    artifact.sweep(target)
    assert tree(tmp_path) == {"a.txt": "1"} and not target.hidden("journal").exists()


def test_sweep_spares_a_complete_checkpoint(tmp_path: Path) -> None:
    target = Target(tmp_path)
    (target.work("trained") / "checkpoints/step-5").mkdir(parents=True)
    (target.work("trained") / "checkpoints/step-5/COMPLETE.json").write_text("{}")
    assert artifact.sweep(target, keep="other") == [target.work("trained")]
    assert target.work("trained").exists()


def test_sweep_survives_a_torn_journal(tmp_path: Path) -> None:
    Target(tmp_path).hidden("journal").write_text('{"files": ["a')
    artifact.sweep(Target(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_differences_see_missing_and_changed_files(tmp_path: Path) -> None:
    target = Target(tmp_path)
    done = publish(target, {"a.txt": "1", "b.txt": "2", "c.txt": "3"})
    assert artifact.differences(target, done) == []
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").write_text("x")
    assert artifact.differences(target, done) == ["a.txt: missing", "b.txt: changed"]
    os.utime(tmp_path / "c.txt")
    assert artifact.differences(target, done) == ["a.txt: missing", "b.txt: changed"], "touched, same bytes"


def test_a_change_that_keeps_size_and_time_shows_only_in_depth(tmp_path: Path) -> None:
    target = Target(tmp_path)
    done = publish(target, {"a.txt": "1"})
    (tmp_path / "a.txt").write_text("2")
    os.utime(tmp_path / "a.txt", ns=(0, done["outputs"][0]["mtime_ns"]))
    assert artifact.differences(target, done) == []
    assert artifact.differences(target, done, deep=True) == ["a.txt: changed"]


def test_hash_of_a_folder_covers_names_and_contents(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        found: str = artifact.hash_input(tmp_path / name)["sha256"]
        return found

    one = folder("one", {"a": "1", "b/c": "2"})
    assert one == folder("two", {"b/c": "2", "a": "1", ".hidden": "x", "manifest.json": "y"}), "hidden files and manifests are no content"
    assert one != folder("three", {"a": "1", "b/d": "2"})
    assert one != folder("four", {"a": "1", "b/c": "3"})
    assert one != folder("five", {"a": "1", "b/c": "2", "e": ""})


def test_a_known_hash_is_reused_only_while_size_and_time_hold(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("one")
    known = {**artifact.hash_input(path), "sha256": "from before"}
    assert artifact.hash_input(path, known)["sha256"] == "from before"
    path.write_text("two")
    os.utime(path, ns=(0, known["mtime_ns"] + 1))
    assert artifact.hash_input(path, known)["sha256"] == hashlib.sha256(b"two").hexdigest()
    with pytest.raises(SopError, match="no such file"):
        artifact.hash_input(tmp_path / "gone")


@pytest.mark.parametrize(("text", "code"), [("{", DATA), ("[]", DATA), ('{"a": 1}', DATA), ('{"schema": 99}', USAGE)])
def test_what_is_no_manifest_is_said_so(tmp_path: Path, text: str, code: int) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(SopError) as caught:
        artifact.read_manifest(tmp_path / "manifest.json")
    assert caught.value.code == code and caught.value.fix and str(tmp_path) in str(caught.value)
    assert artifact.read_manifest(tmp_path / "none.json") is None


def test_the_lock_names_the_holder_and_is_free_afterwards(tmp_path: Path) -> None:
    target = Target(tmp_path)
    with artifact.lock(target):
        with pytest.raises(SopError, match=rf"another run \(pid {os.getpid()}\)") as caught, artifact.lock(target):
            pytest.fail("two holders")
        assert caught.value.code == LOCKED
    with artifact.lock(target):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    code = f"import os; from pathlib import Path; from self_model_sop import artifact\nwith artifact.lock(artifact.Target(Path({str(tmp_path)!r}))): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / ".lock").exists()
    with artifact.lock(Target(tmp_path)):
        pass


def test_a_failed_small_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    artifact.write_atomic(path, "old")

    def broken(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="No space"):
        artifact.write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(("content", "rows"), [(b"", 0), (b"a\n", 1), (b"a\nb", 2), (b"\n\n", 2)])
def test_count_lines(tmp_path: Path, content: bytes, rows: int) -> None:
    (tmp_path / "f").write_bytes(content)
    assert artifact.count_lines(tmp_path / "f") == rows


def test_a_holder_that_has_not_written_its_pid_yet_is_waited_for(tmp_path: Path) -> None:
    """The lock is taken before the pid is written; a dead one's pid may still stand there."""
    path = tmp_path / ".lock"
    path.write_text("4194999")
    holder = os.open(path, os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    timer = threading.Timer(0.1, lambda: os.pwrite(holder, str(os.getpid()).encode().ljust(7), 0))
    timer.start()
    with pytest.raises(SopError, match=rf"another run \(pid {os.getpid()}\)"), artifact.lock(Target(tmp_path)):
        pytest.fail("two holders")
    timer.join()
    os.close(holder)
