"""`sop`: argv -> table -> the module's main. Imports nothing heavy."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from . import __version__
from .errors import USAGE, nearest
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


def unknown(words: Sequence[str]) -> str:
    """What to say about words that are no command: the commands of their group, or the nearest command."""
    typed = [w.replace("_", "-") for w in words[:2] if not w.startswith("-")] or list(words[:1])
    group = [" ".join(e.command) for e in STAGES if e.command[0] == typed[0]]
    if group and len(typed) == 1:
        return f"error: 'sop {typed[0]}' needs one more word:\n" + "\n".join(f"  sop {name}" for name in group)
    known = group or [" ".join(e.command) for e in STAGES]
    near = nearest(" ".join(typed), known) or nearest(typed[0], [n for n in known if " " not in n])
    return f"error: no command {' '.join(typed)!r}; " + (f"did you mean 'sop {near}'?" if near else "see sop --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command `sop`. A reader that went away (`sop --help | head`) is no error."""
    try:
        code = dispatch(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush would complain again
        return 0


def dispatch(argv: Sequence[str] | None) -> int:
    """Find the command and run it; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"self-model-sop {__version__}")
        return 0
    entry, rest = find(words)
    if entry is None:
        print(unknown(words), file=sys.stderr)
        return USAGE
    code: int = importlib.import_module(entry.module).main(rest)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
