"""Measurements of models, each kept under the hash of the model's files, the data and the settings it depends on: after a change only what changed is measured again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from .. import console
from ..artifact import sha256_json, write_atomic
from ..stage import Run
from .models import Opened, free_memory, open_model

MEASURE_VERSION = 3  # raised when a measurement changes its meaning


@dataclass(frozen=True)
class Task:
    """One measurement of one model; `settings` are the keys of the config that it depends on."""

    kind: str  # "model", "bits", "sft", "answers" or "exam"
    name: str  # of the text or question set; else empty
    data: Any  # hash of what it is measured on
    settings: tuple[str, ...]
    work: Callable[[Opened], Any]


def describe_model(opened: Opened) -> dict[str, Any]:
    """Size, vocabulary and class."""
    model = opened.model
    return {"parameters": sum(p.numel() for p in model.parameters()), "vocabulary": len(opened.tokenizer), "class": type(model).__name__, "device": str(model.device)}


def measure_models(run: Run[Any], tasks: Sequence[Task], cache: Path) -> Iterator[tuple[str, dict[tuple[str, str], Any], int]]:
    """(model, (kind, name) -> what was measured, how much of it was known), one model in memory at a time.

    Args:
        run: of a stage whose config has `models`, `dtype` and `device`.
        tasks: the measurements.
        cache: folder that keeps them.
    """
    for name in run.config.models:
        found, known = _measure_model(run, name, tasks, cache)
        free_memory()
        yield name, found, known


def _measure_model(run: Run[Any], name: str, tasks: Sequence[Task], cache: Path) -> tuple[dict[tuple[str, str], Any], int]:
    """Every measurement of one model; it is loaded only where one is missing."""
    config = run.config
    hashes = [run.inputs[label]["sha256"] for label in (f"model {name}", f"model {name} base") if label in run.inputs]
    found: dict[tuple[str, str], Any] = {}
    opened, known = None, 0
    for task in tasks:
        settings = {key: _plain(getattr(config, key)) for key in task.settings}
        key = sha256_json({"version": MEASURE_VERSION, "kind": task.kind, "model": hashes, "data": task.data, "settings": settings})
        path = cache / f"{key}.json"
        if hashes and path.is_file():
            found[task.kind, task.name], known = json.loads(path.read_text(encoding="utf-8")), known + 1
            continue
        opened = opened or open_model(config.models[name], dtype=config.dtype, device=config.device)
        console.note(f"{name}: {task.kind} {task.name}".rstrip())
        result = found[task.kind, task.name] = _json(task.work(opened))
        if hashes:  # a hub id has no local contents to hash
            cache.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(result, ensure_ascii=False, allow_nan=False))
    return found, known


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _json(value: Any) -> Any:
    """As it would come out of the cache."""
    return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False))


def once() -> Callable[[Path, Callable[[], Any]], Any]:
    """Read each file once, and only where a measurement needs it."""
    known: dict[Path, Any] = {}

    def read(path: Path, load: Callable[[], Any]) -> Any:
        if path not in known:
            known[path] = load()
        return known[path]

    return read


def outcomes_of(found: Mapping[tuple[str, str], Any], kind: str = "exam") -> dict[str, Any]:
    """name -> result of the measurements of one kind."""
    return {name: value for (k, name), value in found.items() if k == kind}
