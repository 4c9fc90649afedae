"""The stage protocol: what happens around every piece of work of the pipeline.

parse -> load config -> preflight -> (`--dry-run` stops with a plan) -> lock -> sweep debris -> up to date? skip -> work in a hidden folder ->
publish -> manifest last -> one summary line and the next command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from . import __version__, artifact, console, errors
from .artifact import Target
from .config import ConfigError, Loaded, Setting, comparable, describe, fields, load, parse_override, plain
from .errors import SopError
from .redact import redact, redact_tree
from .yaml_source import Problem

C = TypeVar("C")
_LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "tokenizers", "sentencepiece", "accelerate", "numpy")


@dataclass(frozen=True)
class Artifact:
    """What a stage leaves: its folder, its manifest, and whether it was already there."""

    target: Target
    manifest: dict[str, Any]
    skipped: bool = False

    @property
    def path(self) -> Path:
        return self.target.folder

    @property
    def stats(self) -> dict[str, Any]:
        return dict(self.manifest["stats"])


@dataclass(frozen=True, kw_only=True)
class Run(Generic[C]):
    """What `build` gets: the config, the empty (or, for resumable stages, earlier) work folder, and the input hashes."""

    config: C
    work: Path
    inputs: Mapping[str, dict[str, Any]]
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[C]):
    """One stage.

    Args:
        name: `group.verb`, the name in the table, the manifest and pipelines.
        version: raised when the output for the same config and inputs changes.
        config: the config dataclass.
        output: config -> where the artifact goes.
        build: does the work inside `run.work`; returns the stats for the manifest (JSON-able).
        inputs: config -> named input paths; their contents enter the fingerprint.
        uses: top-level config keys that this stage reads (None: all). The others do not enter its fingerprint.
        preflight: config -> problems (key, what, fix), found before any heavy import or model load.
        disk: config -> bytes that it may write, where that is known beforehand; it begins only where they are free.
        plan: config -> lines that `--dry-run` prints.
        summary: artifact -> lines printed at the end.
        next: config -> the next command to type.
        gate: (artifact, config) -> raises where the result is not good enough to go on; called after the artifact is published, and where it is up to date.
        resumable: keep the work folder of an interrupted run with the same fingerprint.
        apart: loads models, so a pipeline runs it in a process of its own.
    """

    name: str
    version: int
    config: type[C]
    output: Callable[[C], Target]
    build: Callable[[Run[C]], dict[str, Any]]
    inputs: Callable[[C], Mapping[str, Path | None]] = lambda config: {}
    uses: tuple[str, ...] | None = None
    preflight: Callable[[C], Sequence[tuple[str, str, str]]] = lambda config: ()
    disk: Callable[[C], int] = lambda config: 0
    plan: Callable[[C], Sequence[str]] = lambda config: ()
    summary: Callable[[Artifact], Sequence[str]] = lambda artifact: ()
    next: Callable[[C], str] = lambda config: ""
    gate: Callable[[Artifact, C], None] = lambda artifact, config: None
    resumable: bool = False
    apart: bool = False

    def run(self, config: C, *, overwrite: bool = False, pipeline: str | None = None, again: bool = False) -> Artifact:
        """Do the stage (or find it up to date). Callable from Python; argv and process state play no part.

        Args:
            config: a validated config.
            overwrite: replace an artifact made with other settings.
            pipeline: name of the pipeline that runs it; artifacts that name the same pipeline are replaced without `overwrite`.
            again: do it also where it is up to date (implies `overwrite`).

        Raises:
            SopError: with the exit code of the process.
        """
        target = self.output(config)
        try:
            target.folder.mkdir(parents=True, exist_ok=True)
            with artifact.lock(target):
                done = self._locked(config, target, overwrite or again, pipeline, again)
        except OSError as error:
            raise errors.from_os_error(error, folder=str(target.folder)) from error
        self.gate(done, config)
        return done

    def why(self, config: C) -> str:
        """Why `run` would do something, without touching anything; empty where the artifact is up to date."""
        target = self.output(config)
        old = artifact.read_manifest(target.manifest)
        if old is None:
            return "not there yet"
        inputs = self._hash_inputs(config, old)
        if old.get("fingerprint") == self._fingerprint(comparable(config, self.uses), inputs):
            return "; ".join(artifact.differences(target, old)[:5])
        return "; ".join(self._changed(old, comparable(config, self.uses), inputs)[:3]) or "made differently"

    def _fingerprint(self, settings: dict[str, Any], inputs: Mapping[str, Any]) -> str:
        return fingerprint_of({"stage": self.name, "code": {"stage": self.version}, "config": settings, "inputs": inputs})

    def _locked(self, config: C, target: Target, overwrite: bool, pipeline: str | None, again: bool) -> Artifact:
        old = artifact.read_manifest(target.manifest)
        inputs = self._hash_inputs(config, old)
        settings = comparable(config, self.uses)
        fingerprint = self._fingerprint(settings, inputs)
        spared = artifact.sweep(target, keep=fingerprint)
        if old and not again and old.get("fingerprint") == fingerprint and not artifact.differences(target, old):
            shutil.rmtree(target.work(fingerprint), ignore_errors=True)  # left by a kill between the manifest and the end
            return Artifact(target, old, skipped=True)
        if old and not overwrite and not (pipeline and old.get("pipeline") == pipeline):
            self._refuse(target, old, fingerprint, settings, inputs)
        if spared and not overwrite:
            raise SopError(_interrupted_differently(spared[0], settings), where=str(target), fix="run with the earlier settings to resume it, or pass --overwrite to drop it")
        for path in spared:
            shutil.rmtree(path)
        artifact.require_room(target.folder, self.disk(config))
        work = target.work(fingerprint)
        if work.exists() and (again or not self.resumable):
            shutil.rmtree(work)
        work.mkdir(exist_ok=True)
        artifact.write_atomic(work / ".config.json", json.dumps(redact_tree(settings)))
        memory = PeakMemory()
        started, clock = time.time(), time.perf_counter()
        stats = self.build(Run(config=config, work=work, inputs=inputs, fingerprint=fingerprint))
        manifest = {
            "schema": artifact.SCHEMA, "stage": self.name, "status": "complete", "fingerprint": fingerprint, "pipeline": pipeline,
            "config": redact_tree(settings), "paths": redact_tree(plain(config)), "inputs": inputs, "stats": redact_tree(stats),
            "seed": getattr(config, "seed", None), "code": {"package": __version__, "stage": self.version}, "libraries": _library_versions(),
            "device": _device(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)), "seconds": round(time.perf_counter() - clock, 2),
            "peak_memory_mib": memory.mib(), "folder": str(target.folder.absolute()),
        }  # fmt: skip
        return Artifact(target, artifact.publish(target, work, manifest, overwrite=overwrite))

    def _hash_inputs(self, config: C, old: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
        known = (old or {}).get("inputs", {})
        return {name: artifact.hash_input(path, known.get(name)) for name, path in self.inputs(config).items() if path is not None}

    def _refuse(self, target: Target, old: Mapping[str, Any], fingerprint: str, settings: dict[str, Any], inputs: Mapping[str, Any]) -> None:
        if old.get("fingerprint") == fingerprint:
            wrong = artifact.differences(target, old)
            raise SopError(f"its files no longer match its manifest: {'; '.join(wrong[:5])}", where=str(target), fix="pass --overwrite to make it again", code=errors.DATA)
        what = "an artifact made with other settings is here:\n  " + "\n  ".join(self._changed(old, settings, inputs)[:12])
        raise SopError(what, where=str(target), fix="choose another output, or pass --overwrite to replace it")

    def _changed(self, old: Mapping[str, Any], settings: dict[str, Any], inputs: Mapping[str, Any]) -> list[str]:
        if old.get("stage") != self.name:
            return [f"stage: {old.get('stage')} -> {self.name}"]
        changed = [*_changes(old.get("config", {}), redact_tree(settings)), *_input_changes(old.get("inputs", {}), inputs)]
        version = old.get("code", {}).get("stage")
        return changed if version == self.version else [*changed, f"stage code version: {version} -> {self.version}"]


@dataclass(frozen=True, kw_only=True)
class Verb(Generic[C]):
    """A command with a config but without an artifact; the fields are those of `Stage`."""

    name: str
    config: type[C]
    uses: tuple[str, ...] | None = None
    preflight: Callable[[C], Sequence[tuple[str, str, str]]] = lambda config: ()


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """What decides an artifact's content: stage, its code version, the config without paths and cosmetic keys, and the hashes of the inputs."""
    inputs = {name: entry["sha256"] for name, entry in manifest["inputs"].items()}
    return artifact.sha256_json({"stage": manifest["stage"], "version": manifest["code"]["stage"], "config": manifest["config"], "inputs": inputs})


