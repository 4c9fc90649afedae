"""A stage in a process of its own: a trained model's memory goes back to the system before the next stage starts."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable

from .. import errors
from ..stage import guarded

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def possible() -> bool:
    """False where a fork would be unsafe: torch's threads do not survive one."""
    return hasattr(os, "fork") and "torch" not in sys.modules


def run_apart(work: Callable[[], object]) -> int:
    """Run `work` (which answers with what it made) in a child process and wait; returns its exit code. The child prints its own errors, and dies with this process.

    SIGTERM is passed on, so that a training saves its state; the terminal itself sends Ctrl-C to both.

    Raises:
        SopError: where the child was killed, for want of memory as a rule.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        _die_with(parent)
        code = guarded(lambda: errors.OK if work() else errors.BUG)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    status = _wait(child)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        what = f"the stage's process was ended by {signal.Signals(number).name}"
        raise errors.SopError(what, fix="if memory ran out: smaller batches, or a machine with more; the same command goes on from here", code=errors.ENVIRONMENT)
    return os.WEXITSTATUS(status)


def _die_with(parent: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # no prctl outside Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(errors.BUG)


def _wait(child: int) -> int:
    while True:
        try:
            return os.waitpid(child, 0)[1]
        except errors.Interrupted:
            os.kill(child, signal.SIGTERM)
        except KeyboardInterrupt:
            continue  # the child got it too
