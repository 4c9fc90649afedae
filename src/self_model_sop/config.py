"""YAML -> frozen dataclass: every problem at once, each as `file:line`, with a suggestion.

Precedence: field default < config/model_config < stage YAML < documented flags < `a.b=c`. Relative paths in a YAML file are relative to the project
root (the nearest parent folder that holds `config/`), paths on the command line to the working directory.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar, Union

from .errors import SopError, nearest, suggest
from .redact import MASK, environment_variable_for, looks_secret
from .yaml_source import Loc, Problem, Tree, display, parse, read

T = TypeVar("T")
PathRole = Literal["input", "output", "model"]
MODEL_CONFIG = Path("config/model_config/config.yaml")


class ConfigError(SopError):
    """All problems of one configuration (exit code 2)."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__(f"{len(self.problems)} problem(s) in the configuration")

    def __str__(self) -> str:
        return "\n".join([*map(str, self.problems), self.what])


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    flag: str = "",
    path: PathRole | None = None,
    cosmetic: bool = False,
    check: str = "",
    factory: Any = dataclasses.MISSING,
    keys: Mapping[str, str] | None = None,
) -> Any:
    """A config field.

    Args:
        default: its default; left out, the key is required.
        help: one line, shown by --help and in the docs.
        flag: the documented command-line flag that sets it (`--trace`).
        path: `input` must exist; `output` is written; `model` is a local folder or a hub id. Paths never enter a fingerprint (their contents do).
            On a map of names to paths it holds for each of them; the stage names its inputs after the keys.
        cosmetic: does not change the result (workers, progress, tracker), so it is no part of the fingerprint.
        check: `module:function` called with the value (a dict) and answering [(sub key, what is wrong, fix)]; imported only when a config is loaded.
        factory: default factory for mutable or nested defaults.
        keys: for a free map, the role of single keys in it: a path role, or `cosmetic`.
    """
    metadata = {"help": help, "flag": flag, "path": path, "cosmetic": cosmetic, "check": check, "keys": dict(keys or {})}
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata=metadata)
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


class Setting(NamedTuple):
    """One value from outside the YAML file: a flag, an `a.b=c` override, or a pipeline's `with`."""

    key: str
    value: Any
    origin: str
    base: Path  # what a relative path in it is relative to


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A validated config with where it came from."""

    config: T
    tree: Tree
    path: Path | None
    root: Path


def project_root(path: Path | None = None) -> Path:
    """The nearest parent of `path` (default: the working directory) that holds `config/`; else the folder itself."""
    start = (path.resolve().parent if path else Path.cwd()).absolute()
    return next((p for p in (start, *start.parents) if (p / "config").is_dir()), start)


def parse_override(text: str) -> Setting:
    """`a.b=value` from the command line, the value in YAML spelling."""
    key, sep, raw = text.partition("=")
    if not sep or not key:
        raise SopError(f"{text!r} is not of the form key.sub=value", where="command line", fix="for example: selection.min_freq=5")
    problems: list[Problem] = []
    value, _ = parse(raw, f"command line ({key}=...)", problems)
    if problems:
        raise ConfigError(problems)
    return Setting(key, value, f"command line ({key}=...)", Path.cwd())


def load(
    cls: type[T], path: Path | None, settings: Sequence[Setting] = (), *, check_paths: bool = True, pending: Sequence[Path] = (), uses: Sequence[str] | None = None
) -> Loaded[T]:
    """Read `path` into `cls`, lay `settings` over it, and validate everything at once.

    Args:
        check_paths: input paths must exist.
        pending: folders that earlier stages of a pipeline will fill: paths in them need not exist yet.
        uses: the top-level keys that the stage reads (None: all): paths in the others need not exist.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[Problem] = []
    root = project_root(path)
    tree = Tree(origin={(): f"{display(path)}:1" if path else "defaults"})
    for layer, base in _layers(cls, path, root, problems):
        _resolve_paths(cls, layer, base)
        tree.merge(layer)
    for item in settings:
        layer = Tree()
        layer.set(tuple(item.key.split(".")), item.value, item.origin)
        _resolve_paths(cls, layer, item.base)
        tree.merge(layer)
    _resolve_defaults(cls, tree, root)
    problems += _secrets(tree)
    config = _validate(cls, tree, problems)
    problems += _custom_checks(cls, tree)
    if check_paths:
        problems += _missing_paths(cls, tree, pending, uses)
    if problems or config is None:
        raise ConfigError(_in_order(problems))
    return Loaded(config, tree, path, root)


