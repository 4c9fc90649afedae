"""`sop config check FILE...` and `sop config show FILE`: what is wrong with a YAML file, and where each value comes from."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import console, errors
from ..config import MODEL_CONFIG, ConfigError, Loaded, fields, load, option, parse_override, plain, project_root
from ..errors import SopError, nearest
from ..hub import HubConfig
from ..stage import guarded, preflight_problems
from ..stages import STAGES, Entry, by_name
from ..yaml_source import Loc, Problem, Tree, display, read


@dataclass(frozen=True, kw_only=True)
class SharedConfig:
    """config/model_config/config.yaml: settings that every stage takes over."""

    huggingface: HubConfig = option(factory=HubConfig)


@dataclass(frozen=True)
class Kind:
    """What a YAML file is for: a stage (or verb) with its config class, or a pipeline."""

    name: str
    cls: type | None
    stage: Any = None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def work() -> int:
        parser = argparse.ArgumentParser(prog="sop config", description="check configurations, or show one with the origin of each value", allow_abbrev=False)
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="check|show")
        check = verbs.add_parser("check", help="every problem of one or more files, as file:line; loads no model")
        check.add_argument("files", nargs="+", type=Path, metavar="FILE")
        check.add_argument("--no-paths", "--no_paths", action="store_true", help="input files need not exist yet")
        show = verbs.add_parser("show", help="every value with its origin")
        show.add_argument("file", type=Path, metavar="FILE")
        show.add_argument("overrides", nargs="*", metavar="key=value")
        for sub in (check, show):
            sub.add_argument("--stage", metavar="GROUP.VERB", help="the command that reads the file, where its place does not tell")
        args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
        if args.verb == "show":
            return show_file(args.file, args.stage, args.overrides)
        return check_files(args.files, args.stage, check_paths=not args.no_paths)

    return guarded(work)


def check_files(files: Sequence[Path], stage: str | None = None, *, check_paths: bool = True) -> int:
    """Print `valid` or every problem for each file; the exit code is 2 where there is any."""
    problems: list[Problem] = []
    for path in files:
        try:
            kind = check_file(path, stage, check_paths=check_paths)
            console.say(f"{display(path)}: valid ({kind.name})")
        except ConfigError as error:
            problems += error.problems
        except SopError as error:
            problems.append(Problem(error.where or display(path), error.what, error.fix or ""))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return errors.OK


def check_file(path: Path, stage: str | None = None, *, check_paths: bool = True) -> Kind:
    """Validate one file; returns what it is.

    Raises:
        ConfigError: with every problem.
    """
    kind = kind_of(path, stage)
    if kind.cls is None:
        from .pipeline import load_pipeline

        load_pipeline(path)
        return kind
    loaded: Loaded[Any] = load(kind.cls, path, check_paths=check_paths)
    if kind.stage is not None and check_paths:
        problems = preflight_problems(kind.stage, loaded)
        if problems:
            raise ConfigError(problems)
    return kind


def kind_of(path: Path, stage: str | None = None) -> Kind:
    """What a YAML file is for: by `stage`, by `stages:` in it, by its place, else by the keys in it."""
    if not path.is_file():
        raise SopError("no such config file", where=str(path))
    if stage:
        return _kind(by_name(stage))
    data = read(path, []).data
    if "stages" in data:
        return Kind("pipeline", None)
    full, root = path.resolve(), project_root(path).resolve()
    if full == root / MODEL_CONFIG:
        return Kind("shared by all stages", SharedConfig)
    if full.parent == root / "config" / "trace_config":
        from ..train.tracesettings import TraceSettings

        return Kind(f"tracker {path.stem}", TraceSettings)
    for entry in STAGES:
        if entry.config and full == root / entry.config:
            return _kind(_of_algorithm(entry, data))
    found = max((k for e in STAGES if e.config for k in [_kind(e)] if k.cls), key=lambda k: _score(k, data), default=None)
    if found is None or not _score(found, data)[0]:
        raise SopError("no command reads these keys", where=display(path), fix="name the command with --stage, for example --stage data.process")
    return found


def _of_algorithm(entry: Entry, data: dict[str, Any]) -> Entry:
    """Several commands read rlhf.yaml: the one that its `algorithm` names."""
    from ..train.rlhf import COMMANDS

    command = COMMANDS.get(str(data.get("algorithm")))
    return next((e for e in STAGES if e.config == entry.config and e.name == f"train.{command}"), entry)


def _kind(entry: Entry) -> Kind:
    module = importlib.import_module(entry.module)
    stage = getattr(module, "STAGE", None) or getattr(module, "VERB", None)
    return Kind(entry.name, stage.config if stage else getattr(module, "Config", None), stage)


def _score(kind: Kind, data: dict[str, Any]) -> tuple[int, int]:
    """How well a file's top-level keys fit a class: (keys that it has, minus its keys that the file lacks)."""
    known = {loc[0] for loc, _, _ in fields(kind.cls)} if kind.cls else set()
    hits = sum(bool(key in known or nearest(str(key), known, 0.8)) for key in data)
    return (hits, -len(known - set(data))) if hits else (0, 0)


# --- show ---------------------------------------------------------------------------------------------------------------------------------


def show_file(path: Path, stage: str | None, overrides: Sequence[str]) -> int:
    """Print `key: value  # origin` for every key."""
    kind = kind_of(path, stage)
    if kind.cls is None:
        return _show_pipeline(path, overrides)
    loaded: Loaded[Any] = load(kind.cls, path, [parse_override(o) for o in overrides], check_paths=False)
    console.say(f"# {display(path)} as read by {kind.name}")
    _print(list(values(loaded)))
    return errors.OK


def _show_pipeline(path: Path, overrides: Sequence[str]) -> int:
    from .pipeline import load_pipeline

    pipeline = load_pipeline(path, overrides)
    console.say(f"# pipeline {pipeline.name}, root {display(pipeline.root)}")
    for step in pipeline.steps:
        console.say(f"\n# {step.id}: {step.entry.name}")
        _print(list(values(load(step.stage.config, step.path, step.settings, check_paths=False))))
    return errors.OK


def values(loaded: Loaded[Any]) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, origin) of every leaf, those inside free maps too."""
    data = plain(loaded.config)
    for loc, _, _ in fields(type(loaded.config)):
        value: Any = data
        for part in loc:
            value = value.get(part) if isinstance(value, dict) else None
        yield from _leaves(loc, value, loaded.tree)


def _leaves(loc: Loc, value: Any, tree: Tree) -> Iterator[tuple[str, Any, str]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves((*loc, key), child, tree)
        return
    given = loc in tree.origin or any(loc[:n] in tree.origin and not isinstance(tree.get(loc[:n]), dict) for n in range(1, len(loc)))
    yield ".".join(map(str, loc)), value, tree.where(loc) if given else "default"


def _print(rows: Sequence[tuple[str, Any, str]]) -> None:
    shown = [(f"{key}: {json.dumps(value, ensure_ascii=False, default=str)}", origin) for key, value, origin in rows]
    width = min(max((len(text) for text, _ in shown), default=0), 90)
    for text, origin in shown:
        console.say(f"{text:<{width}}  # {origin}")
