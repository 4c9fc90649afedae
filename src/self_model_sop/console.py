"""What a person sees: messages, progress bars, tables. Rank 0 only; secrets never pass.

Results go to stdout, everything else to stderr, so that a result can be piped.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from .redact import redact

T = TypeVar("T")
_NUMBER = re.compile(r"(?:[-+]?[\d.,]+ ?\S{0,3}(?: \(\S+\)| / [\d,]+)?|-|)\Z")


def is_main_rank() -> bool:
    """True on rank 0 of a distributed run, and everywhere else outside one."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """A result or summary line, to stdout."""
    if is_main_rank():
        print(redact(text), flush=True)


def note(text: str) -> None:
    """A message about the run, to stderr."""
    if is_main_rank():
        print(redact(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Something the user should know; the run goes on."""
    note(f"warning: {text}")


def rich_console(*, stderr: bool = False) -> Any:
    """A rich Console whose width is generous when the output is not a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 140, highlight=False, soft_wrap=False)


@contextmanager
def progress(title: str, total: float | None = None, unit: str = "") -> Iterator[Any]:
    """A progress bar with elapsed and remaining time; yields `advance(n=1)`.

    Without a terminal nothing is drawn, and the elapsed time is printed once at the end by the stage.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=rich_console(stderr=True), transient=True, disable=not (is_main_rank() and sys.stderr.isatty())) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n=1: bar.advance(task, n)


def track(items: Iterable[T], title: str, total: float | None = None, unit: str = "") -> Iterator[T]:
    """Iterate with a progress bar."""
    with progress(title, total if total is not None else (len(items) if isinstance(items, Sized) else None), unit) as advance:
        for item in items:
            yield item
            advance()


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table to stdout."""
    if not is_main_rank():
        return
    from rich.table import Table
    from rich.text import Text

    view = Table(title=Text(title), title_justify="left", header_style="bold")
    for i, name in enumerate(header):
        numbers = i > 0 and all(_NUMBER.match(str(row[i])) for row in rows)
        view.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        view.add_row(*(Text(redact(str(cell))) for cell in row))  # plain text: brackets in it are no markup
    rich_console().print(view)


def human_seconds(seconds: float) -> str:
    """`7.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
