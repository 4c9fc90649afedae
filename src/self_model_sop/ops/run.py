"""`sop run PIPELINE`: check every stage's config, then do the stages in order; what is up to date is skipped."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import console, errors
from ..artifact import read_manifest
from ..config import ConfigError
from ..hub import configure
from ..stage import Artifact, guarded
from ..yaml_source import display
from .apart import possible, run_apart

if TYPE_CHECKING:
    from .steps import Pipeline, Step


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def work() -> int:
        args = _parser().parse_intermixed_args(list(sys.argv[1:] if argv is None else argv))
        from .pipeline import load_pipeline

        pipeline = load_pipeline(args.pipeline, args.overrides)
        first = pipeline.index(args.first) if args.first else len(pipeline.steps)
        if args.dry_run:
            print_plan(pipeline, first)
        else:
            run(pipeline, first=first, overwrite=args.overwrite)
        return errors.OK

    return guarded(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sop run", description="run a whole pipeline; finished stages are skipped", allow_abbrev=False)
    parser.add_argument("pipeline", type=Path, help="YAML file, or the name of one in config/pipeline")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="do this stage and all after it again, also where they are up to date")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="check everything, print what would run, do nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace artifacts that something else made")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="root=..., shared.GROUP.KEY=..., or STAGE.KEY=... for one stage")
    return parser


def print_plan(pipeline: Pipeline, first: int) -> None:
    """Each stage, where it writes, and whether it would run and why."""
    reasons: dict[str, str] = {}
    folders: dict[str, Path] = {}
    for n, step in enumerate(pipeline.steps):
        if n >= first:
            reasons[step.id] = "asked for with --from"
        elif read_manifest(step.target.manifest) is None:
            reasons[step.id] = "not there yet"
        else:
            changing = sorted(s for s in step.needs(folders) if reasons[s])
            reasons[step.id] = f"after {', '.join(changing)}" if changing else step.stage.why(step.config)
        folders[step.id] = step.target.folder
    total = len(pipeline.steps)
    for n, step in enumerate(pipeline.steps, 1):
        state = f"to run ({reasons[step.id]})" if reasons[step.id] else "up to date"
        console.say(f"[{n}/{total}] {step.id} ({step.entry.name}): {state} -> {display(step.target.folder)}")


def run(pipeline: Pipeline, *, first: int | None = None, overwrite: bool = False) -> list[Artifact]:
    """Do all stages; those from position `first` on even where they are up to date. Prints the summary; returns the artifacts.

    Raises:
        SopError: of the stage that failed; the stages before it are kept.
    """
    from .summary import conclude

    started, done = time.perf_counter(), []
    for step in pipeline.steps:
        configure(step.config)  # before any stage imports a hub library
    for n, step in enumerate(pipeline.steps, 1):
        done.append(_run_step(pipeline, n, step, again=first is not None and n > first, overwrite=overwrite))
    conclude(pipeline, done, time.perf_counter() - started)
    return done


def _run_step(pipeline: Pipeline, n: int, step: Step, *, again: bool, overwrite: bool) -> Artifact:
    mark = f"[{n}/{len(pipeline.steps)}] {step.id}"
    try:
        config = step.reload()
        why = "asked for with --from" if again else step.stage.why(config)
        if why:
            replaces = read_manifest(step.stage.output(config).manifest) is not None
            console.say(f"{mark} ({step.entry.name})" + (f": again, {why}" if replaces else ""))
        done = _do(step, config, bool(why), lambda: step.stage.run(config, overwrite=overwrite, pipeline=pipeline.name, again=again))
    except ConfigError:
        console.note(f"{mark}: not started")
        raise
    except (errors.SopError, SystemExit):
        console.note(f"{mark}: stopped; the stages before it are kept, and the same command goes on from here")
        raise
    if not done.skipped:
        for line in step.stage.summary(done):
            console.say(f"  {line}")
    state = "up to date" if done.skipped else f"done in {console.human_seconds(done.manifest['seconds'])}"
    console.say(f"{mark}: {state} -> {display(done.path)}")
    return done


def _do(step: Step, config: Any, needed: bool, work: Callable[[], Artifact]) -> Artifact:
    """Run a stage here, or, where it loads models, in a process of its own.

    Raises:
        SystemExit: with the exit code of a stage that failed in its own process, which has said why.
    """
    if not (needed and step.stage.apart and possible()):
        return work()
    code = run_apart(work)
    if code != errors.OK:
        raise SystemExit(code)
    target = step.stage.output(config)
    manifest = read_manifest(target.manifest)
    assert manifest is not None  # the child said so
    return Artifact(target, manifest)
