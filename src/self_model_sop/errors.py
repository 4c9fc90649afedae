"""The one error type a user meets, and the exit codes of every command."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

OK = 0
BUG = 1
USAGE = 2  # command line or config
DATA = 3  # data, or a result beyond tolerance (a NaN loss too)
ENVIRONMENT = 4  # missing GPU, extra or memory
NETWORK = 5
DISK = 6
LOCKED = 7
SIGINT = 130
SIGTERM = 143


class SopError(Exception):
    """Says what is wrong, where, and how to fix it; carries the exit code of the process.

    Args:
        what: one sentence.
        where: file, `file:line`, row or key.
        fix: what the user can do now.
        code: one of the exit codes of this module.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, code: int = USAGE) -> None:
        self.what, self.where, self.fix, self.code = what, where, fix, code
        super().__init__(what)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  fix: {self.fix}" if self.fix else head


class Interrupted(SopError):
    """A run stopped by a signal, with its state saved."""

    def __init__(self, what: str, *, code: int, fix: str | None = None) -> None:
        super().__init__(what, fix=fix, code=code)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that a misspelt one most likely means, or None."""
    import difflib

    found = difflib.get_close_matches(word, list(known), 1, cutoff)
    return found[0] if found else None


def suggest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """`did you mean 'x'?`, or `otherwise` where nothing is near."""
    near = nearest(word, known)
    return f"did you mean {near!r}?" if near else otherwise


def missing_extra(package: str, extra: str) -> SopError:
    """The error for an optional dependency that is not installed."""
    return SopError(
        f"the package {package!r} is not installed",
        fix=f"pip install 'self-model-sop[{extra}]'  (or: uv sync --extra {extra})",
        code=ENVIRONMENT,
    )


_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def from_os_error(error: OSError, needed: int | None = None, folder: str = "") -> SopError:
    """Translate an operating-system error of a stage into a SopError with the right exit code.

    Args:
        error: what was raised; a failed write names no file.
        needed: bytes that the stage wants to write, where it knows.
        folder: where it was writing, for errors that name no file.
    """
    name = str(error.filename or folder)
    if error.errno in _DISK_ERRNOS:
        folder = folder or os.path.dirname(name) or "."
        try:
            stat = os.statvfs(folder)
            free = f"{stat.f_bavail * stat.f_frsize / 2**20:.0f} MiB free"
        except OSError:
            free = "free space unknown"
        need = f", about {needed / 2**20:.0f} MiB needed" if needed else ""
        return SopError(
            f"cannot write: {error.strerror} ({free}{need})",
            where=name or None,
            fix="free some space or choose another output folder; what was there before is intact",
            code=DISK,
        )
    return SopError(f"{error.strerror or error}", where=name or None, fix="check the path and its permissions")
