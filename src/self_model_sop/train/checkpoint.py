"""Checkpoints that can be trusted: `COMPLETE.json`, written last, holds the sha256 of every file; only a verified one is resumed from."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import sha256_file, sync_folder, write_atomic
from ..console import note, warn

MARKER = "COMPLETE.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and what its marker says."""

    folder: Path
    marker: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.marker["step"])


def mark_complete(folder: Path, **marker: Any) -> Checkpoint:
    """fsync and hash every file of `folder`, then write its marker."""
    files = {}
    for path in _files(folder):
        with path.open("rb") as f:
            os.fsync(f.fileno())
        files[str(path.relative_to(folder))] = {"sha256": sha256_file(path), "size": path.stat().st_size}
    sync_folder(folder)
    content = {**marker, "files": files}
    write_atomic(folder / MARKER, json.dumps(content, indent=1))
    return Checkpoint(folder, content)


def problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint; empty where it is complete and every byte is as it was written."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = {str(name): (str(entry["sha256"]), int(entry["size"])) for name, entry in marker["files"].items()}
    except FileNotFoundError:
        return [f"{MARKER} is missing (the run was stopped while writing it)"]
    except (ValueError, KeyError, TypeError):
        return [f"{MARKER} is damaged"]
    wrong = []
    for name, (digest, size) in files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
        elif sha256_file(path) != digest:
            wrong.append(f"{name} changed")
    return wrong + [f"{p.relative_to(folder)} is not its own" for p in _files(folder) if str(p.relative_to(folder)) not in files]


def latest(root: Path, phase: str) -> Checkpoint | None:
    """The newest checkpoint of a phase that is complete and verified; what is passed over is said."""
    for folder in sorted(root.glob("checkpoint-*"), key=_step, reverse=True):
        wrong = problems(folder)
        if wrong:
            warn(f"{folder.name} is passed over: {'; '.join(wrong[:3])}")
            continue
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker.get("phase") == phase:
            note(f"resuming from {folder.name} (verified)")
            return Checkpoint(folder, marker)
    return None


def prune(root: Path, keep: int, best: str | None = None) -> None:
    """Leave the newest `keep` complete checkpoints and the best one; torn ones go as well."""
    complete = [p for p in sorted(root.glob("checkpoint-*"), key=_step, reverse=True) if (p / MARKER).is_file()]
    spared = {p.name for p in complete[: max(keep, 1)]} | ({Path(best).name} if best else set())
    for folder in root.glob("checkpoint-*"):
        if folder.name not in spared:
            (folder / MARKER).unlink(missing_ok=True)  # first the marker: a half-deleted checkpoint must not look complete
            shutil.rmtree(folder)


def clear(root: Path, *, everything: bool = False) -> None:
    """Remove every step checkpoint; the results of phases stay, unless `everything` goes."""
    for folder in root.glob("*" if everything else "checkpoint-*"):
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)
    if everything and root.is_dir():
        root.rmdir()


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER and not p.name.startswith("."))


def _step(folder: Path) -> int:
    match = _NAME.search(folder.name)
    return int(match[1]) if match else -1
