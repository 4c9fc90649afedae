"""Composed YAML nodes as plain data. Apart from yaml_source.py since the parser takes longer to load than a command takes to print its help."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from .yaml_source import MAX_DEPTH, MAX_NODES, Loc, Problem


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
