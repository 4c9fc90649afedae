"""Work in several processes; the order, and so the result, is that of one."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from .errors import BUG, SopError

T = TypeVar("T")
R = TypeVar("R")


def ordered(prepare: Callable[[], Callable[[T], R]], blocks: Iterator[T], workers: int, *, key: str) -> Iterator[R]:
    """The result of every block, in their order.

    Args:
        prepare: called once in each process, gives what is done with a block; picklable where there are several workers.
        blocks: read only a few ahead of the results.
        workers: processes; 1 is this one.
        key: the setting that a message names for fewer of them.

    Raises:
        SopError: where a worker process died.
    """
    if workers < 2:
        yield from map(prepare(), blocks)
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe once a library has started threads
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(prepare,)) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for block in blocks:
                waiting.append(pool.submit(_work, block))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise SopError("a worker process died (killed, or out of memory?)", fix=f"run again, with fewer workers if memory is short: {key}", code=BUG) from None
            raise


# --- in worker processes ------------------------------------------------------------------------------------------------------------------

_prepared: Callable[[Any], Any] | None = None


def _start(prepare: Callable[[], Callable[[Any], Any]]) -> None:
    """Prepare once; a worker ends with its parent: a killed parent cannot tell it to."""
    global _prepared
    _prepared = prepare()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (multiprocessing.connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _work(block: Any) -> Any:
    assert _prepared is not None
    return _prepared(block)