class PeakMemory:
    """The largest resident set of this process, and of any child that ended, since the object was made.

    Linux can start the mark of a process anew; elsewhere the peak is that of the run so far. The mark of children cannot, so they count once they exceed earlier ones.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._children = self._peak("children")

    @staticmethod
    def _peak(of: str) -> int:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF if of == "self" else resource.RUSAGE_CHILDREN).ru_maxrss * unit

    def mib(self) -> int:
        """The peak so far, MiB."""
        children = self._peak("children")
        return max(self._peak("self"), children if children > self._children else 0) >> 20


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            yield f"{key}: {old.get(key)!r} -> {new.get(key)!r}"


def _input_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*old, *new}):
        if old.get(name, {}).get("sha256") != new.get(name, {}).get("sha256"):
            path = (new if name in new else old)[name]["path"]
            yield f"contents of input {name} ({path})"


def _interrupted_differently(work: Path, settings: dict[str, Any]) -> str:
    try:
        earlier = json.loads((work / ".config.json").read_text(encoding="utf-8"))
        changed = list(_changes(earlier, redact_tree(settings)))
    except (OSError, ValueError):
        changed = []
    return "an interrupted run with complete checkpoints is here, made with other settings:\n  " + ("\n  ".join(changed) or "other inputs or code version")


def _library_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {"python": platform.python_version(), **found}


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name(0)} x {torch.cuda.device_count()}"
    return f"cpu: {platform.machine()}"


# --- the command line around a stage ------------------------------------------------------------------------------------------------------


def stage_main(stage: Stage[Any], argv: Sequence[str] | None = None) -> int:
    """Run a stage from the command line; returns the exit code."""

    def work() -> int:
        args, settings = parse_arguments(stage, list(sys.argv[1:] if argv is None else argv))
        loaded = load_for(stage, args.config, settings)
        if args.dry_run:
            console.say(f"{stage.name}: the configuration is valid; output goes to {stage.output(loaded.config)}")
            for line in stage.plan(loaded.config):
                console.say(f"  {line}")
            return errors.OK
        from .hub import configure

        configure(loaded.config)
        report(stage, loaded.config, stage.run(loaded.config, overwrite=args.overwrite))
        return errors.OK

    return guarded(work)


def report(stage: Stage[Any], config: Any, done: Artifact) -> None:
    """The summary lines of a finished stage."""
    for line in stage.summary(done):
        console.say(line)
    state = "up to date" if done.skipped else f"done in {console.human_seconds(done.manifest['seconds'])}"
    console.say(f"{stage.name}: {state} -> {done.target}")
    following = stage.next(config)
    if following:
        console.say(f"next: {following}")


def load_for(stage: Stage[C] | Verb[C], path: Path | None, settings: Sequence[Setting], *, check_paths: bool = True) -> Loaded[C]:
    """Load the stage's config and run its preflight; all problems in one error."""
    loaded = load(stage.config, path, settings, check_paths=check_paths, uses=stage.uses)
    problems = preflight_problems(stage, loaded)
    if problems:
        raise ConfigError(problems)
    return loaded


