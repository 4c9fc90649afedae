"""Rendering rows in several processes; the order, and so the result, is that of one."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from ..errors import BUG, SopError

T = TypeVar("T")
R = TypeVar("R")
_BLOCK = 256


def ordered(work: Callable[[T], R], items: Iterator[T], workers: int) -> Iterator[R]:
    """`work` on every item, in their order; `work` must be picklable where there are several workers.

    Raises:
        SopError: where a worker process died.
    """
    if workers < 2:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe once a library has started threads
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(work,)) as pool:
        waiting: deque[Future[list[Any]]] = deque()
        try:
            while block := list(islice(items, _BLOCK)):
                waiting.append(pool.submit(_block, block))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise SopError("a process that tokenises died (killed, or out of memory?)", fix="run again, with data.workers=1 if memory is short", code=BUG) from None
            raise


# --- in worker processes ------------------------------------------------------------------------------------------------------------------

_work: Callable[[Any], Any] | None = None


def _start(work: Callable[[Any], Any]) -> None:
    """Take the work once; a worker ends with its parent: a killed parent cannot tell it to."""
    global _work
    _work = work
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (multiprocessing.connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _block(items: Sequence[Any]) -> list[Any]:
    assert _work is not None
    return [_work(item) for item in items]
