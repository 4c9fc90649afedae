"""Which files of a dataset repository are rows, and to which split each belongs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import SopError
from ..names import safe_name
from .records import kind_of

SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"} | dict.fromkeys(
    ("test", "testing", "eval", "evaluation"), "test"
)
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "config.json", "package.json", "requirements.txt", "license.txt", "state.json"}
_MAX_CARD = 256 << 10


def is_rows(path: str) -> bool:
    """True for data files; hidden files, dataset descriptions, readmes, and paths that lead out of the repository are none."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or "\\" in path or not path.isprintable():
        return False
    return kind_of(Path(path)) is not None and not any(p.startswith(".") or p == ".." for p in parts) and parts[-1].lower() not in _NOT_DATA


def split_of(path: str) -> str:
    """The split that a file's name tells (`valid_zh_0.json` -> validation), else its folder, else train."""
    for part in reversed(PurePosixPath(path).parts):
        found = next((SPLITS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLITS), None)
        if found:
            return found
    return "train"


def choose(paths: Sequence[str], where: str, *, subdir: str | None, card: Mapping[str, Any], config_name: str | None, split: str | None) -> dict[str, list[str]]:
    """split -> its files, in order.

    The files are those of `config_name` in the dataset card, else those below `subdir` (or the folder named like the config), else all.

    Raises:
        SopError: where nothing matches, or several subsets do and none was named; the choices are listed.
    """
    rows = sorted(p for p in paths if is_rows(p))
    below = [p for p in rows if not subdir or p.startswith(f"{subdir}/")]
    if not below:
        folders = sorted({p.split("/")[0] for p in rows if "/" in p})
        what = f"no data files below {subdir!r}" if subdir else "no data files (JSON, JSONL, Parquet, CSV, text)"
        nothing = "look at the repository's files; formats that need code from the repository are not run"
        raise SopError(what, where=where, fix="its folders: " + ", ".join(folders) if folders else nothing)
    found = _of_config(below, where, card, config_name, subdir)
    if split:
        wanted = SPLITS.get(split, split)
        if wanted not in found:
            raise SopError(f"no split {split!r}", where=where, fix="its splits: " + ", ".join(sorted(found)))
        return {wanted: found[wanted]}
    return found


def _of_config(rows: list[str], where: str, card: Mapping[str, Any], name: str | None, subdir: str | None) -> dict[str, list[str]]:
    configs = {str(c["config_name"]): c for c in card.get("configs") or () if isinstance(c, dict) and "config_name" in c}
    folders = sorted({p.split("/")[0] for p in rows if "/" in p})
    if name and name not in configs:
        inner = [p for p in rows if p.startswith(f"{name}/")]
        if inner:
            return _by_name(inner, below=name)
        raise SopError(f"no configuration {name!r}", where=where, fix="its configurations: " + (", ".join(sorted(configs) or folders) or "none"))
    if not name and configs and not subdir:
        default = [k for k, c in configs.items() if c.get("default") or k == "default" or len(configs) == 1]
        if not default:
            raise SopError("it has several configurations", where=where, fix="choose one with --config_name: " + ", ".join(sorted(configs)))
        name = default[0]
    if name and (found := _declared(rows, configs[name])):
        return found
    if not subdir and len(folders) > 1 and not all(f.lower() in SPLITS or f.lower() == "data" for f in folders) and not any("/" not in p for p in rows):
        raise SopError("its files lie in several folders", where=where, fix="choose one with --data_subdir: " + ", ".join(folders))
    return _by_name(rows, below=subdir or "")


def _by_name(rows: list[str], below: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in rows:
        found.setdefault(split_of(path.removeprefix(f"{below}/")), []).append(path)
    return found


def _declared(rows: list[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The `data_files` (globs) or `data_dir` of one configuration of a dataset card."""
    folder = str(config.get("data_dir") or "").strip("/")
    inner = [p for p in rows if not folder or p.startswith(f"{folder}/")]
    if not config.get("data_files"):
        return _by_name(inner, below=folder)
    found: dict[str, list[str]] = {}
    for split, pattern in _patterns(config["data_files"]):
        glob = _glob(f"{folder}/{pattern}" if folder else pattern)
        matching = [p for p in rows if glob.fullmatch(p)]
        if matching:
            found.setdefault(safe_name(SPLITS.get(split, split)), []).extend(matching)
    return found


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    for item in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = (str(item.get("split", "train")), item.get("path", [])) if isinstance(item, dict) else ("train", item)
        for path in paths if isinstance(paths, list) else [paths]:
            yield split, str(path)


def _glob(pattern: str) -> re.Pattern[str]:
    """`*` within a folder, `**/` across folders."""
    out = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return re.compile(out)


def read_card(text: str) -> dict[str, Any]:
    """The YAML head of a dataset card; empty where there is none, or none that can be read."""
    import yaml

    match = re.match(r"\A\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)", text[:_MAX_CARD], re.S)
    try:
        value = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