def preflight_problems(stage: Stage[C] | Verb[C], loaded: Loaded[C]) -> list[Problem]:
    """What the stage's own preflight finds, each with the line of its key."""
    found = stage.preflight(loaded.config)
    return [Problem(loaded.tree.where(tuple(key.split("."))), f"{key}: {what}" if key else what, fix) for key, what, fix in found]


def guarded(work: Callable[[], int]) -> int:
    """Run `work`, turning errors into one clear message and the right exit code; SIGTERM ends like an interrupt, with 143."""

    def on_term(number: int, frame: object) -> None:
        raise errors.Interrupted("stopped by SIGTERM; finished work is kept, unfinished work is redone by the same command", code=errors.SIGTERM)

    with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
        signal.signal(signal.SIGTERM, on_term)
    try:
        return work()
    except SopError as error:
        console.note(f"error: {error}")
        return error.code
    except KeyboardInterrupt:
        console.note("stopped; finished work is kept, unfinished work is redone by the same command")
        return errors.SIGINT
    except BrokenPipeError:
        return errors.OK
    except OSError as error:
        console.note(f"error: {errors.from_os_error(error)}")
        return errors.from_os_error(error).code
    except ModuleNotFoundError as error:
        name = (error.name or str(error)).partition(".")[0]
        if name == __package__:
            return _bug()
        fix = "install the project with its dependencies (uv sync, or pip install -e .); sop doctor shows what is missing"
        console.note(f"error: the package {name!r} is not installed\n  fix: {fix}")
        return errors.ENVIRONMENT
    except MemoryError:
        console.note("error: out of memory\n  fix: smaller batches or blocks, or a machine with more memory")
        return errors.ENVIRONMENT
    except Exception:
        return _bug()


