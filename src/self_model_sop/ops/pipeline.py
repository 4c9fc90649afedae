"""A pipeline file: a list of stages that reads like the story, checked as a whole before anything runs.

`${id}` is the artifact folder of an earlier stage, `${root}` the pipeline's folder, `${project}` the project's. A stage whose config has a key
`output_dir` (a trainer: `training_args.output_dir`, an export: `output_path`) that the pipeline does not set writes to `${root}/<id>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ConfigError, Setting, load, parse_override, paths, project_root
from ..errors import SopError, nearest, suggest
from ..stage import Stage, preflight_problems
from ..stages import STAGES, Entry, by_name
from ..yaml_source import Loc, Problem, Tree, display, read
from .steps import Pipeline, Step, mentioned, stage_of

KEYS = ("name", "root", "shared", "evaluation", "stages")
STAGE_KEYS = ("stage", "config", "with")
RESERVED = ("root", "project", "name", "shared", "evaluation", "stages")
OUTPUT_KEYS = (("output_dir",), ("output_path",), ("training_args", "output_dir"))
COMPARE = "eval.compare"
NOT_GUARDED = ("prompts", "prompts_file", "sft_file", "answers", "samples", "training")  # keys of `evaluation` that no check between stages needs
_ID = re.compile(r"[a-z][a-z0-9_-]*\Z")
_REFERENCE = re.compile(r"\$\{([^}]*)\}")


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and check a pipeline and the configs of all its stages.

    Args:
        path: the YAML file.
        overrides: `root=...`, `name=...`, `shared.group.key=...`, `evaluation.key=...` or `<stage id>.key=...`.

    Raises:
        ConfigError: with every problem of the pipeline and of every stage.
    """
    path = resolve(path)
    problems: list[Problem] = []
    tree = read(path, problems)
    reader = _Reader(path, tree, problems)
    for text in overrides:
        reader.override(parse_override(text))
    steps = tuple(reader.steps())
    if problems:
        raise ConfigError(sorted(dict.fromkeys(problems), key=_order))
    return Pipeline(reader.name, reader.root, path, steps)


def resolve(path: Path) -> Path:
    """The file, or `config/pipeline/<name>.yaml` where only a name is given."""
    folder = project_root() / "config" / "pipeline"
    for candidate in (path, folder / path.with_suffix(".yaml").name):
        if candidate.is_file() and (candidate is path or len(path.parts) == 1):
            return candidate
    names = [p.stem for p in folder.glob("*.yaml")]
    raise SopError("no such pipeline file", where=str(path), fix=suggest(path.stem, names, "pipelines lie in config/pipeline"))


def _order(problem: Problem) -> tuple[str, int]:
    name, _, line = problem.where.partition(":")
    return name, int(line) if line.isdigit() else 0


