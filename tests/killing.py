from __future__ import annotations

import os
import random
import signal
import subprocess
import time


class Killer:
    """Kills runs at random moments.

    `seconds` is how long a whole run took; on a busy machine the next may be much faster, so a run that ended before its kill makes the later waits shorter.
    """

    def __init__(self, seconds: float, draw: random.Random) -> None:
        self.seconds, self.draw, self.killed = seconds, draw, 0

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Wait a part of a run, then kill the process and its children."""
        time.sleep(self.seconds * self.draw.uniform(0.1, 1.0))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            self.killed += 1
        else:
            self.seconds *= 0.3
        process.wait()