def _bug() -> int:
    console.note(redact(traceback.format_exc()))
    console.note("this is a fault of self-model-sop: please report it with the text above")
    return errors.BUG


def default_config(name: str) -> Path | None:
    """The YAML that a stage reads without --config: the table's entry below the project root, if it is there."""
    from .config import project_root
    from .stages import by_name

    relative = by_name(name).config
    path = project_root() / relative if relative else None
    return path if path and path.is_file() else None


def parse_arguments(stage: Stage[Any] | Verb[Any], argv: list[str]) -> tuple[argparse.Namespace, list[Setting]]:
    """argv -> (`config`, and for stages `dry_run`, `overwrite`), and the settings of documented flags followed by those of `a.b=c`."""
    from .stages import by_name

    parser = argparse.ArgumentParser(
        prog=f"sop {' '.join(by_name(stage.name).command)}", description=by_name(stage.name).help, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="keys of the YAML file with their defaults; each can be given as key=value:\n" + "\n".join(f"  {k}={d}  {h}" for k, _, d, h in describe(stage.config)),
    )  # fmt: skip
    parser.add_argument("--config", type=Path, help="YAML file (default: %s)" % (by_name(stage.name).config or "none"))
    if isinstance(stage, Stage):
        parser.add_argument("--dry-run", "--dry_run", action="store_true", help="check everything, print the plan, do nothing")
        parser.add_argument("--overwrite", action="store_true", help="replace an artifact made with other settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key of the YAML file")
    flags: dict[str, str] = {}
    for loc, f, hint in fields(stage.config):
        flag = f.metadata.get("flag")
        if not flag:
            continue
        key = ".".join(loc)
        flags[key] = flag
        names = dict.fromkeys([flag, flag.replace("_", "-")])
        if hint is bool or hint == (bool | None):
            parser.add_argument(*names, dest=key, action=argparse.BooleanOptionalAction, default=None, help=f.metadata["help"])
        elif str(hint).startswith(("tuple", "list")):
            parser.add_argument(*names, dest=key, nargs="+", default=None, help=f.metadata["help"])
        else:
            parser.add_argument(*names, dest=key, default=None, help=f.metadata["help"])
    hints = {".".join(loc): hint for loc, _, hint in fields(stage.config)}
    overrides, words = _overrides(argv, hints)
    args = parser.parse_intermixed_args(words)
    if args.config is None:
        args.config = default_config(stage.name)
    elif not args.config.is_file():
        raise SopError("no such config file", where=str(args.config))
    settings = [_flag_setting(key, value, flags[key], hints[key]) for key, value in vars(args).items() if key in flags and value is not None]
    return args, [*settings, *map(parse_override, [*overrides, *args.overrides])]


def _overrides(argv: Sequence[str], keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """(The words `key=value` that name a key, the other words).

    A flag of several values (`--input A B key=value`) would take them too. What comes right after a flag is its value, whatever it looks like.
    """
    known = tuple(keys)

    def named(word: str, before: str) -> bool:
        key, equals, _ = word.partition("=")
        return bool(equals) and not word.startswith("-") and not before.startswith("-") and any(f"{key}.".startswith(f"{k}.") or k.startswith(f"{key}.") for k in known)

    found = [named(word, before) for word, before in zip(argv, ["", *argv], strict=False)]
    return [w for w, yes in zip(argv, found, strict=True) if yes], [w for w, yes in zip(argv, found, strict=True) if not yes]


def _flag_setting(key: str, value: Any, flag: str, hint: Any) -> Setting:
    """A flag's text as the type its field wants; text that is no number stays text, for the validation to report."""
    if isinstance(value, str) and re.search(r"\b(int|float)\b", str(hint)):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                value = kind(value)
                break
    elif isinstance(value, list) and value and "," in value[0]:
        value = [part for item in value for part in item.split(",") if part]
    return Setting(key, value, flag, Path.cwd())
