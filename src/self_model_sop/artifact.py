"""Artifacts on disk: written in a hidden work folder, moved into place, described by a manifest that comes last.

A kill at any moment leaves the old artifact, the new one, or one without a manifest (incomplete); never a torn one with a manifest.
A journal written before the first move names every file that is about to appear or vanish, so that a later run can tell the debris of a
killed one from the files of the user, which are never touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DATA, DISK, LOCKED, SopError

SCHEMA = 1
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Target:
    """Where an artifact lies: a folder of its own, or (with `group`) files in a shared folder whose names begin with `group`."""

    folder: Path
    group: str | None = None

    @property
    def manifest(self) -> Path:
        return self.folder / (f"{self.group}.manifest.json" if self.group else "manifest.json")

    def hidden(self, what: str) -> Path:
        """A hidden sibling inside the folder (same filesystem, so that renames are atomic)."""
        return self.folder / (f".{self.group}.{what}" if self.group else f".{what}")

    def work(self, fingerprint: str) -> Path:
        return self.hidden(f"work-{fingerprint[:12]}")

    def __str__(self) -> str:
        return str(self.folder / f"{self.group}*") if self.group else str(self.folder)


# --- hashes -------------------------------------------------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """sha256 of a value's canonical JSON, hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()).hexdigest()


