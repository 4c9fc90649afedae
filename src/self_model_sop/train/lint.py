"""`sop train lint`: what a training would learn, shown before it costs anything.

Fine-tuning: which tokens of each conversation. Preference pairs (`rlhf.yaml` with algorithm reward, dpo, kto, orpo, simpo): both answers of each pair.
Rollouts (grpo, rloo, ppo): the prompts, and what the rewards give right, wrong and empty answers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifact, console, errors
from ..config import Setting, option
from ..hub import configure
from ..stage import Verb, guarded, load_for, parse_arguments
from ..yaml_source import read
from . import lint_view
from .proof import LintReport, check, rows_of
from .rlhf import RlhfConfig
from .settings import TrainConfig, paths
from .sft import SftConfig

if TYPE_CHECKING:
    from .template import TrainOn


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is shown of the data."""

    samples: int = option(3, "conversations, pairs or prompts to show, chosen evenly; 0 shows none", flag="--samples")
    html: Path | None = option(None, "where the page goes; none: <training_args.output_dir>.lint.html", path="output", flag="--html")
    max_rows: int | None = option(None, "check so many rows only", flag="--max_rows")


@dataclass(frozen=True, kw_only=True)
class Config(Shown, SftConfig):
    """`finetune.yaml`, and what is shown of it."""


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig(Shown, RlhfConfig):
    """`rlhf.yaml`, and what is shown of it."""


VERB = Verb(name="train.lint", config=Config)
_ROLLOUTS = ("grpo", "rloo", "ppo")
_SHOWN = ("samples", "html", "max_rows")


def lint(config: Config) -> LintReport:
    """Check the training data of a fine-tuning configuration."""
    renderer = _renderer(config, config.train_on)
    files = paths(config.data.train_file)
    count = sum(1 for _ in islice(rows_of(files), config.max_rows))
    rows = islice(rows_of(files), config.max_rows)
    limits: dict[str, Any] = {"max_length": config.data.max_length, "overlong": config.data.overlong}
    return check(renderer, console.track(rows, "lint", count, "rows"), samples=config.samples, expected_rows=count, **limits)


def lint_pairs(config: AlignmentConfig) -> LintReport:
    """Check the preference pairs of an alignment configuration: both answers of each are proven as conversations, and the pairs counted as the training counts them."""
    from . import pairs

    renderer, files = _renderer(config, "last"), paths(config.data.train_file)
    limits = pairs.Limits(config.data.max_length, config.data.overlong, whole=config.method == "reward")
    meta = pairs.count(files, renderer, limits, config.max_rows)
    report = check(renderer, pairs.conversations(files, config.max_rows), samples=config.samples, expected_rows=2 * meta["total"], group=2)
    report.notes += pairs.told(meta)
    return report


def _renderer(config: Any, train_on: TrainOn) -> Any:
    from .model import load_tokenizer
    from .template import ensure_pad, renderer_for

    tokenizer = load_tokenizer(config.tokenizer_source, config.huggingface)
    ensure_pad(tokenizer)
    return renderer_for(tokenizer, config.template_path, override=config.template_override, train_on=train_on)


def page_of(config: Shown) -> Path:
    """Where the page goes."""
    if config.html is not None:
        return config.html
    folder = config.training_args.get("output_dir") if isinstance(config, TrainConfig) else None
    return Path(f"{folder}.lint.html") if folder else Path("lint.html")


def _algorithm(path: Path | None, settings: Sequence[Setting]) -> str | None:
    """The algorithm that a configuration of alignment names; None for one of fine-tuning."""
    said = [str(s.value) for s in settings if s.key == "algorithm"]
    found = said[-1] if said else read(path, []).data.get("algorithm") if path is not None else None
    return None if found is None else str(found)


def _verb(algorithm: str) -> Verb[AlignmentConfig]:
    """The command for an algorithm of alignment: keys that it does not read are not looked at."""
    from . import alignment, grpo

    return Verb(name="train.lint", config=AlignmentConfig, uses=(*(grpo.USES if algorithm in _ROLLOUTS else alignment.USES), *_SHOWN))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sop train lint`."""

    def work() -> int:
        args, settings = parse_arguments(VERB, list(sys.argv[1:] if argv is None else argv))
        algorithm = _algorithm(args.config, settings)
        if algorithm is None:
            config = load_for(VERB, args.config, settings).config
            configure(config)
            return _show(config, lint(config))
        chosen = load_for(_verb(algorithm), args.config, settings).config
        configure(chosen)
        return _show_prompts(chosen) if algorithm in _ROLLOUTS else _show(chosen, lint_pairs(chosen))

    return guarded(work)


def _show(config: Shown, report: LintReport) -> int:
    lint_view.show(report)
    page = page_of(config)
    page.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_atomic(page, lint_view.html(report))
    console.say(f"page: {page}")
    report.require()
    return errors.OK


def _show_prompts(config: AlignmentConfig) -> int:
    """The prompts as the model will read them, and the rewards on answers to them; exit 3 where the rewards could not teach (`reward_lint: refuse`)."""
    from . import grpo

    prepared = grpo.prepare(config)
    for prompt in prepared.prompts.spread(config.samples):
        console.say(f"-- {prompt.source}\n{prepared.tokenizer.decode(prompt.ids)}\n-- ground truth: {prompt.row['ground_truth']}")
    for name, counted in (("ppo.train_file", prepared.prompts), ("ppo.eval_file", prepared.held_out)):
        if counted is not None:
            told = counted.counts()
            console.say(f"{name}: {told['total']:,} rows, {told['kept']:,} prompts" + "".join(f", {reason} {n:,}" for reason, n in told["dropped"].items()))
    return errors.OK
