"""What this machine has, found out without importing torch."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

_REACHED = 0.75  # of what a core does below; SmolLM2-135M in fp32 reached 105 of 136 GFLOP/s per core, the optimiser step taken in
_BF16_GAIN = 2.0  # bf16 autocast against fp32, same model, CPU seconds a step: 7.8 -> 3.9 with AMX, 4.7 -> 2.0 with AVX-512 BF16 (benchmarks/training/precision.py)
_BF16_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}


# Dense matrix products in bf16 (fp16 where there is no bf16), operations per second, from NVIDIA's data sheets; the longest name that is part of a device's name counts.
_PEAKS = {
    "B200": 2.25e15, "H200": 9.89e14, "H100": 9.89e14, "H100 PCIe": 7.56e14, "H20": 1.48e14, "A100": 3.12e14, "A800": 3.12e14, "L40S": 3.62e14, "L40": 1.81e14, "L4": 1.21e14,
    "A10": 1.25e14, "V100": 1.25e14, "T4": 6.5e13,
}  # fmt: skip


class Gpu(NamedTuple):
    """A CUDA device: its name and its memory in bytes."""

    name: str
    memory: int


def gpus() -> list[Gpu]:
    """The NVIDIA devices that the driver reports."""
    if not shutil.which("nvidia-smi"):
        return []
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        name, _, mebibytes = line.rpartition(",")
        if mebibytes.strip().isdigit():
            found.append(Gpu(name.strip(), int(mebibytes) << 20))
    return found


def peak_flops(name: str) -> float | None:
    """Operations per second of a GPU's matrix units at half precision, by its name; None where it is not known."""
    known = [n for n in _PEAKS if n.lower() in name.lower()]
    return _PEAKS[max(known, key=len)] if known else None


def peak_mib() -> int:
    """Largest resident set of this process so far, MiB (with a GPU in use: the largest allocation there)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() >> 20)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20


def memory_available() -> int:
    """Bytes of main memory that a new process can take."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.split("MemAvailable:")[1].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_bf16() -> str | None:
    """With which instructions the CPU multiplies bf16 matrices; None where it has none (torch then emulates them, slowly)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return None
    return next((name for flag, name in _BF16_UNITS.items() if flag in flags), None)


def training_flops(*, half: bool) -> float:
    """Floating-point operations per second that a training reaches on this CPU: one core measured in some milliseconds, times the cores, times the share that was reached."""
    import numpy as np

    size = 96  # small enough that the library uses one core
    a = np.ones((size, size), np.float32)
    best = 0.0
    for _ in range(300):
        began = time.thread_time()  # not the clock on the wall: other processes do not count
        a @ a
        best = max(best, 2 * size**3 / max(time.thread_time() - began, 1e-9))
    return best * cores() * _REACHED * (_BF16_GAIN if half and cpu_bf16() else 1)
