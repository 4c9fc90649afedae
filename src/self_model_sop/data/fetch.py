"""Fetch a dataset as it is: a porter. Every row and every field arrives untouched; cleaning is the next stage's work.

From a hub, each split becomes `<output_dir>[/<data_subdir>]/<owner_name>__<split>.jsonl`. A local file or folder keeps its subfolders and file
names: JSONL and text are copied byte for byte, JSON, CSV and Parquet become JSONL.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from .. import console, repository
from ..artifact import Target, read_manifest
from ..config import option
from ..errors import DATA, SopError
from ..hub import HubConfig
from ..names import inside, safe_name, safe_relative
from ..repository import RemoteFile, Repository
from ..stage import Artifact, Run, Stage, stage_main
from . import records
from .encodings import open_bytes
from .head import head, plain_name
from .porter import Writer
from .splits import choose, is_rows, read_card

_CHUNK = 1 << 20
_SHOWN_ROWS = 5
_SHOWN_CHARS = 200


@dataclass(frozen=True, kw_only=True)
class Config:
    """`config/data_config/fetch.yaml`."""

    dataset_name: str = option("data_process/sample_data", "hub id (owner/name), or a local file or folder", path="model", flag="--dataset_name")
    data_subdir: str | None = option(None, "only this folder of the dataset; also the folder below output_dir", flag="--data_subdir")
    output_dir: Path = option(Path("data_process/fetch_data"), "where the raw files go", path="output", flag="--output_dir")
    sample_limit: int | None = option(None, "at most so many rows of each output file; no more than needed is downloaded", flag="--sample_limit")
    config_name: str | None = option(None, "configuration of the dataset card", flag="--config_name")
    split: str | None = option(None, "only this split: train, validation, test, ...", flag="--split")
    exclude: tuple[str, ...] = option((), "file names (globs) of a local folder that are no data")
    force_download: bool = option(False, "fetch again, also what is cached or up to date", flag="--force_download", cosmetic=True)
    huggingface: HubConfig = option(factory=HubConfig)

    @property
    def local(self) -> Path | None:
        """The local source, or None for a hub id."""
        path = Path(self.dataset_name) if "\0" not in self.dataset_name else None
        return path if path and (path.is_absolute() or path.exists()) else None

    @property
    def name(self) -> str:
        """What the outputs are called: the hub id with `_` for `/`, or the base name of a local source."""
        return safe_name(self.local.resolve().stem if self.local and self.local.is_file() else self.local.resolve().name if self.local else self.dataset_name)


def _target(config: Config) -> Target:
    folder = config.output_dir / safe_relative(config.data_subdir, "data_subdir") if config.data_subdir else config.output_dir
    return Target(inside(config.output_dir, folder), config.name)


def _preflight(config: Config) -> Iterator[tuple[str, str, str]]:
    if config.sample_limit is not None and config.sample_limit < 1:
        yield "sample_limit", f"must be at least 1, got {config.sample_limit}", "leave it out to fetch everything"
    if config.data_subdir is not None:
        try:
            safe_relative(config.data_subdir, "data_subdir")
        except Exception as error:
            yield "data_subdir", str(getattr(error, "what", error)), "use a plain relative folder, for example pretrain"
    if config.local is None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.dataset_name, re.ASCII):
        yield "dataset_name", f"{config.dataset_name!r} is neither a hub id nor an existing path", "use owner/name, or a local file or folder"
    source, out = config.local, config.output_dir.resolve()
    if source and (out == source.resolve() or out.is_relative_to(source.resolve())):
        yield "output_dir", "lies inside the dataset that is read", "choose another output folder"


# --- the stage ----------------------------------------------------------------------------------------------------------------------------------


def _build(run: Run[Config]) -> dict[str, Any]:
    stats = _from_local(run) if run.config.local else _from_hub(run)
    total = stats["kept"] + stats["quarantined"]
    return {"source": run.config.dataset_name, "total": total, **stats, "dropped": {}, "sample_limit": run.config.sample_limit}


def _from_hub(run: Run[Config]) -> dict[str, Any]:
    config, target = run.config, _target(run.config)
    found = repository.listing("dataset", config.dataset_name, config.huggingface, config.data_subdir)
    moved = _moved(read_manifest(target.manifest), found.commit)
    by_path = {f.path: f for f in found.files}
    chosen = choose(list(by_path), config.dataset_name, subdir=config.data_subdir, card=_card(found, config), config_name=config.config_name, split=config.split)
    kept = quarantined = 0
    notes: list[str] = []
    for split, paths in chosen.items():
        with Writer(run.work, f"{config.name}__{split}", config.sample_limit) as out:
            for path in takewhile(lambda _: not out.full, paths):
                out.add(_bring(found, by_path[path], run, out.left), notes)
            kept, quarantined = kept + out.kept, quarantined + out.quarantined
    size = sum(by_path[p].size for paths in chosen.values() for p in paths)
    return {
        "commit": found.commit, "upstream_moved": moved, "splits": chosen, "source_bytes": size, "verified": config.sample_limit is None,
        "kept": kept, "quarantined": quarantined, "notes": notes,
    }  # fmt: skip


def _card(found: Repository, config: Config) -> dict[str, Any]:
    readme = next((f for f in found.files if f.path == "README.md"), None)
    if readme is None or (config.data_subdir and not config.config_name):
        return {}
    with repository.open_remote(found, readme, config.huggingface) as f:
        return read_card((f.read(1 << 18) or b"").decode("utf-8", "replace"))


def _bring(found: Repository, file: RemoteFile, run: Run[Config], rows: int | None) -> Path:
    """The file, or (with a limit) its first rows, on this disk."""
    config = run.config
    if rows is None:
        console.note(f"fetching {file.path} ({file.size / 2**20:.1f} MiB)")
        return repository.download(found, file, config.huggingface, force=config.force_download)
    with repository.open_remote(found, file, config.huggingface) as stream:
        return head(stream, file.path, rows, run.work / ".head" / safe_name(file.path))


def _moved(old: dict[str, Any] | None, commit: str | None) -> str | None:
    before = (old or {}).get("stats", {}).get("commit")
    if before and commit and before != commit:
        text = f"upstream moved {before[:12]} -> {commit[:12]}"
        console.note(text)
        return text
    return None


def _from_local(run: Run[Config]) -> dict[str, Any]:
    config, source = run.config, run.config.local
    assert source is not None
    root = source / config.data_subdir if config.data_subdir and source.is_dir() else source
    found = [p for p in ([root] if root.is_file() else sorted(root.rglob("*"))) if p.is_file() and not _is_hidden(p, root)]
    chosen = [p for p in found if p == root or (is_rows(p.name) and not any(p.match(glob) for glob in config.exclude))]
    if not chosen or not any(map(records.kind_of, chosen)):
        raise SopError("no data files here", where=str(root), fix="known: " + " ".join(records.SUFFIXES) + ", also with .gz or .zst", code=DATA)
    taken: set[str] = set()
    kept = quarantined = 0
    for path in sorted(chosen, key=lambda p: (not _keeps_name(p), p)):  # files that keep their names choose first
        relative = Path(path.name) if root.is_file() else path.relative_to(root)
        folder = run.work.joinpath(*map(safe_name, relative.parent.parts))
        folder.mkdir(parents=True, exist_ok=True)
        good, bad = _port(path, _free_name(path, folder, taken), run)
        kept, quarantined = kept + good, quarantined + bad
    skipped = sorted(str(p.relative_to(root)) for p in set(found) - set(chosen) if p != root)
    return {"files": len(chosen), "skipped": skipped, "kept": kept, "quarantined": quarantined}


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts) or path.name.endswith("manifest.json")


def _keeps_name(path: Path) -> bool:
    return records.kind_of(path) in ("jsonl", "txt")


def _free_name(path: Path, folder: Path, taken: set[str]) -> Path:
    """The output of a local file: its own name for lines, `.jsonl` for what is converted; two names never fall together, whatever their case."""
    plain = plain_name(safe_name(path.name))
    name = plain if _keeps_name(path) else f"{Path(plain).stem}.jsonl"
    if str(folder / name).casefold() in taken:
        name = f"{plain}.jsonl"
    while str(folder / name).casefold() in taken:
        name = f"{Path(name).stem}_{Path(name).suffix}"
    taken.add(str(folder / name).casefold())
    return folder / name


def _port(path: Path, out: Path, run: Run[Config]) -> tuple[int, int]:
    """Copy lines byte for byte, convert the rest; returns rows kept and set aside."""
    if run.config.sample_limit is not None:
        with path.open("rb") as stream:
            path = head(stream, path.name, run.config.sample_limit, run.work / ".head" / safe_name(str(path)))
    if records.kind_of(path) == "txt" or records.source(path).kind == "jsonl":
        with open_bytes(path) as source, out.open("wb") as f:
            shutil.copyfileobj(source, f, _CHUNK)
        return _count_rows(out), 0
    with Writer(out.parent, out.stem, None) as writer:
        writer.add(path, [])
    return writer.kept, writer.quarantined


def _count_rows(path: Path) -> int:
    with path.open("rb") as f:
        return sum(1 for line in f if line.strip())


# --- what a person sees -----------------------------------------------------------------------------------------------------------------------------


def _summary(artifact: Artifact) -> list[str]:
    outputs = [o for o in artifact.manifest["outputs"] if not o["path"].endswith(".rejected.jsonl")]
    outputs.sort(key=lambda o: (not o["path"].endswith("__train.jsonl"), o["path"]))
    lines = []
    first = next((o for o in outputs if o["path"].endswith(".jsonl")), None)
    if first:
        lines.append(f"first rows of {first['path']}:")
        lines += [f"  {i}: {row}" for i, row in enumerate(_first_rows(artifact.path / first["path"]), 1)]
    stats = artifact.stats
    lines += [f"{o['path']}: {o.get('rows', '')} rows, {o['size'] / 2**20:.2f} MiB".replace(":  rows,", ":") for o in outputs]
    lines.append(f"total {stats['total']} = kept {stats['kept']} + quarantined {stats['quarantined']}" + (f", at commit {stats['commit']}" if stats.get("commit") else ""))
    if artifact.skipped and (note := _upstream(artifact)):
        lines.append(note)
    return lines


def _first_rows(path: Path) -> Iterator[str]:
    with path.open("rb") as f:
        for _ in range(_SHOWN_ROWS):
            line = f.readline(_SHOWN_CHARS * 4)
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip("\n")
            yield text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + " ..."
            while line and not line.endswith(b"\n"):
                line = f.readline(_CHUNK)


def _upstream(artifact: Artifact) -> str:
    """For what is up to date here: has the repository moved on since?"""
    paths, commit = artifact.manifest["paths"], artifact.stats.get("commit")
    if not commit or len(paths["huggingface"]["revision"] or "") == 40:
        return ""
    known = {k: v for k, v in paths["huggingface"].items() if k in ("endpoint", "source", "offline", "revision")}
    now = repository.head_commit(artifact.stats["source"], HubConfig(**known))
    return f"upstream moved {commit[:12]} -> {now[:12]}; --force_download fetches the new one" if now and now != commit else ""


def _next(config: Config) -> str:
    folder = _target(config).folder
    source = folder if config.local else folder / f"{config.name}__{config.split or 'train'}.jsonl"
    return f"sop data process --input {source}" + (f" --subdir {config.data_subdir}" if config.data_subdir else "")


class _Fetch(Stage[Config]):
    def run(self, config: Config, *, overwrite: bool = False, pipeline: str | None = None, again: bool = False) -> Artifact:
        return super().run(config, overwrite=overwrite, pipeline=pipeline, again=again or config.force_download)


STAGE = _Fetch(
    name="data.fetch",
    version=1,
    config=Config,
    output=_target,
    inputs=lambda config: {"dataset": config.local},
    build=_build,
    preflight=lambda config: list(_preflight(config)),
    plan=lambda config: [f"from {'local path' if config.local else 'hub id'}: {config.dataset_name}", f"to: {_target(config)}"],
    summary=_summary,
    next=_next,
)


def run(config: Config) -> Artifact:
    """Fetch the dataset of `config`."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop data fetch`."""
    return stage_main(STAGE, argv)
