"""Plain data out of YAML with a `file:line` for every key, and all problems at once.

Scalars follow YAML 1.2's core schema, so `no` and `08` stay text; `5e-5` is a number. Nothing in a file can run code: only maps, lists and
scalars are built, tags are refused, and size, depth and the expansion of aliases are limited.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

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


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema, which gives up at the first node too many or too deep."""

    nodes = 0
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        self.depth += 1
        if self.nodes > MAX_NODES or self.depth > MAX_DEPTH + 1:
            raise OverflowError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(0|[1-9](_?[0-9])*)$", list("-+0123456789")),
    ("float", r"^[-+]?((0|[1-9](_?[0-9])*)?\.[0-9]+|(0|[1-9](_?[0-9])*)\.?)([eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)

_SCALARS: dict[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": lambda text: int(text.replace("_", "")),
    "tag:yaml.org,2002:float": lambda text: float(text.replace("_", "")),
    "tag:yaml.org,2002:str": lambda text: text,
}


class _Builder:
    """Turns composed nodes into a Tree, collecting problems."""

    def __init__(self, name: str, problems: list[Problem]) -> None:
        self.name, self.problems, self.nodes = name, problems, 0
        self.origin: dict[Loc, str] = {}

    def where(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if node.start_mark else self.name

    def bad(self, node: yaml.Node, what: str, fix: str = "") -> None:
        self.problems.append(Problem(self.where(node), what, fix))

    def build(self, node: yaml.Node, loc: Loc) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(loc) > MAX_DEPTH:
            raise OverflowError
        self.origin[loc] = self.where(node)
        if isinstance(node, yaml.MappingNode):
            if node.tag != "tag:yaml.org,2002:map":
                self.bad(node, f"the tag {node.tag!r} is not allowed", "write plain YAML")
            return self._map(node, loc)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != "tag:yaml.org,2002:seq":
                self.bad(node, f"the tag {node.tag!r} is not allowed", "write plain YAML")
            return [self.build(child, (*loc, i)) for i, child in enumerate(node.value)]
        make = _SCALARS.get(node.tag)
        if make is None:
            self.bad(node, f"the tag {node.tag!r} is not allowed", "write plain YAML")
            return None
        if node.tag.endswith(":int") and len(node.value) > 4000:
            self.bad(node, "a number of more than 4,000 digits")
            return None
        value = make(node.value)
        if value in (float("inf"), float("-inf")):
            self.bad(node, f"{node.value} is too large for a number")
            return None
        return value

    def _map(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        out: dict[str, Any] = {}
        lines: dict[str, str] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.bad(key_node, "a key must be text")
                continue
            key = key_node.value
            if key == "<<":
                self.bad(key_node, "merge keys (<<) are not supported", "write the keys out")
                continue
            if key in out:
                dotted = ".".join(map(str, (*loc, key)))
                self.bad(key_node, f"{dotted}: given twice (first at {lines[key]})", "keep one of the two")
                continue
            lines[key] = self.where(key_node)
            out[key] = self.build(value_node, (*loc, key))
            self.origin[(*loc, key)] = lines[key]
        return out


def parse(text: str, name: str, problems: list[Problem]) -> tuple[Any, dict[Loc, str]]:
    """Parse YAML text; problems are appended. Returns (data, origins); data is None where nothing can be read."""
    builder = _Builder(name, problems)
    try:
        node = yaml.compose(text, Loader=_Loader)
        return (builder.build(node, ()) if node is not None else None), builder.origin
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problems.append(Problem(where, f"not YAML: {getattr(error, 'problem', None) or error}"))
    except (RecursionError, OverflowError):
        problems.append(Problem(name, f"nested or expanded too far (at most {MAX_DEPTH} levels, {MAX_NODES} values)"))
    except ValueError as error:
        problems.append(Problem(name, f"not YAML: {error}"))
    return None, {}


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