def _layers(cls: type, path: Path | None, root: Path, problems: list[Problem]) -> Iterator[tuple[Tree, Path]]:
    names = {f.name for f in dataclasses.fields(cls)}
    shared = root / MODEL_CONFIG
    if shared.is_file() and (path is None or shared != path.resolve()):
        layer = read(shared, problems)
        layer.data = {k: v for k, v in layer.data.items() if k in names}
        yield layer, root
    if path is not None:
        yield read(path, problems), root


def _in_order(problems: list[Problem]) -> list[Problem]:
    def key(p: Problem) -> tuple[str, int]:
        name, _, line = p.where.partition(":")
        number = line.split(":")[0]
        return name, int(number) if number.isdigit() else 0

    return sorted(dict.fromkeys(problems), key=key)


# --- walking a dataclass beside its data -------------------------------------------------------------------------------------------------


def nested(hint: Any) -> type | None:
    """The dataclass inside a type hint (`X`, `X | None`), or None."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return next((n for a in typing.get_args(hint) if (n := nested(a))), None)
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _element(hint: Any) -> type | None:
    """The dataclass that a `tuple[X, ...]` holds, or None."""
    return next((n for a in typing.get_args(hint) if (n := nested(a))), None) if typing.get_origin(hint) is tuple else None


def fields(cls: type, prefix: Loc = ()) -> Iterator[tuple[Loc, dataclasses.Field[Any], Any]]:
    """Every leaf field of a config class: (location, field, type hint); nested dataclasses are entered."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        inner = nested(hints[f.name])
        if inner:
            yield from fields(inner, (*prefix, f.name))
        else:
            yield (*prefix, f.name), f, hints[f.name]


def paths(cls: type) -> Iterator[tuple[Loc, Any]]:
    """(location, role) of every path; those named inside free maps too."""
    for loc, f, _ in fields(cls):
        yield loc, f.metadata.get("path")
        yield from (((*loc, key), role) for key, role in f.metadata.get("keys", {}).items() if role != "cosmetic")


def _given_paths(cls: type, tree: Tree) -> list[tuple[Loc, PathRole, Any]]:
    """(location, role, value) of the paths in a tree; those of a map of names to paths one by one."""
    found: list[tuple[Loc, PathRole, Any]] = []
    for loc, role in paths(cls):
        value = tree.get(loc)
        if role and isinstance(value, dict):
            found += [((*loc, key), role, child) for key, child in value.items() if child is not None]
        elif role and value is not None:
            found.append((loc, role, value))
    return found


def _resolve_paths(cls: type, tree: Tree, base: Path) -> None:
    for loc, role, value in _given_paths(cls, tree):
        new = [_absolute(v, role, base) for v in value] if isinstance(value, list) else _absolute(value, role, base)
        if new != value:
            tree.set(loc, new, tree.where(loc))


def _resolve_defaults(cls: type, tree: Tree, root: Path) -> None:
    """Default paths are relative to the project root like those of a YAML file, whatever the working directory."""
    for loc, f, _ in fields(cls):
        role, value = f.metadata.get("path"), plain(f.default)
        given = loc in tree.origin or not isinstance(tree.get(loc[:-1]), (dict, type(None)))
        if role and value and f.default is not dataclasses.MISSING and not given:
            tree.set(loc, [_absolute(v, role, root) for v in value] if isinstance(value, list) else _absolute(value, role, root), "default")


