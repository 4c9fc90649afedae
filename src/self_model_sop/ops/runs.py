"""`sop runs ls [DIR]` and `sop runs verify [DIR]`: what lies below a folder, and whether it is still what its manifests say."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import console, errors
from ..artifact import Target, differences, files_below, hash_input, read_manifest
from ..errors import SopError
from ..redact import MASK
from ..stage import fingerprint_of, guarded
from ..yaml_source import display


@dataclass(eq=False)
class Found:
    """An artifact on disk: its target, its manifest (None: a killed run left it incomplete), what is wrong with it, and what it was made from."""

    target: Target
    manifest: dict[str, Any] | None
    wrong: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    sources: list[Found] = field(default_factory=list, repr=False, compare=False)

    @property
    def state(self) -> str:
        if self.manifest is None:
            return "incomplete"
        return "; ".join([*self.wrong, *self.stale]) or "ok"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def work() -> int:
        parser = argparse.ArgumentParser(prog="sop runs", description="list artifacts, or verify them against their manifests", allow_abbrev=False)
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="ls|verify")
        for verb, text in (("ls", "what lies below a folder"), ("verify", "rehash every file and follow every input to where it came from")):
            sub = verbs.add_parser(verb, help=text)
            sub.add_argument("folder", nargs="?", type=Path, help="default: runs/, else the working directory")
            sub.add_argument("--json", action="store_true", help="print JSON")
        args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
        folder = args.folder or (Path("runs") if Path("runs").is_dir() else Path())
        if not folder.exists():
            raise SopError("no such folder", where=str(folder))
        return show(folder, as_json=args.json) if args.verb == "ls" else verify(folder, as_json=args.json)

    return guarded(work)


def find(folder: Path) -> list[Found]:
    """Every artifact below a folder, complete or not, oldest first."""
    found = []
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        for name in sorted(files):
            if name == "manifest.json" or name.endswith(".manifest.json"):
                manifest = read_ours(here / name)
                if manifest:
                    found.append(Found(Target(here, name.removesuffix("manifest.json").rstrip(".") or None), manifest))
        found += [Found(target, None) for target in _torn(here, files, folders)]
        folders[:] = sorted(f for f in folders if not f.startswith("."))
    return sorted(found, key=lambda f: (f.manifest or {}).get("started", ""))


def read_ours(path: Path) -> dict[str, Any] | None:
    """The manifest, or None where the file belongs to some other program."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None
    if data is not None and not (isinstance(data, dict) and {"schema", "stage", "outputs"} <= set(data)):
        return None
    return read_manifest(path)


def _torn(folder: Path, files: Sequence[str], folders: Sequence[str]) -> Iterator[Target]:
    """Targets with a journal or a work folder of a killed run and no manifest."""
    for name in sorted({*files, *folders}):
        for mark in ("journal", "work-"):
            head, sep, _ = name.partition(f".{mark}")
            if sep and name.startswith(".") and (mark == "work-" or name.endswith(".journal")):
                target = Target(folder, head.removeprefix(".") or None)
                if not target.manifest.exists():
                    yield target


# --- ls -----------------------------------------------------------------------------------------------------------------------------------


def show(folder: Path, *, as_json: bool = False) -> int:
    """Print one line per artifact; a quick look that rehashes only what was touched."""
    found = find(folder)
    rows = []
    for item in found:
        m = item.manifest
        if m is None:
            rows.append(("", display(item.target.folder), "", "", "", "", item.state))
            continue
        item.wrong = differences(item.target, m)
        size = sum(o["size"] for o in m["outputs"])
        rows.append((m["stage"], str(item.target), m["started"], console.human_seconds(m["seconds"]), _human_bytes(size), m["fingerprint"][:12], item.state))
    if as_json:
        keys = ("stage", "path", "started", "seconds", "size", "fingerprint", "state")
        console.say(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], ensure_ascii=False, indent=1))
    elif rows:
        console.table(f"artifacts below {display(folder)}", ("stage", "path", "started", "took", "size", "fingerprint", "state"), rows)
    else:
        console.say(f"no artifacts below {display(folder)}")
    return errors.OK


def _human_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


