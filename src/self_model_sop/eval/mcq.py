"""`sop eval mcq`: multiple-choice questions to several models, with intervals, through lm-evaluation-harness."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..artifact import Target
from ..config import option
from ..data.records import write_jsonl
from ..errors import missing_extra
from ..hub import HubConfig
from ..stage import Artifact, Run, Stage, stage_main
from .accuracy import difference, letters, table
from .harness import Exam, Outcome, ask, available, check_shots, write_tasks
from .measured import Task, describe_model, measure_models, outcomes_of
from .models import Device, Opened, inputs_of
from .questions import QuestionSet, read_set
from .table import in_order, interval, markdown_table, points, text_table

_SHOWN_SUBJECTS = 12  # of a set, on the terminal


@dataclass(frozen=True, kw_only=True)
class Config:
    """`config/eval_config/mcq.yaml`."""

    models: dict[str, str] = option(help="name -> model folder, adapter folder or hub id; the first is what the others are compared with", path="model", factory=dict)
    questions: dict[str, Path] = option(help="name -> questions: a file, or a folder in the layout of CMMLU, C-Eval, AGIEval or GAOKAO-Bench", path="input", factory=dict)
    examples: dict[str, Path] = option(help="name of a set -> solved questions for its few-shot prompts, where the set has no dev split", path="input", factory=dict)
    exam: Exam = option(factory=Exam)
    batch_size: int = option(8, "requests per forward pass", cosmetic=True)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("float32", "dtype of the weights")
    device: Device = option("auto", "auto: a GPU where there is one")
    seed: int = option(0, "seed of the bootstrap")
    output_dir: Path = option(Path("runs/mcq"), "the artifact", path="output", flag="--output_dir")
    huggingface: HubConfig = option(factory=HubConfig)


# --- measuring (also for eval.compare) ----------------------------------------------------------------------------------------------------


def exam_tasks(config: Any, inputs: Mapping[str, Mapping[str, Any]]) -> Iterator[Task]:
    """One measurement per set of a config with `questions`, `examples`, `exam` and `batch_size`; a set is read once for all models."""
    read = functools.cache(lambda name: read_for(config, name))
    for name in config.questions:
        data = [inputs[label]["sha256"] for label in (f"questions {name}", f"examples {name}") if label in inputs]

        def work(opened: Opened, name: str = name) -> list[dict[str, Any]]:
            return [asdict(o) for o in ask(opened, read(name), config.exam, name=name, batch_size=config.batch_size)]

        yield Task("exam", name, data, ("dtype", "device", "exam"), work)


def read_for(config: Any, name: str) -> QuestionSet:
    """A set of the config, as it is asked."""
    return read_set(config.questions[name], several=config.exam.several, limit=config.exam.max_questions, examples=config.examples.get(name))


def exam_results(found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """model -> set -> its table, letters said, and the difference to the first model; from model -> set -> outcomes."""
    answered = {model: {name: [Outcome(**{**o, "scores": tuple(o["scores"])}) for o in items] for name, items in sets.items()} for model, sets in found.items()}
    first = next(iter(answered), "")
    out: dict[str, dict[str, Any]] = {}
    for model, sets in answered.items():
        out[model] = {name: {**table(items), "letters": letters(items)} for name, items in sets.items()}
        for name, items in sets.items() if model != first else ():
            out[model][name]["against_first"] = difference(answered[first][name], items, seed=seed)
    return out


def exam_inputs(config: Any) -> dict[str, Path]:
    """The question files, named as `exam_tasks` looks them up."""
    return {f"questions {name}": path for name, path in config.questions.items()} | {f"examples {name}": path for name, path in config.examples.items()}


def exam_problems(config: Any) -> Iterator[tuple[str, str, str]]:
    """What can be seen before a model is loaded."""
    if config.questions and not available():
        error = missing_extra("lm_eval", "eval")
        yield "questions", error.what, error.fix or ""
    for name in config.examples:
        if name not in config.questions:
            yield f"examples.{name}", f"there is no question set {name!r}", "known: " + ", ".join(config.questions)


# --- tables -------------------------------------------------------------------------------------------------------------------------------


def overview(exams: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per model, one column per set."""
    names = list(next(iter(exams.values()), {}))
    header = ["model", *(part for name in names for part in (name, "change"))]
    return header, [[model, *(cell for name in names for cell in (interval(sets[name]), points(sets[name].get("against_first"))))] for model, sets in exams.items()]