def _absolute(value: Any, role: PathRole, base: Path) -> Any:
    if not isinstance(value, str) or "\0" in value or not value:
        return value
    full = base / Path(value).expanduser()
    if role == "model" and not full.exists() and not _is_path_like(value):
        return value
    return str(full)


def _is_path_like(name: str) -> bool:
    """`./x`, `/x`, `a/b/c` and names with a file suffix are paths; `name` and `owner/name` are hub ids."""
    return name.startswith(("./", "../", "/", "~")) or name.count("/") > 1


def _missing_paths(cls: type, tree: Tree, pending: Sequence[Path], uses: Sequence[str] | None) -> Iterator[Problem]:
    for loc, role, value in _given_paths(cls, tree):
        if role == "output" or (uses is not None and loc[0] not in uses):
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and item.startswith("/") and not Path(item).exists() and not any(Path(item).is_relative_to(p) for p in pending):
                parent = Path(item).parent
                fix = suggest(Path(item).name, [p.name for p in parent.iterdir()] if parent.is_dir() else [])
                what = f"{'.'.join(map(str, loc))}: no such file or folder: {display(Path(item))}"
                yield Problem(tree.where(loc), what, fix)


def _secrets(tree: Tree) -> Iterator[Problem]:
    def walk(loc: Loc, value: Any) -> Iterator[Problem]:
        for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            yield from walk((*loc, key), child)
        dotted = ".".join(map(str, loc))
        if looks_secret(dotted, value):
            variable = environment_variable_for(dotted, value)
            fix = f"remove it, revoke it if it was shared, and set {variable} in the environment"
            yield Problem(tree.where(loc), f"{dotted}: a secret must not be in a config file (value not shown)", fix)

    yield from walk((), tree.data)


def _custom_checks(cls: type, tree: Tree) -> Iterator[Problem]:
    for loc, f, _ in fields(cls):
        name, value = f.metadata.get("check"), tree.get(loc)
        if name and value is not None:
            module, _, function = name.partition(":")
            for sub, what, fix in getattr(importlib.import_module(module), function)(value):
                at = (*loc, *sub.split(".")) if sub else loc
                yield Problem(tree.where(at), f"{'.'.join(map(str, at))}: {what}", fix)


# --- validation ---------------------------------------------------------------------------------------------------------------------------


def _forbid_extra(cls: type) -> None:
    """pydantic reads this attribute; set here so that config classes stay plain dataclasses."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    for hint in typing.get_type_hints(cls).values():
        inner = nested(hint) or _element(hint)
        if inner and "__pydantic_config__" not in vars(inner):
            _forbid_extra(inner)


_ADAPTERS: dict[type, Any] = {}


def _adapter(cls: type) -> Any:
    """pydantic's validator of a class, built once: building costs more than validating."""
    from pydantic import TypeAdapter

    if cls not in _ADAPTERS:
        _forbid_extra(cls)
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def _validate(cls: type[T], tree: Tree, problems: list[Problem]) -> T | None:
    from pydantic import ValidationError

    try:
        text = json.dumps(tree.data, ensure_ascii=True, allow_nan=False)
        config: T = _adapter(cls).validate_json(text, strict=True)
        return config
    except ValidationError as error:
        seen = set()
        for item in error.errors(include_url=False):
            problem = _explain(cls, tree, dict(item))
            if problem.what not in seen:
                seen.add(problem.what)
                problems.append(problem)
    except ValueError as error:
        problems.append(Problem(tree.where(()), str(error)))
    return None


