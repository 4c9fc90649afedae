"""`data.preference`: preference pairs for a reward model or DPO, and prompts for reinforcement learning.

Cleaning, personal data, deduplication, split and accounting are those of `data.process`. Rows with a chosen and a rejected answer become `train.jsonl` and `validation.jsonl`;
they, and rows that hold a question with its answer, also become prompts in verl's contract (rl.py). What a row lacks for that is told row by row in `rl/missing.jsonl`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from ..config import option
from ..stage import Artifact, Run, Stage, stage_main
from . import process
from .filters import PartConfig
from .formats import RowError, detect, to_preference
from .records import dumps, parse_object
from .rl import RLConfig, to_rl, write_rl
from .rows import Rules
from .sets import InputFile


@dataclass(frozen=True, kw_only=True)
class Config(process.Config):
    """config/data_config/preference.yaml: the settings of data.process, and what concerns preferences."""

    subdir: str | None = option("reward", "the set: rows go to <output_dir>/<subdir>/; of an input folder with a subfolder of this name only that is read", flag="--subdir")
    parts: PartConfig = option(factory=PartConfig)
    rl: RLConfig = option(factory=RLConfig)

    def rules(self, name: str, members: Sequence[InputFile]) -> Rules:
        """The rules for the rows; a row without a preference may still be a prompt."""
        return replace(super().rules(name, members), parts=self.parts, rl=self.rl)


def preflight(config: Config) -> list[tuple[str, str, str]]:
    """What cannot work, before anything is read."""
    problems = process.preflight(config)
    if config.subdir is None or config.subdir in ("pretrain", "finetune"):
        problems.append(("subdir", "must name a set of its own", "reward"))
    if config.output is not None:
        problems.append(("output", "preference data is several files", "use output_dir"))
    least, most = config.parts.min_answer_chars, config.parts.max_answer_chars
    if least is not None and most is not None and least > most:
        problems.append(("parts.min_answer_chars", f"is more than parts.max_answer_chars ({most})", ""))
    try:
        re.compile(config.rl.answer_pattern or "")
    except re.error as error:
        problems.append(("rl.answer_pattern", f"no regular expression: {error}", r"for example '####\s*(.+)'"))
    return problems


def build(run: Run[Config]) -> dict[str, Any]:
    """Everything that data.process does, then the two views of the kept rows."""
    stats = process.write_sets(run.config, run.work)
    if run.config.shard is not None:
        return stats
    views = _Views(run.config, run.work)
    for split in ("train", "validation"):
        views.write(split)
    return {**stats, "preferences": views.preferences, "lengths": views.lengths(), "rl": views.rl, "rl_missing": dict(sorted(views.missing.items()))}


class _Views:
    """The kept rows of one folder as preference files and as prompts."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
        self.preferences: dict[str, int] = {}
        self.rl: dict[str, int] = {}
        self.missing: Counter[str] = Counter()

    def write(self, split: str) -> None:
        """Split `<split>.jsonl` into its preference rows, which stay there, and its prompts."""
        path, kept = self._folder / f"{split}.jsonl", self._folder / f".{split}.kept"
        if not path.exists():
            return
        path.rename(kept)
        self.preferences[split] = 0
        with ExitStack() as files:
            lines = files.enter_context(kept.open(encoding="utf-8", newline="\n"))
            out = files.enter_context(path.open("w", encoding="utf-8", newline="\n"))
            rows = self._rows(split, lines, out)
            if self._config.rl.enabled:
                (self._folder / "rl").mkdir(exist_ok=True)
                self.rl[split] = write_rl(self._folder / "rl" / f"{split}.parquet", self._prompts(split, rows))
            else:
                for _ in rows:
                    pass
        kept.unlink()
        if self._config.process.to_parquet:
            from .tables import jsonl_to_parquet

            jsonl_to_parquet(path, path.with_suffix(".parquet"))

    def _rows(self, split: str, lines: Iterator[str], out: Any) -> Iterator[dict[str, Any]]:
        for line in lines:
            row, _ = parse_object(line)
            assert row is not None  # written by data.process a moment ago
            if detect(row) == "preference":
                for part, messages in zip(self._lengths, to_preference(row), strict=True):
                    self._lengths[part].append(sum(len(m["content"]) for m in messages))
                out.write(line)
                self.preferences[split] += 1
            yield row

    def _prompts(self, split: str, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        index = 0
        for row in rows:
            source = str(row["_source"])
            try:
                prompt = to_rl(row, self._config.rl)
            except RowError as wrong:
                self.missing[wrong.reason] += 1
                with (self._folder / "rl" / "missing.jsonl").open("a", encoding="utf-8", newline="\n") as f:
                    f.write(dumps({"_source": source, "reason": wrong.reason}) + "\n")
                continue
            prompt["data_source"] = prompt["data_source"] or PurePath(source.rpartition(":")[0]).name.split(".")[0]
            yield {**prompt, "extra_info": {"split": split, "index": index, "source": source}}
            index += 1

    def lengths(self) -> dict[str, dict[str, int]]:
        """Characters of each part: least, median, 95th percentile, most."""
        import numpy as np

        return {
            part: dict(zip(("least", "median", "p95", "most"), np.percentile(found, (0, 50, 95, 100), method="higher").astype(int).tolist(), strict=True))
            for part, found in self._lengths.items()
            if found
        }


def summary(done: Artifact) -> list[str]:
    """The funnel, the lengths of the parts, and the prompts with what was missing."""
    stats = done.stats
    lines = process.summary(done)
    if "part" in stats:
        return lines
    lines += [f"  {part}: " + ", ".join(f"{k} {v:,}" for k, v in found.items()) + " characters" for part, found in stats["lengths"].items()]
    lines.append("  preference rows: " + ", ".join(f"{split} {n:,}" for split, n in stats["preferences"].items()))
    if stats["rl"]:
        lines.append("  prompts for RL: " + ", ".join(f"{split} {n:,}" for split, n in stats["rl"].items()))
    if stats["rl_missing"]:
        lines.append("  no prompt (rl/missing.jsonl): " + ", ".join(f"{reason} {n:,}" for reason, n in stats["rl_missing"].items()))
    return lines


STAGE = Stage(
    name="data.preference", version=3, config=Config, output=process.output, build=build, inputs=process.inputs, preflight=preflight, plan=process.plan, summary=summary,
    next=lambda config: process.following(config) if config.shard else "",
)  # fmt: skip


def run(config: Config) -> Artifact:
    """Process preference data; the artifact's folder is the set."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return stage_main(STAGE, argv)
