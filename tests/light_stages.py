"""Stages that take milliseconds, for tests of the protocol and of pipelines: `write` makes numbered lines, `join` adds up what it reads.

They are added to the table (not put in place of anything) by the fixture `light` of the tests that need them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from self_model_sop import stages
from self_model_sop.artifact import Target
from self_model_sop.config import option
from self_model_sop.errors import DATA, SopError
from self_model_sop.hub import HubConfig
from self_model_sop.stage import Artifact, Run, Stage, stage_main


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """Writes `files` files of `lines` lines."""

    output_dir: Path = option(Path("out"), "where the lines go", path="output", flag="--output_dir")
    source: Path | None = option(None, "a file whose text heads every line", path="input", flag="--source")
    lines: int = option(3, "lines per file", flag="--lines")
    files: int = option(1, "number of files")
    word: str = option("line", "text of a line")
    pause: float = option(0.0, "seconds between files", cosmetic=True)
    note: str | None = option(None, "ignored by the result", cosmetic=True)
    huggingface: HubConfig = option(factory=HubConfig)
    seed: int = option(0, "random seed")


def write(run: Run[WriteConfig]) -> dict[str, Any]:
    c = run.config
    head = c.source.read_text(encoding="utf-8").strip() if c.source else ""
    if c.word == "fail":
        raise SopError("asked to fail", code=DATA)
    for number in range(c.files):
        path = run.work / ("data.jsonl" if c.files == 1 else f"part/{number:03d}.jsonl")
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as f:
            for i in range(c.lines):
                f.write(f'{{"text": "{head}{c.word} {number}.{i}"}}\n')
        time.sleep(c.pause)
    return {"rows": c.lines * c.files, "total": c.lines * c.files, "kept": c.lines * c.files}


WRITE = Stage(
    name="data.write", version=1, config=WriteConfig, output=lambda c: Target(c.output_dir), inputs=lambda c: {"source": c.source}, build=write,
    plan=lambda c: [f"writes {c.lines} lines"], summary=lambda a: [f"{a.stats['rows']} rows"], next=lambda c: "sop data join",
    preflight=lambda c: [("lines", "must not be negative", "write 0 or more")] if c.lines < 0 else [],
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Counts the lines of its inputs."""

    input: tuple[Path, ...] = option(help="files or folders", path="input", flag="--input")
    output_dir: Path = option(Path("joined"), "where the count goes", path="output")
    base: str | None = option(None, "a model", path="model")
    factor: float = option(1.0, "the count is multiplied by it")
    table: dict[str, Any] = option(help="a free map", factory=dict)
    seed: int = option(0, "random seed")


def join(run: Run[JoinConfig]) -> dict[str, Any]:
    files = [f for p in run.config.input for f in (sorted(p.rglob("*.jsonl")) if p.is_dir() else [p])]
    count = sum(len(f.read_text(encoding="utf-8").splitlines()) for f in files if ".manifest" not in f.name)
    (run.work / "count.txt").write_text(f"{count * run.config.factor:g}\n", encoding="utf-8")
    return {"count": count}


JOIN = Stage(
    name="data.join", version=1, config=JoinConfig, output=lambda c: Target(c.output_dir),
    inputs=lambda c: {f"input.{i}": p for i, p in enumerate(c.input)}, build=join, summary=lambda a: [f"count {a.stats['count']}"],
)  # fmt: skip


class LightEntry(stages.Entry):
    """A table entry whose module is one of tests'."""

    @property
    def module(self) -> str:
        return f"light_{self.name.partition('.')[2]}"


ENTRIES = (LightEntry("data.write", "write lines"), LightEntry("data.join", "count lines"))


class _Module:
    def __init__(self, stage: Stage[Any]) -> None:
        self.STAGE = stage

    def run(self, config: Any) -> Artifact:
        return self.STAGE.run(config)

    def main(self, argv: Sequence[str] | None = None) -> int:
        return stage_main(self.STAGE, argv)


def add_to_table() -> None:
    """Make the two stages known to the table, as `light_write` and `light_join`."""
    sys.modules["light_write"] = _Module(WRITE)  # type: ignore[assignment]
    sys.modules["light_join"] = _Module(JOIN)  # type: ignore[assignment]
    if ENTRIES[0] not in stages.STAGES:
        stages.STAGES = (*stages.STAGES, *ENTRIES)


def main() -> int:
    """`python light_stages.py ARGS`: the command `sop` with the light stages in its table; used by tests in processes of their own."""
    from self_model_sop import cli

    add_to_table()
    cli.STAGES = stages.STAGES
    return cli.main()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    raise SystemExit(main())
