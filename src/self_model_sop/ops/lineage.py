"""What an artifact was made of: from manifest to manifest, wherever they lie, down to what came from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact import Target, hash_input
from ..errors import DATA, SopError
from ..yaml_source import display
from . import runs


@dataclass(eq=False)
class Step:
    """One artifact of the lineage: what made it, and what it was made from."""

    found: runs.Found
    name: str = ""
    sources: list[Step] = field(default_factory=list)
    raw: list[tuple[str, Path, Mapping[str, Any]]] = field(default_factory=list)  # inputs that no stage made
    changed: list[str] = field(default_factory=list)  # inputs that are gone, or no longer what they were

    @property
    def manifest(self) -> dict[str, Any]:
        assert self.found.manifest is not None
        return self.found.manifest

    @property
    def stage(self) -> str:
        return str(self.manifest["stage"])

    @property
    def stats(self) -> dict[str, Any]:
        return dict(self.manifest["stats"])


def lineage(path: Path) -> list[Step]:
    """Every artifact that went into the one at `path`, oldest first, that one last.

    Raises:
        SopError: where there is no artifact.
    """
    own = owners(path)
    if not own:
        raise SopError("no manifest says what this is", where=display(path), fix="give the folder (or file) of an artifact: sop runs ls shows them", code=DATA)
    steps: dict[Path, Step] = {}
    last = _follow(own[0], steps)
    rest = sorted((s for s in steps.values() if s is not last), key=lambda s: (s.manifest["started"], str(s.found.target)))
    _name([*rest, last])
    return [*rest, last]


def _name(steps: list[Step]) -> None:
    """Name each by the end of its place, no longer than it takes to tell them apart: the rest is a machine's affair."""
    places = {id(s): [p for p in (*s.found.target.folder.absolute().parts[1:], s.found.target.group) if p] for s in steps}
    unnamed, depth = steps, 1
    while unnamed:
        for step in unnamed:
            step.name = "/".join(places[id(step)][-depth:])
        taken = [s.name for s in steps]
        unnamed = [s for s in unnamed if taken.count(s.name) > 1 and depth < len(places[id(s)])]
        depth += 1


def _follow(found: runs.Found, steps: dict[Path, Step]) -> Step:
    key = found.target.manifest.absolute()
    if key in steps:
        return steps[key]
    step = steps[key] = Step(found)
    for name, entry in sorted(step.manifest["inputs"].items()):
        path = runs.moved(Path(entry["path"]), found)
        made_by = [o for o in owners(path) if o.target.manifest.absolute() != key] if path.exists() else []
        if not path.exists() or hash_input(path, entry)["sha256"] != entry["sha256"]:
            step.changed.append(name)
        if made_by:
            step.sources += [s for s in (_follow(o, steps) for o in made_by) if s not in step.sources]
        else:
            step.raw.append((name, path, entry))
    return step


def owners(path: Path) -> list[runs.Found]:
    """The artifacts that a path belongs to, or that lie in it as groups of files; the nearest folder with a manifest that names it."""
    path = path.absolute()
    for folder in [path, *path.parents][:5]:
        found = []
        for file in sorted(folder.glob("*manifest.json")) if folder.is_dir() else ():
            group = file.name.removesuffix("manifest.json").rstrip(".") or None
            manifest = runs.read_ours(file)
            if manifest and any((folder / o["path"]).is_relative_to(path) for o in manifest["outputs"]):
                found.append(runs.Found(Target(folder, group), manifest))
        if found:
            return found
    return []
