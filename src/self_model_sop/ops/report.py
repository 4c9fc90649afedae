"""`sop report RUN`: one self-contained HTML page about a finished run: what was gained, what was lost, what it cost, and everything behind it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .. import console, errors
from ..artifact import write_atomic
from ..redact import redact
from ..stage import guarded
from ..yaml_source import display

FILE = "report.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def work() -> int:
        args = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
        started = time.perf_counter()
        path = write(args.run, args.output, language=args.lang, samples=args.samples)
        console.say(f"{display(path)}: {path.stat().st_size / 1e6:.2f} MB, in {console.human_seconds(time.perf_counter() - started)}; one file, opens without a network")
        return errors.OK

    return guarded(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sop report", description="write one self-contained HTML page about a finished run", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a run (any folder with artifacts below it)")
    parser.add_argument("-o", "--output", type=Path, help=f"the page; default: {FILE} in that folder")
    parser.add_argument("--lang", choices=("auto", "en", "zh"), default="auto", help="language shown first (both are in the page); auto: the reader's")
    parser.add_argument("--samples", type=int, default=4, help="held-out texts shown token by token; 0 shows no text of the data")
    return parser


def write(run: Path, output: Path | None = None, *, language: str = "auto", samples: int = 4) -> Path:
    """Gather, render and write; returns the path of the page.

    Raises:
        SopError: where there is no finished run.
    """
    from ..report.gather import gather
    from ..report.page import render

    path = output or run / FILE
    write_atomic(path, redact(render(gather(run.absolute()), language=language, samples=samples)))  # type: ignore[arg-type]
    return path
