"""`sop`: argv -> table -> the module's main. Imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from . import __version__
from .errors import USAGE
from .stages import STAGES, Entry


def usage() -> str:
    """The help text, derived from the table."""
    width = max(len(" ".join(e.command)) for e in STAGES) + 2
    lines = [f"  {' '.join(e.command):<{width}}{e.help}" for e in STAGES]
    return "\n".join(
        [
            "usage: sop COMMAND [--config FILE] [key=value ...]",
            "",
            "Raw Chinese / domain text to a measured, deployable domain model.",
            "",
            *lines,
            "",
            "sop COMMAND --help  shows the keys of a command.",
        ]
    )


def find(words: Sequence[str]) -> tuple[Entry | None, list[str]]:
    """The entry that the first one or two words name, and the rest of argv."""
    for entry in STAGES:
        n = len(entry.command)
        if tuple(w.replace("_", "-") for w in words[:n]) == entry.command:
            return entry, list(words[n:])
    return None, list(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command `sop`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"self-model-sop {__version__}")
        return 0
    entry, rest = find(words)
    if entry is None:
        typed = " ".join(w for w in words[:2] if not w.startswith("-"))
        near = difflib.get_close_matches(typed, [" ".join(e.command) for e in STAGES], 1)
        print(f"error: no command {typed!r}" + (f"; did you mean 'sop {near[0]}'?" if near else "; see sop --help"), file=sys.stderr)
        return USAGE
    code: int = importlib.import_module(entry.module).main(rest)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
