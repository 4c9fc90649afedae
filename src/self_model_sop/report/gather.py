"""What a report is made of: the manifests and small files below a run's folder, read once. No model is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..artifact import content_hash
from ..errors import DATA, SopError
from ..eval.table import in_order
from ..ops import runs

_TRAINING = "train."
_LICENCE_LINE = re.compile(r"^(?:licen[cs]e|许可证?|许可协议)\s*[:：]\s*(.+)$", re.IGNORECASE | re.MULTILINE)
_KNOWN_LICENCES = (("Apache License", "Apache-2.0"), ("MIT License", "MIT"), ("GNU GENERAL PUBLIC", "GPL"), ("Creative Commons Attribution 4", "CC BY 4.0"))


@dataclass
class Piece:
    """One artifact of the run."""

    id: str
    stage: str
    folder: Path
    manifest: dict[str, Any]
    sources: list[str] = field(default_factory=list)  # ids of the artifacts it was made from

    @cached_property
    def stats(self) -> dict[str, Any]:
        stats = self.manifest["stats"]
        return in_order(stats) if self.stage.startswith("eval.") else dict(stats)

    @property
    def hash(self) -> str:
        return content_hash(self.manifest)

    def read(self, name: str) -> Any:
        """A JSON file of the artifact, or None."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The complete lines of a JSONL file of the artifact."""
        found = []
        try:
            text = (self.folder / name).read_text(encoding="utf-8")
        except OSError:
            return []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


@dataclass(frozen=True)
class Raw:
    """Something from outside that went in."""

    name: str
    sha256: str
    size: int
    licence: str
    into: str


@dataclass
class Story:
    """A run, ready to be told."""

    name: str
    root: Path
    pieces: list[Piece]
    raw: list[Raw]
    pipeline_file: str

    def of(self, *stages: str) -> list[Piece]:
        """The artifacts of some stages, oldest first."""
        return [p for p in self.pieces if p.stage in stages]

    def last(self, *stages: str) -> Piece | None:
        return next(iter(reversed(self.of(*stages))), None)

    @property
    def comparison(self) -> Piece | None:
        """The comparison that measured the most models; of several the latest."""
        return max(self.of("eval.compare"), key=lambda p: (len(p.stats["models"]), p.manifest["started"]), default=None)

    @property
    def exams(self) -> dict[str, dict[str, Any]]:
        """model -> set -> result of the multiple-choice sets, of the comparison and of separate runs."""
        found: dict[str, dict[str, Any]] = {}
        for piece in [*self.of("eval.mcq"), *([self.comparison] if self.comparison else [])]:
            for model, sets in (piece.stats.get("exams") or {}).items():
                found.setdefault(model, {}).update(sets)
        return found

    @property
    def trainings(self) -> list[Piece]:
        """Training stages with a record of their steps."""
        return [p for p in self.pieces if p.stage.startswith(_TRAINING) and "steps" in p.stats]

    @property
    def seconds(self) -> float:
        return float(sum(p.manifest["seconds"] for p in self.pieces))

    @property
    def peak_mib(self) -> int:
        return max((p.manifest.get("peak_memory_mib") or 0 for p in self.pieces), default=0)

    @property
    def tokens(self) -> int:
        return sum(int(p.stats.get("tokens", 0)) for p in self.trainings)


def gather(root: Path) -> Story:
    """Read everything below `root`.

    Raises:
        SopError: where there is no finished artifact.
    """
    if not root.is_dir():
        raise SopError("no such folder", where=str(root), fix="give the folder of a run, for example runs/quickstart")
    found = [f for f in runs.find(root) if f.manifest is not None]
    if not found:
        raise SopError("no finished artifact here", where=str(root), fix="give the folder of a run, for example runs/quickstart", code=DATA)
    runs.connect(found)
    summary = _summary(root)
    names = _names(found, root, summary)
    pieces = [Piece(names[id(f)], f.manifest["stage"], f.target.folder, f.manifest, [names[id(s)] for s in f.sources]) for f in found if f.manifest is not None]
    pieces.sort(key=lambda p: (p.manifest["started"], _order(p, summary)))
    return Story(str(summary.get("pipeline") or root.name), root, pieces, list(_raw(found, names)), str(summary.get("file") or ""))


def _summary(root: Path) -> dict[str, Any]:
    try:
        data = json.loads((root / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _order(piece: Piece, summary: Mapping[str, Any]) -> int:
    ids = [s["id"] for s in summary.get("stages", ())]
    return ids.index(piece.id) if piece.id in ids else len(ids)


def _names(found: list[runs.Found], root: Path, summary: Mapping[str, Any]) -> dict[int, str]:
    """Ids of the pipeline where a fingerprint tells, else the place below the root."""
    known = {s["fingerprint"]: s["id"] for s in summary.get("stages", ())}
    out: dict[int, str] = {}
    for f in found:
        place = str(f.target.folder.relative_to(root)) if f.target.folder.is_relative_to(root) else f.target.folder.name
        out[id(f)] = known.get((f.manifest or {}).get("fingerprint", ""), place if place != "." else (f.manifest or {}).get("stage", "run"))
    return out


def _raw(found: list[runs.Found], names: Mapping[int, str]) -> Iterator[Raw]:
    """Inputs that no artifact of the run made."""
    made = [f.target.folder.absolute() for f in found]
    seen: set[str] = set()
    for f in found:
        for entry in (f.manifest or {}).get("inputs", {}).values():
            path = runs.moved(Path(entry["path"]), f)
            if any(path.absolute().is_relative_to(folder) for folder in made) or entry["sha256"] in seen:
                continue
            seen.add(entry["sha256"])
            yield Raw(path.name, entry["sha256"], entry["size"], licence_of(path), names[id(f)])


def licence_of(path: Path) -> str:
    """What the folder of an input (or the one above) says: front matter or a line of its README, a LICENSE file, or the package that it belongs to; else empty."""
    here = path if path.is_dir() else path.parent
    for folder in (here, here.parent):
        for name in ("README.md", "README", "LICENSE", "LICENSE.txt", "LICENSE.md"):
            try:
                text = (folder / name).read_text(encoding="utf-8", errors="replace")[:20_000]
            except OSError:
                continue
            stated = _LICENCE_LINE.search(text) if name.startswith("README") else None
            if stated:
                return stated[1].strip().strip("\"'").split(",")[0].rstrip(".")[:40]
            known = next((short for words, short in _KNOWN_LICENCES if words.lower() in text[:400].lower()), "")
            if known:
                return known
    return _package_licence(path)


def _package_licence(path: Path) -> str:
    """Licence of the installed package that a file belongs to, by the metadata beside it."""
    folder = path.parent
    for info in folder.parent.glob(f"{folder.name}*.dist-info/METADATA"):
        text = info.read_text(encoding="utf-8", errors="replace")
        stated = re.search(r"^License(?:-Expression)?: (.+)$", text, re.MULTILINE)
        if stated:
            return stated[1].strip()[:40]
    return ""