def files_below(path: Path) -> list[Path]:
    """The regular files of a folder (or the file itself), sorted; hidden ones, manifests and the card beside a manifest are left out."""
    if path.is_file():
        return [path]
    found = (p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
    return sorted(p for p in found if p.name != "manifest.json" and not p.name.endswith(".manifest.json") and not _is_card(p))


def _is_card(path: Path) -> bool:
    """A model card is written about an artifact and is no part of it."""
    return path.name == "README.md" and (path.parent / "manifest.json").is_file()


def hash_input(path: Path, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`{path, sha256, size, mtime_ns}` of a file or folder; the hash of a folder covers names and contents of its files.

    `known` is an earlier answer for the same path: its hash is taken over while sizes and times have not changed.
    """
    if not path.exists():
        raise SopError("no such file or folder", where=str(path))
    files = files_below(path)
    stats = [p.stat() for p in files]
    size, mtime = sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)
    entry = {"path": str(path), "size": size, "mtime_ns": mtime, "files": len(files)}
    if known and all(known.get(k) == v for k, v in entry.items()):
        return {**entry, "sha256": known["sha256"]}
    if path.is_file():
        return {**entry, "sha256": sha256_file(path)}
    return {**entry, "sha256": sha256_json([[str(p.relative_to(path)), sha256_file(p)] for p in files])}


# --- manifests ----------------------------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a small file so that it is either the old one or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """fsync a folder, so that renames in it last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest at `path` (or None). A newer schema, or no manifest at all by content, is an error."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise SopError("this is no manifest (not JSON)", where=str(path), fix="remove it and run the stage again", code=DATA) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
        raise SopError("this is no manifest (no schema number)", where=str(path), fix="remove it and run the stage again", code=DATA)
    if manifest["schema"] > SCHEMA:
        raise SopError(f"written by a newer version (manifest schema {manifest['schema']}, this version reads up to {SCHEMA})", where=str(path), fix="upgrade self-model-sop")
    return manifest


def describe_outputs(folder: Path) -> list[dict[str, Any]]:
    """`{path, sha256, size, mtime_ns, rows?}` of every file below a folder; paths relative to it."""
    out = []
    for p in files_below(folder):
        stat = p.stat()
        entry: dict[str, Any] = {"path": str(p.relative_to(folder)), "sha256": sha256_file(p), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if p.suffix == ".jsonl":
            entry["rows"] = count_lines(p)
        out.append(entry)
    return out


def count_lines(path: Path) -> int:
    """Number of newline-terminated lines (a last one without newline counts)."""
    rows, last = 0, b"\n"
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            rows += chunk.count(b"\n")
            last = chunk[-1:]
    return rows + (last != b"\n")


def differences(target: Target, manifest: Mapping[str, Any], *, deep: bool = False) -> list[str]:
    """What no longer matches the manifest: missing or changed files. `deep` rehashes everything, else only what size or time shows as touched."""
    wrong = []
    for entry in manifest["outputs"]:
        path = target.folder / entry["path"]
        try:
            stat = path.stat()
        except OSError:
            wrong.append(f"{entry['path']}: missing")
            continue
        touched = stat.st_size != entry["size"] or stat.st_mtime_ns != entry["mtime_ns"]
        if (touched or deep) and (stat.st_size != entry["size"] or sha256_file(path) != entry["sha256"]):
            wrong.append(f"{entry['path']}: changed")
    return wrong


def content_hash(manifest: Mapping[str, Any]) -> str:
    """One hash over the names and contents of an artifact's files; times and folders do not enter."""
    return sha256_json(sorted([o["path"], o["sha256"]] for o in manifest["outputs"]))


# --- lock, journal, publish ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(target: Target) -> Iterator[None]:
    """Hold the artifact's lock; a second holder gets exit code 7 with the pid of the first. The kernel frees it when the process dies."""
    target.folder.mkdir(parents=True, exist_ok=True)
    path = target.hidden("lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = _holder(descriptor)
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise SopError(f"another run (pid {pid}) is writing here", where=str(target), fix="wait for it, or choose another output", code=LOCKED) from None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                break
        os.close(descriptor)  # the first holder removed the file between our open and our lock
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    """The pid in a held lock file. Its holder writes it just after taking the lock, perhaps over that of a dead one: give it a moment."""
    for _ in range(50):
        text = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        if text.isdigit() and Path(f"/proc/{text}").exists() == Path("/proc/self").exists():
            return text
        time.sleep(0.02)
    return text or "?"


def sweep(target: Target, keep: str | None = None) -> list[Path]:
    """Remove the debris of killed runs: journalled files, stray temporaries, work folders but `keep`'s.

    Returns the work folders that were spared because they hold a complete training checkpoint.
    """
    journal = target.hidden("journal")
    if journal.exists():
        with contextlib.suppress(ValueError):
            entry = json.loads(journal.read_text(encoding="utf-8"))
            if not target.manifest.exists():
                for name in entry["files"]:
                    (target.folder / name).unlink(missing_ok=True)
                _prune(target.folder, entry["files"])
        journal.unlink()
    spared = []
    prefix = target.hidden("work-").name
    kept = target.work(keep) if keep else None
    for path in target.folder.glob(f"{prefix}*"):
        if path == kept:
            continue
        if any(path.glob("checkpoints/*/COMPLETE.json")):
            spared.append(path)
        else:
            shutil.rmtree(path)
    for name in (target.manifest.name, journal.name):
        for path in target.folder.glob(f".{name}.tmp-*"):
            path.unlink(missing_ok=True)
    return spared


def require_room(folder: Path, need: int) -> None:
    """Begin nothing that would fill the disk: 1.2 times `need` bytes must be free where `folder` lies.

    Raises:
        SopError: exit 6.
    """
    free = shutil.disk_usage(folder).free
    if need * 1.2 > free:
        what = f"this may write {need / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free (a fifth more than needed is asked for)"
        raise SopError(what, where=str(folder), fix="free some space, or choose another output folder; nothing was written", code=DISK)


def _prune(folder: Path, names: list[str]) -> None:
    """Remove the folders that became empty when `names` went."""
    for parent in sorted({p for n in names for p in Path(n).parents if p != Path()}, key=lambda p: -len(p.parts)):
        with contextlib.suppress(OSError):
            (folder / parent).rmdir()


def publish(target: Target, work: Path, manifest: dict[str, Any], *, overwrite: bool = False) -> dict[str, Any]:
    """Move everything in `work` into the target and write the manifest last; returns it, with `outputs` filled in.

    Raises:
        SopError: where a file of the user, named by no manifest, stands in the way and `overwrite` is off.
    """
    manifest["outputs"] = describe_outputs(work)
    names = [o["path"] for o in manifest["outputs"]]
    old = read_manifest(target.manifest)
    ours = [o["path"] for o in old["outputs"]] if old else []
    foreign = [n for n in names if n not in ours and (target.folder / n).exists()]
    if foreign and not overwrite:
        raise SopError(f"files that no manifest names are in the way: {', '.join(foreign[:3])}", where=str(target), fix="move them, choose another output, or pass --overwrite")
    for name in names:
        with (work / name).open("rb") as f:
            os.fsync(f.fileno())
    write_atomic(target.hidden("journal"), json.dumps({"files": sorted({*names, *ours})}))
    target.manifest.unlink(missing_ok=True)
    sync_folder(target.folder)
    for name in set(ours) - set(names):
        (target.folder / name).unlink(missing_ok=True)
    _prune(target.folder, ours)
    for name in names:
        (target.folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / name, target.folder / name)
    for parent in {(target.folder / n).parent for n in names} | {target.folder}:
        sync_folder(parent)
    write_atomic(target.manifest, json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    target.hidden("journal").unlink(missing_ok=True)
    shutil.rmtree(work)
    return manifest