def _explain(cls: type, tree: Tree, item: dict[str, Any]) -> Problem:
    """One pydantic error as a Problem with the line of its key."""
    loc = _real_loc(tree, item["loc"], missing=item["type"] in ("missing", "missing_argument"))
    dotted, where = ".".join(map(str, loc)), tree.where(loc)
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _names_at(cls, loc[:-1])
        near = nearest(str(loc[-1]).lower().replace("-", "_"), known)
        elsewhere = [".".join(map(str, other)) for other, _, _ in fields(cls) if other[-1] == loc[-1]]
        fix = f"did you mean {near!r}?" if near else f"did you mean {elsewhere[0]!r}?" if elsewhere else "known keys: " + ", ".join(sorted(known))
        return Problem(where, f"unknown key {dotted!r}", fix)
    if item["type"] in ("missing", "missing_argument"):
        return Problem(where, f"missing key {dotted!r}", _help_for(cls, loc))
    if item["type"] == "value_error":
        return Problem(where, f"{dotted}: {item['ctx']['error']}" if dotted else str(item["ctx"]["error"]))
    value = item.get("input")
    shown = MASK if looks_secret(dotted, value) else json.dumps(value, ensure_ascii=False, default=str)[:80]
    expected = item["msg"].replace("Input should be ", "").removeprefix("a valid ").removeprefix("an ")
    expected = {"array": "list", "object": "map"}.get(expected, expected)
    return Problem(where, f"{dotted}: expected {expected}, got {shown}", _advice(item, value))


def _advice(item: dict[str, Any], value: Any) -> str:
    if item["type"].startswith("bool") and isinstance(value, str):
        return "write true or false"
    if item["type"] == "literal_error" and isinstance(value, str):
        return suggest(value, [p.strip("'") for p in item["ctx"]["expected"].replace(" or ", ", ").split(", ")])
    if item["type"].startswith(("int", "float")) and isinstance(value, str):
        return "write the number without quotes"
    return ""


def _real_loc(tree: Tree, loc: Loc, *, missing: bool) -> Loc:
    """Drop the tags that pydantic puts into a location for the branches of a union."""
    out: Loc = ()
    for i, part in enumerate(loc):
        node = tree.get(out) if out else tree.data
        present = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int))
        if present or (missing and i == len(loc) - 1):
            out = (*out, part)
    return out


def _names_at(cls: type, loc: Loc) -> list[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        hint = typing.get_type_hints(cls).get(str(part))
        inner = nested(hint) or _element(hint)
        if inner is None:
            return []
        cls = inner
    return [f.name for f in dataclasses.fields(cls)]


def _help_for(cls: type, loc: Loc) -> str:
    return next((f.metadata.get("help", "") for at, f, _ in fields(cls) if at == loc), "")


# --- what a config is compared by, and shown as ---------------------------------------------------------------------------------------------


def comparable(config: Any, uses: Sequence[str] | None = None) -> dict[str, Any]:
    """The part of a config that decides a stage's result: dotted key -> value.

    Paths are left out (the hashes of the contents stand for them), cosmetic keys too; a hub id stays. `uses` limits it to those top-level keys.
    """
    out: dict[str, Any] = {}
    for loc, f, _ in fields(type(config)):
        if (uses is not None and loc[0] not in uses) or f.metadata.get("cosmetic"):
            continue
        value: Any = config
        for part in loc:
            value = None if value is None else getattr(value, part)
        role = f.metadata.get("path")
        if role in ("input", "output") or (role == "model" and _local(value)):
            continue
        if role == "model" and isinstance(value, dict):
            value = {name: None if _local(source) else source for name, source in value.items()}
        left_out = f.metadata.get("keys", {})
        out[".".join(map(str, loc))] = {k: v for k, v in plain(value).items() if k not in left_out} if left_out else plain(value)
    return out


def _local(source: Any) -> bool:
    return isinstance(source, str) and source.startswith("/")


def plain(value: Any) -> Any:
    """Dataclasses and paths as JSON-able data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _spelled(value: Any) -> str:
    """A value as one types it after `key=`: null, true, [a, b], text without quotes."""
    value = plain(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_spelled, value))}]"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def describe(cls: type) -> Iterator[tuple[str, str, str, str]]:
    """(dotted key, type, default as YAML spells it, help) of every key, for --help and the docs."""
    for loc, f, hint in fields(cls):
        default = "" if f.default is dataclasses.MISSING else _spelled(f.default)
        if f.default_factory is not dataclasses.MISSING:
            default = _spelled(f.default_factory())
        name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("pathlib.", "")
        yield ".".join(map(str, loc)), name, default, f.metadata.get("help", "")
