"""`sop init DIR`: the configs, chat templates and sample data as files of your own, so that an installed package works without the repository."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import console, errors
from ..errors import SopError
from ..stage import guarded
from ..yaml_source import display

FOLDERS = ("config", "self_model/template", "data_process/sample_data")
_PACKAGE = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def work() -> int:
        parser = argparse.ArgumentParser(prog="sop init", description="write the configs, templates and sample data into a folder", allow_abbrev=False)
        parser.add_argument("folder", type=Path, help="a new or existing folder; it becomes the project's root")
        parser.add_argument("--overwrite", action="store_true", help="replace files that differ from the shipped ones")
        args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
        written, kept = init(args.folder, overwrite=args.overwrite)
        console.say(f"{display(args.folder)}: {len(written)} files written, {len(kept)} were there already")
        console.say(f"next: cd {args.folder} && sop run config/pipeline/quickstart.yaml")
        return errors.OK

    return guarded(work)


def init(folder: Path, *, overwrite: bool = False) -> tuple[list[Path], list[Path]]:
    """Copy the shipped files below `folder`; returns (written, already there), relative to it.

    Raises:
        SopError: where a file of another content stands in the way and `overwrite` is off; nothing is written then.
    """
    source = shipped()
    wanted = list(files(source))
    same = [p for p in wanted if (folder / p).is_file() and (folder / p).read_bytes() == (source / p).read_bytes()]
    other = [p for p in wanted if (folder / p).exists() and p not in same]
    if other and not overwrite:
        what = f"{len(other)} files here differ from the shipped ones: {', '.join(map(str, other[:5]))}"
        raise SopError(what, where=str(folder), fix="choose another folder, or pass --overwrite to replace them")
    written = [p for p in wanted if p not in same]
    for path in written:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, folder / path)
    return written, same


def shipped() -> Path:
    """The folder that holds the shipped files: inside an installed package, or the repository of an editable installation."""
    for place in (_PACKAGE / "_project", _PACKAGE.parents[1]):
        if (place / "config" / "pipeline").is_dir() and (place / "data_process" / "sample_data").is_dir():
            return place
    raise SopError("the shipped configs are not part of this installation", where=str(_PACKAGE), fix="install the wheel, or clone the repository", code=errors.ENVIRONMENT)


def files(source: Path) -> Iterator[Path]:
    """Every shipped file, relative to `source`, sorted."""
    for name in FOLDERS:
        yield from sorted(p.relative_to(source) for p in (source / name).rglob("*") if p.is_file() and not p.name.startswith(".") and p.suffix != ".pyc")
