"""Plain data out of YAML with a `file:line` for every key, and all problems at once.

Scalars follow YAML 1.2's core schema, so `no` and `08` stay text; `5e-5` is a number. Nothing in a file can run code: only maps, lists and
scalars are built, tags are refused, and size, depth and the expansion of aliases are limited.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

MAX_BYTES = 256 << 10
MAX_DEPTH = 32
MAX_NODES = 5_000

Loc = tuple[Any, ...]


class Problem(NamedTuple):
    """One mistake: `file:line`, what is wrong, how to mend it (may be empty)."""

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.fix}" if self.fix else "")


@dataclass
class Tree:
    """Nested plain data, with the origin (`file:line`, a flag, ...) of each location."""

    data: dict[str, Any] = field(default_factory=dict)
    origin: dict[Loc, str] = field(default_factory=dict)

    def where(self, loc: Loc) -> str:
        """The origin of a location or of its nearest parent."""
        while loc and loc not in self.origin:
            loc = loc[:-1]
        return self.origin.get(loc, "config")

    def set(self, loc: Loc, value: Any, origin: str) -> None:
        """Put a value; a scalar in the way of the path is replaced by a map."""
        node = self.data
        for i, part in enumerate(loc[:-1]):
            if not isinstance(node.get(part), dict):
                node[part] = {}
            self.origin.setdefault(loc[: i + 1], origin)
            node = node[part]
        for old in [k for k in self.origin if k[: len(loc)] == loc]:
            del self.origin[old]
        node[loc[-1]] = value
        self._mark(loc, value, origin)

    def _mark(self, loc: Loc, value: Any, origin: str) -> None:
        self.origin[loc] = origin
        for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            self._mark((*loc, key), child, origin)

    def merge(self, other: Tree) -> None:
        """Lay `other` over this tree; maps merge key by key, everything else is replaced."""

        def leaves(loc: Loc, value: Any) -> None:
            if isinstance(value, dict) and value:
                if not isinstance(self.get(loc), dict):
                    self.set(loc, {}, other.where(loc))
                for key, child in value.items():
                    leaves((*loc, key), child)
            else:
                self.set(loc, value, other.where(loc))
                self.origin.update({k: v for k, v in other.origin.items() if k[: len(loc)] == loc})

        for key, value in other.data.items():
            leaves((key,), value)
        self.origin.setdefault((), other.where(()))

    def get(self, loc: Loc) -> Any:
        """The value at a location, or None."""
        node: Any = self.data
        for part in loc:
            if isinstance(node, Mapping) and part in node:
                node = node[part]
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                node = node[part]
            else:
                return None
        return node


def parse(text: str, name: str, problems: list[Problem]) -> tuple[Any, dict[Loc, str]]:
    """Parse YAML text; problems are appended. Returns (data, origins); data is None where nothing can be read."""
    from . import yaml_nodes

    return yaml_nodes.parse(text, name, problems)


def read(path: Path, problems: list[Problem]) -> Tree:
    """Read a YAML file into a Tree; every problem is appended to `problems`."""
    name = display(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            problems.append(Problem(name, f"larger than {MAX_BYTES >> 10} KiB: this is no config file"))
            return Tree()
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(Problem(name, f"not UTF-8 at byte {error.start}", "save the file as UTF-8"))
        return Tree()
    except OSError as error:
        problems.append(Problem(name, f"cannot read: {error.strerror}"))
        return Tree()
    data, origin = parse(text, name, problems)
    if data is None:
        return Tree(origin={(): f"{name}:1"})
    if not isinstance(data, dict):
        problems.append(Problem(f"{name}:1", "the file must hold keys and values (a map)"))
        return Tree(origin={(): f"{name}:1"})
    return Tree(data, origin)


def display(path: Path) -> str:
    """A path as the user would type it: relative to the working directory where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