@dataclass
class _Reader:
    """Walks the file once, in order; collects problems and goes on."""

    path: Path
    tree: Tree
    problems: list[Problem]
    cwd_settings: list[Setting] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.project = project_root(self.path)
        self.root_base = self.project
        self._known(self.tree.data, KEYS, ())

    def bad(self, loc: Loc, what: str, fix: str = "") -> None:
        self.problems.append(Problem(self.tree.where(loc), what, fix))

    def _known(self, data: Mapping[str, Any], names: Sequence[str], loc: Loc) -> None:
        for key in data:
            if key not in names:
                self.bad((*loc, key), f"unknown key {key!r}", suggest(str(key), names, "known keys: " + ", ".join(names)))

    def override(self, item: Setting) -> None:
        """Lay one `a.b=c` over the file, or keep it for the stage that it names."""
        first, _, rest = item.key.partition(".")
        if first in ("root", "name", "shared", "evaluation"):
            layer = Tree()
            layer.set(tuple(item.key.split(".")), item.value, item.origin)
            self.tree.merge(layer)
            if item.key == "root":
                self.root_base = item.base
        elif not rest:
            self.problems.append(Problem(item.origin, f"{item.key!r} names no key of the pipeline", "write root=..., shared.<group>.<key>=..., or <stage id>.<key>=..."))
        else:
            self.cwd_settings.append(item)

    @property
    def name(self) -> str:
        return str(self.tree.data.get("name") or self.path.stem)

    @property
    def root(self) -> Path:
        given = self.tree.data.get("root")
        return (self.root_base / given).absolute() if isinstance(given, str) and given else self.project / "runs" / self.name

    # --- the stages

    def steps(self) -> Iterator[Step]:
        """The stages in order; each sees the folders of those before it."""
        self._check_head()
        entries = list(self._entries())
        ids = [name for name, _, _ in entries]
        for item in self.cwd_settings:
            first = item.key.partition(".")[0]
            if first not in ids:
                self.problems.append(Problem(item.origin, f"no stage {first!r} in this pipeline", suggest(first, ids, "stages: " + ", ".join(ids))))
        folders: dict[str, Path] = {}
        targets: dict[str, str] = {}
        hubs: dict[tuple[Any, ...], str] = {}
        for name, loc, body in entries:
            step = self._step(name, loc, body, folders, ids)
            folders[name] = step.target.folder if step else self.root / name
            if step and str(step.target) in targets:
                self.bad(loc, f"stage {name!r} writes to the same place as {targets[str(step.target)]!r}: {display(step.target.folder)}", "give one of them another output")
            elif step:
                targets[str(step.target)] = name
                self._one_hub(step, loc, hubs)
                yield step

    def _one_hub(self, step: Step, loc: Loc, hubs: dict[tuple[Any, ...], str]) -> None:
        """The hub's client reads its settings once per process, so the stages of one run share them."""
        hub = getattr(step.config, "huggingface", None)
        if hub is None:
            return
        key = (hub.source, hub.endpoint, hub.offline, hub.cache_dir)
        if hubs and key not in hubs:
            what = f"{step.id}: its huggingface settings (source, endpoint, offline, cache_dir) differ from those of {next(iter(hubs.values()))!r}"
            self.bad(loc, what, "set them once, in config/model_config/config.yaml, or run the stages by hand")
        hubs.setdefault(key, step.id)

    def _check_head(self) -> None:
        for key in ("name", "root"):
            if not isinstance(self.tree.data.get(key, ""), str):
                self.bad((key,), f"{key}: expected text")
        groups = sorted({e.name.partition(".")[0] for e in STAGES if e.stage})
        shared = self.tree.data.get("shared") or {}
        if not isinstance(shared, dict):
            self.bad(("shared",), "shared: expected a map of groups", "for example: shared: {tokenizer: {seed: 1}}")
            self.tree.data["shared"] = {}
        else:
            self._known(shared, groups, ("shared",))

    def _entries(self) -> Iterator[tuple[str, Loc, dict[str, Any]]]:
        """(id, location, body) of the list items that are well formed, and the evaluation at the end."""
        items = self.tree.data.get("stages")
        if not isinstance(items, list) or not items:
            self.bad(("stages",), "stages: expected a list of stages", "for example: stages: [{fetch: {stage: data.fetch}}]")
            return
        seen: set[str] = set()
        compares = False
        for i, item in enumerate(items):
            loc: Loc = ("stages", i)
            if not isinstance(item, dict) or len(item) != 1:
                self.bad(loc, "expected one stage: `id: {stage: group.verb, ...}`")
                continue
            name, body = next(iter(item.items()))
            if not _ID.match(name) or name in RESERVED:
                self.bad((*loc, name), f"{name!r} is no id", "lower-case letters, digits, _ and -; not " + ", ".join(RESERVED))
            elif name in seen:
                self.bad((*loc, name), f"two stages have the id {name!r}", "give one of them another id")
            elif not isinstance(body, dict) or not isinstance(body.get("stage"), str):
                self.bad((*loc, name), f"{name}: expected {{stage: group.verb, config: path, with: {{...}}}}")
            else:
                self._known(body, STAGE_KEYS, (*loc, name))
                compares = compares or body["stage"] == COMPARE
                seen.add(name)
                yield name, (*loc, name), body
                yield from self._check(name, seen)
        if "evaluation" in self.tree.data and not compares:
            yield from self._evaluation(seen)

    def _evaluation(self, seen: set[str]) -> Iterator[tuple[str, Loc, dict[str, Any]]]:
        """`evaluation: {after: [ids], ...}` as a last stage `compare`; its other keys are those of eval.compare."""
        body = self.tree.data["evaluation"]
        if not isinstance(body, dict) or not isinstance(body.get("after"), list):
            self.bad(("evaluation",), "evaluation: expected {after: [stage ids], ...}", "the other keys are those of eval.compare")
            return
        models = {}
        for i, name in enumerate(body["after"]):
            if name in seen:
                models[name] = f"${{{name}}}"
            else:
                self.bad(("evaluation", "after", i), f"evaluation.after: no stage {name!r}", suggest(str(name), sorted(seen)))
        given = {k: v for k, v in body.items() if k not in ("after", "config")}
        yield "compare", ("evaluation",), {"stage": COMPARE, "config": body.get("config"), "with": {"models": models, **given}}

    def _check(self, name: str, seen: set[str]) -> Iterator[tuple[str, Loc, dict[str, Any]]]:
        """With a forgetting guard that stops, each model of `evaluation.after` is measured before the next stage builds on it; `compare` takes these measurements over."""
        body = self.tree.data.get("evaluation")
        if not isinstance(body, dict):
            return
        after, guard = body.get("after"), body.get("guard")
        stops = isinstance(guard, dict) and guard.get("general") and guard.get("stop", True)
        if not stops or not isinstance(after, list) or name not in after[1:] or after[0] not in seen:
            return
        given = {k: v for k, v in body.items() if k.partition(".")[0] not in ("after", "config", *NOT_GUARDED)}
        models = {after[0]: f"${{{after[0]}}}", name: f"${{{name}}}"}
        more = {"models": models, "prompts": [], "cache_dir": str(self.root / "compare" / ".cache")}
        yield f"check_{name}", ("evaluation",), {"stage": COMPARE, "config": body.get("config"), "with": {**given, **more}}

    def _step(self, name: str, loc: Loc, body: Mapping[str, Any], folders: Mapping[str, Path], ids: Sequence[str]) -> Step | None:
        try:
            entry = by_name(body["stage"])
        except SopError as error:
            self.bad((*loc, "stage"), f"{name}: {error.what}", error.fix or "")
            return None
        if not entry.stage:
            self.bad((*loc, "stage"), f"{name}: {entry.name} makes no artifact", "it is a command to type, no stage of a pipeline")
            return None
        stage, before = stage_of(entry), len(self.problems)
        settings = self._settings(name, loc, body, entry, stage, folders, ids)
        path = self._config_file(name, loc, body, entry)
        try:
            loaded = load(stage.config, path, settings, pending=[*folders.values()], uses=stage.uses)
            needs = mentioned(loaded, folders)
            target = stage.output(loaded.config)
            if not needs:  # what earlier stages will make may lie there in an older form: their readers are checked when their turn comes
                self._take(preflight_problems(stage, loaded), name, loc)
        except ConfigError as error:
            self._take(error.problems, name, loc)
        except SopError as error:
            self.bad(loc, f"{name}: {error.what}", error.fix or "")
        if len(self.problems) > before:
            return None
        return Step(name, entry, stage, path, tuple(settings), loaded.config, target)

    def _take(self, found: Sequence[Problem], name: str, loc: Loc) -> None:
        """Problems of a stage; those that have no line of their own get that of the stage."""
        self.problems += [p if _has_line(p) else Problem(self.tree.where(loc), f"{name}: {p.what}", p.fix) for p in found]

    def _config_file(self, name: str, loc: Loc, body: Mapping[str, Any], entry: Entry) -> Path | None:
        given = body.get("config")
        if given is None:
            path = self.project / entry.config
            return path if entry.config and path.is_file() else None
        if not isinstance(given, str):
            self.bad((*loc, "config"), f"{name}: config: expected a path")
            return None
        path = self.project / Path(given).expanduser()
        if not path.is_file():
            self.bad((*loc, "config"), f"{name}: config: no such file: {given}", suggest(path.name, (p.name for p in path.parent.glob("*.yaml"))))
            return None
        return path

    def _settings(
        self, name: str, loc: Loc, body: Mapping[str, Any], entry: Entry, stage: Stage[Any], folders: Mapping[str, Path], ids: Sequence[str]
    ) -> list[Setting]:
        """`output_dir` below the root, then `shared`, then `with`, then the command line; references replaced."""
        out = []
        for at in OUTPUT_KEYS:
            if (at, "output") in paths(stage.config):
                out.append(Setting(".".join(at), str(self.root / name), f"pipeline {self.name}", self.project))
        layers: list[tuple[Loc, Any]] = [(("shared", entry.name.partition(".")[0]), self.tree.get(("shared", entry.name.partition(".")[0])))]
        layers.append((loc if loc == ("evaluation",) else (*loc, "with"), body.get("with")))
        for at, values in layers:
            if values is None:
                continue
            if not isinstance(values, dict):
                self.bad(at, f"{name}: expected a map of keys and values")
                continue
            for key, value in values.items():
                where = (*at, key) if (*at, key) in self.tree.origin else at
                out.append(Setting(key, self._replace(value, where, folders, ids), self.tree.where(where), self.project))
        for item in self.cwd_settings:
            first, _, key = item.key.partition(".")
            if first == name:
                out.append(Setting(key, self._replace(item.value, (), folders, ids), item.origin, item.base))
        return out

    def _replace(self, value: Any, loc: Loc, folders: Mapping[str, Path], ids: Sequence[str]) -> Any:
        if isinstance(value, dict):
            return {k: self._replace(v, loc, folders, ids) for k, v in value.items()}
        if isinstance(value, list):
            return [self._replace(v, loc, folders, ids) for v in value]
        if not isinstance(value, str):
            return value

        def one(match: re.Match[str]) -> str:
            name = match[1]
            known = {"root": self.root, "project": self.project, **folders}
            if name in known:
                return str(known[name])
            if name in ids:
                self.bad(loc, f"${{{name}}} is a later stage, or this one", "a stage sees only those before it")
            else:
                near = nearest(name, known)
                self.bad(loc, f"${{{name}}} names no stage", f"did you mean ${{{near}}}?" if near else "known: " + ", ".join(f"${{{k}}}" for k in known))
            return match[0]

        return _REFERENCE.sub(one, value)


def _has_line(problem: Problem) -> bool:
    return ":" in problem.where or problem.where.startswith("command line")
