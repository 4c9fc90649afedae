"""The stages of a checked pipeline, and which of them read what the others make."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import Target
from ..config import Loaded, Setting, paths
from ..errors import SopError, suggest
from ..stage import Stage, load_for
from ..stages import Entry
from ..yaml_source import Loc, display


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline with its validated config; paths of earlier stages are filled in."""

    id: str
    entry: Entry
    stage: Stage[Any]
    path: Path | None
    settings: tuple[Setting, ...]
    config: Any
    target: Target

    def needs(self, folders: Mapping[str, Path]) -> frozenset[str]:
        """The stages among `folders` whose artifacts this one reads, where they are there."""
        return _owners((p for p in self.stage.inputs(self.config).values() if p is not None), folders)

    def reload(self) -> Any:
        """The config once more, now that its inputs exist: paths and the stage's own preflight are checked."""
        return load_for(self.stage, self.path, self.settings).config


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline."""

    name: str
    root: Path
    path: Path
    steps: tuple[Step, ...]

    def index(self, step: str) -> int:
        """Position of a step, with a suggestion where there is none."""
        ids = [s.id for s in self.steps]
        if step not in ids:
            raise SopError(f"no stage {step!r} in this pipeline", where=display(self.path), fix=suggest(step, ids, "stages: " + ", ".join(ids)))
        return ids.index(step)


def stage_of(entry: Entry) -> Stage[Any]:
    """The stage object of a table entry."""
    found: Stage[Any] = importlib.import_module(entry.module).STAGE
    return found


def mentioned(loaded: Loaded[Any], folders: Mapping[str, Path]) -> frozenset[str]:
    """The earlier stages in whose folders anything that a config reads lies."""
    written = {loc for loc, role in paths(type(loaded.config)) if role == "output"}

    def texts(loc: Loc, value: Any) -> Iterator[Path]:
        for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            yield from texts((*loc, key), child)
        if isinstance(value, str) and value.startswith("/") and loc not in written:
            yield Path(value)

    return _owners(texts((), loaded.tree.data), folders)


def _owners(found: Iterable[Path], folders: Mapping[str, Path]) -> frozenset[str]:
    """The stages in whose folders paths lie; of nested folders the innermost."""
    owners = (max((len(f.parts), name) for name, f in folders.items() if p.is_relative_to(f)) for p in found if any(p.is_relative_to(f) for f in folders.values()))
    return frozenset(name for _, name in owners)
