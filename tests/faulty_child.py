"""Runs a light stage in a process of its own in which the k-th file operation below the output folder goes wrong.

`python faulty_child.py count|kill|full K OUT [key=value ...]`: `count` prints how many operations there are, `kill` ends the process with SIGKILL just
before the k-th, `full` lets the k-th fail as on a full disk. Operations are seen by an audit hook, so nothing of the code under test is replaced.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
WRITING = {"open", "os.rename", "os.mkdir"}


def install(mode: str, k: int, out: str) -> list[int]:
    """Watch operations below `out`; returns a list that holds their number."""
    seen = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in (WRITING if mode == "full" else WATCHED) or not isinstance(arguments[0], (str, bytes)) or not os.fsdecode(arguments[0]).startswith(out):
            return
        if event == "os.mkdir" and Path(os.fsdecode(arguments[0])).is_dir():  # nothing is written where the folder is there
            return
        if mode == "full" and event == "open" and isinstance(arguments[2], int) and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        seen[0] += 1
        if seen[0] == k and mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if seen[0] == k and mode == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(arguments[0]))

    sys.addaudithook(hook)
    return seen


def main() -> int:
    import light_stages

    mode, k, out, *rest = sys.argv[1:]
    light_stages.add_to_table()
    seen = install(mode, int(k), str(Path(out).absolute()))
    code = light_stages.stage_main(light_stages.WRITE, [f"output_dir={out}", *rest])
    if mode == "count":
        print(seen[0])
    return code


if __name__ == "__main__":
    raise SystemExit(main())
