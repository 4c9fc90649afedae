"""Experiment trackers through transformers' own integrations: offline without a key, and never able to stop a training."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config import project_root
from ..console import note, warn
from ..redact import redact
from .settings import Trace
from .tracesettings import TraceSettings, load_settings

_KEYS = {"wandb": "WANDB_API_KEY", "swanlab": "SWANLAB_API_KEY"}


def start(trace: Trace, project: str | None, work: Path) -> Sequence[str]:
    """Prepare a tracker; returns what `report_to` gets (empty: none, with the reason said)."""
    if trace == "none" or os.environ.get("RANK", "0") != "0":
        return ()
    package = "tensorboard" if trace == "tensorboard" else trace
    if importlib.util.find_spec(package) is None:
        warn(f"trace: {trace} needs the package {package!r} (pip install 'self-model-sop[tracking]'); training goes on, metrics.jsonl and report.html have everything")
        return ()
    settings = load_settings(trace, project_root())
    name = project or settings.project
    try:
        return _STARTERS[trace](name, settings, work)
    except Exception as error:  # a tracker's failure of any kind must never stop a training
        warn(f"{trace} did not start ({_first_line(error)}); training goes on, metrics.jsonl has everything")
        return ()


def stop(reports: Sequence[str]) -> None:
    """End the trackers' runs, so that a later stage in the same process starts its own."""
    for name in reports:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "finish"):
            with contextlib.suppress(Exception):  # the training is over and saved; nothing a tracker does matters now
                module.finish()


def guard(callbacks: Sequence[Any], reports: Sequence[str]) -> None:
    """Make the trackers' callbacks unable to raise: the first failure is said, then that tracker is silent for the rest of the run."""
    from transformers.integrations import integration_utils

    kinds = {integration_utils.INTEGRATION_TO_CALLBACK[name]: name for name in reports}
    for callback in callbacks:
        name = kinds.get(type(callback))
        if name:
            failed = [False]
            for event in (e for e in dir(callback) if e.startswith("on_")):
                setattr(callback, event, _safely(getattr(callback, event), name, failed))


def _safely(event: Callable[..., Any], name: str, failed: list[bool]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        if failed[0]:
            return None
        try:
            return event(*args, **kwargs)
        except Exception as error:  # whatever a tracker raises, the training is worth more
            failed[0] = True
            warn(f"{name} failed ({_first_line(error)}) and is left out from here; training goes on, metrics.jsonl has everything")
            return None

    return called


def _first_line(error: Exception) -> str:
    lines = redact(str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


def _online(trace: str, settings: TraceSettings) -> bool:
    key = bool(os.environ.get(_KEYS[trace]))
    if settings.mode == "online" and not key:
        warn(f"{trace}: mode online, but {_KEYS[trace]} is not set; writing offline")
    return key and settings.mode != "offline"


def _wandb(project: str, settings: TraceSettings, work: Path) -> Sequence[str]:
    import wandb  # noqa: F401 - an installation that does not import shows here, not in the middle of the trainer

    online = _online("wandb", settings)
    os.environ["WANDB_PROJECT"] = project
    os.environ["WANDB_MODE"] = "online" if online else "offline"
    os.environ["WANDB_SILENT"] = "true"
    os.environ.setdefault("WANDB_LOG_MODEL", "false")
    os.environ["WANDB_DIR"] = str(_folder(settings, work))
    if not online:
        note(f"wandb: offline, runs go to {_folder(settings, work)} (upload later: wandb sync)")
    return ("wandb",)


def _swanlab(project: str, settings: TraceSettings, work: Path) -> Sequence[str]:
    import swanlab

    online = _online("swanlab", settings)
    folder = _folder(settings, work)
    # The library's callback calls swanlab.init without a mode and fails offline; it takes over a run that is already there.
    swanlab.init(project=project, mode="cloud" if online else "local" if importlib.util.find_spec("swanboard") else "offline", logdir=str(folder))
    if not online:
        note(f"swanlab: offline, the run goes to {folder}")
    return ("swanlab",)


def _tensorboard(project: str, settings: TraceSettings, work: Path) -> Sequence[str]:
    import torch.utils.tensorboard  # noqa: F401 - as for wandb

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(_folder(settings, work) / project)
    return ("tensorboard",)


_STARTERS = {"wandb": _wandb, "swanlab": _swanlab, "tensorboard": _tensorboard}


def _folder(settings: TraceSettings, work: Path) -> Path:
    folder = Path(settings.log_dir)
    folder = folder if folder.is_absolute() else project_root() / folder
    folder.mkdir(parents=True, exist_ok=True)
    return folder