def breakdown(exams: Mapping[str, Mapping[str, Any]], name: str, key: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per subject or category of a set, one column per model."""
    first = next(iter(exams.values()))[name]
    rows = [[part, f"{first[key][part]['total']:,}", *(interval(sets[name][key][part]) for sets in exams.values())] for part in first[key]]
    return [{"subjects": "subject", "categories": "category"}[key], "questions", *exams], rows


def _markdown(exams: Mapping[str, Mapping[str, Any]], sets: Mapping[str, Any], exam: Exam) -> str:
    how = f"{exam.shots} shots, {exam.mode}" + (f", {exam.score}" if exam.mode == "loglikelihood" else "") + (", chat template" if exam.chat else "")
    lines = ["# Multiple choice", "", *markdown_table(*overview(exams)), "", f"Asked with {how}.", ""]
    lines += ["In brackets 95 % intervals: Wilson for shares, paired bootstrap over questions for changes.", ""]
    for name, facts in sets.items():
        left = ", ".join(f"{reason} {n}" for reason, n in facts["left_out"].items())
        lines += [f"## {name}", "", f"{facts['questions']:,} questions, {facts['subjects']:,} subjects" + (f"; left out: {left}" if left else ""), ""]
        for key in ("categories", "subjects"):
            header, rows = breakdown(exams, name, key)
            lines += [*markdown_table(header, rows), ""] if rows else []
    return "\n".join(lines)


def _summary(done: Artifact) -> list[str]:
    exams = in_order(done.stats)["exams"]
    lines = text_table(*overview(exams))
    for name, facts in done.stats["sets"].items():
        if facts["left_out"]:
            lines.append(f"{name}: left out " + ", ".join(f"{reason} {n}" for reason, n in facts["left_out"].items()))
        if 1 < facts["subjects"] <= _SHOWN_SUBJECTS:
            lines += ["", *text_table(*breakdown(exams, name, "subjects"))]
    return lines


# --- the stage ----------------------------------------------------------------------------------------------------------------------------


def build(run: Run[Config]) -> dict[str, Any]:
    """Ask model after model; write the tasks, every outcome, results.json and results.md."""
    config = run.config
    sets = {name: read_for(config, name) for name in config.questions}
    for name, questions in sets.items():
        check_shots(questions, config.exam, name)
        write_tasks(run.work / "tasks", questions, config.exam, name)
    tasks = [Task("model", "", None, ("dtype", "device"), describe_model), *exam_tasks(config, run.inputs)]
    outcomes: dict[str, dict[str, Any]] = {}
    models: dict[str, Any] = {}
    known = 0
    for model, found, from_cache in measure_models(run, tasks, config.output_dir / ".cache"):
        models[model], outcomes[model], known = found["model", ""], outcomes_of(found), known + from_cache
    write_outcomes(run.work, outcomes)
    results: dict[str, Any] = {"order": list(models), "models": models, "exams": exam_results(outcomes, config.seed), "sets": {name: facts_of(s) for name, s in sets.items()}}
    (run.work / "results.json").write_text(json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False), encoding="utf-8")
    (run.work / "results.md").write_text(_markdown(results["exams"], results["sets"], config.exam), encoding="utf-8")
    return {**results, "measured": len(tasks) * len(config.models) - known, "from_cache": known}


def facts_of(questions: QuestionSet) -> dict[str, Any]:
    """How much is asked, and what was left out and why."""
    return {"questions": len(questions.items), "subjects": len(questions.subjects), "examples": len(questions.examples), "left_out": questions.left_out}


def write_outcomes(work: Path, outcomes: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    """`outcomes.jsonl`: one line per model and question."""
    rows = ({"model": model, "set": name, **item} for model, sets in outcomes.items() for name, items in sets.items() for item in items)
    write_jsonl(work / "outcomes.jsonl", rows)


def _inputs(config: Config) -> dict[str, Path | None]:
    found: dict[str, Path | None] = {label: path for name, source in config.models.items() for label, path in inputs_of(name, source)}
    return found | exam_inputs(config)


def _preflight(config: Config) -> Iterator[tuple[str, str, str]]:
    if not config.models:
        yield "models", "no model to ask", "models: {base: models/base, tuned: self_model/checkpoints/merged}"
    if not config.questions:
        yield "questions", "nothing to ask", "questions: {cmmlu: data/cmmlu}"
    if config.batch_size < 1:
        yield "batch_size", "needs to be at least 1", ""
    yield from exam_problems(config)


STAGE = Stage(
    name="eval.mcq", version=1, config=Config, output=lambda config: Target(config.output_dir), inputs=_inputs, build=build, apart=True,
    preflight=lambda config: list(_preflight(config)), summary=_summary,
    plan=lambda config: [f"{name}: {source}" for name, source in config.models.items()],
)  # fmt: skip


def run(config: Config) -> Artifact:
    """Ask, or find it done."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sop eval mcq`."""
    return stage_main(STAGE, argv)