# --- verify -------------------------------------------------------------------------------------------------------------------------------


def verify(folder: Path, *, as_json: bool = False) -> int:
    """Rehash everything below a folder, and check each input against what it is now; exit code 3 where anything differs."""
    found = find(folder)
    if not found:
        raise SopError("no artifacts here", where=display(folder), fix="give the folder of a pipeline or of a stage", code=errors.DATA)
    check(found)
    if as_json:
        console.say(json.dumps([{"path": str(f.target), "wrong": f.wrong, "stale": f.stale, "state": f.state} for f in found], ensure_ascii=False, indent=1))
    bad = [f for f in found if f.state != "ok"]
    for item in [] if as_json else found:
        name = item.manifest["stage"] if item.manifest else "?"
        for line in [*item.wrong, *item.stale] or [item.state]:
            console.say(f"{display(item.target.folder)} ({name}): {line}")
    files = sum(len(f.manifest["outputs"]) for f in found if f.manifest)
    console.note(f"{len(found)} artifacts, {files} files: " + (f"{len(bad)} artifacts are not what they should be" if bad else "all as their manifests say"))
    return errors.DATA if bad else errors.OK


def check(found: Sequence[Found]) -> None:
    """Fill in `wrong` and `stale` of each artifact; those made from a stale or edited one are stale too."""
    connect(found)
    for item in found:
        if item.manifest is None:
            item.wrong.append("incomplete: a run was killed here; the same command makes it again")
            continue
        item.wrong += [f"{line} since it was made" if line.endswith("changed") else line for line in differences(item.target, item.manifest, deep=True)]
        item.wrong += _unlisted(item)
        if MASK not in json.dumps(item.manifest["config"]) and item.manifest["fingerprint"] != fingerprint_of(item.manifest):
            item.wrong.append("manifest: its fingerprint does not fit its own entries")
        item.stale += [problem for name, entry in item.manifest["inputs"].items() if (problem := _changed_input(name, entry, item))]
    changed = True
    while changed:  # staleness flows downstream
        changed = False
        for item in found:
            bad = next((source for source in item.sources if source.state != "ok"), None)
            if bad and not item.stale:
                item.stale.append(f"stale: made from {display(bad.target.folder)}, which is not what it should be")
                changed = True


def connect(found: Sequence[Found]) -> None:
    """Fill in `sources`: the artifacts whose files are an artifact's inputs."""
    owners = {item.target.folder.absolute() / o["path"]: item for item in found if item.manifest for o in item.manifest["outputs"]}
    for item in found:
        inputs = [moved(Path(entry["path"]), item) for entry in item.manifest["inputs"].values()] if item.manifest else []
        files = [f for path in inputs if path.exists() for f in files_below(path)]
        item.sources = list(dict.fromkeys(owner for f in files if (owner := owners.get(f)) and owner is not item))


def _unlisted(item: Found) -> list[str]:
    """Files in an artifact's own folder that its manifest does not name."""
    if item.target.group or item.manifest is None or list(item.target.folder.glob("*.manifest.json")):
        return []
    listed = {o["path"] for o in item.manifest["outputs"]}
    nested = [p.parent for p in item.target.folder.rglob("manifest.json") if p.parent != item.target.folder]
    extra = [o for o in files_below(item.target.folder) if str(o.relative_to(item.target.folder)) not in listed and not any(o.is_relative_to(n) for n in nested)]
    return [f"{p.relative_to(item.target.folder)}: not in the manifest" for p in extra[:5]]


def _changed_input(name: str, entry: dict[str, Any], item: Found) -> str:
    path = moved(Path(entry["path"]), item)
    if not path.exists():
        return f"stale: input {name} is gone: {display(path)}"
    return f"stale: input {name} changed since: {display(path)}" if hash_input(path)["sha256"] != entry["sha256"] else ""


def moved(path: Path, item: Found) -> Path:
    """An input's path; where the whole tree was moved, its place relative to the artifact."""
    if path.exists() or item.manifest is None or "folder" not in item.manifest:
        return path
    candidate = Path(os.path.normpath(item.target.folder.absolute() / os.path.relpath(path, item.manifest["folder"])))
    return candidate if candidate.exists() else path
