"""Multiple choice through EleutherAI's lm-evaluation-harness: our questions as its local tasks, its scores item by item as our records.

A task is one subject of one set: a YAML file and its data as JSONL. The same files, with relative paths, are part of the artifact, so that the harness's own command
gives the same numbers without us. Nothing is fetched: no hub data set, no remote code, no function in YAML.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import option
from ..data.records import write_jsonl
from ..errors import DATA, SopError, missing_extra
from .models import Opened
from .questions import LETTERS, Question, QuestionSet

MOST_SHOTS = 5
# A written answer: the first letters that stand alone, also several ("A、C"). Letters inside a Latin word are none.
_ANSWER = r"(?<![A-Za-z])([A-J](?:[,，、和 ]*[A-J])*)(?![A-Za-z])"
_BETWEEN = r"[,，、和 ]"
_SHOWN = "{{question}}\n{% for letter in letters %}{{letter}}. {{options[loop.index0]}}\n{% endfor %}"
_METRIC_OF = {"none": "acc", "characters": "acc_norm", "bytes": "acc_bytes"}


@dataclass(frozen=True, kw_only=True)
class Exam:
    """How multiple-choice questions are asked."""

    mode: Literal["loglikelihood", "generate"] = option("loglikelihood", "loglikelihood: the most likely choice; generate: the first letter that the model writes")
    score: Literal["letters", "options"] = option("letters", "loglikelihood of the letter with all options shown, or of each option's text after the bare question")
    normalise: Literal["none", "characters", "bytes"] = option("none", "divide the loglikelihood of an option's text by its length")
    shots: int = option(0, "solved examples before each question, the first of the set's dev split (0 to 5)")
    chat: bool = option(False, "through the model's chat template, each example a turn")
    description: str = option("以下是关于{subject}的单项选择题，请直接给出正确答案的选项。", "first line of the prompt; {subject} is filled in; empty: none")
    ask: str = option("答案：", "last line of the prompt")
    max_new_tokens: int = option(16, "longest written answer, tokens (mode generate)")
    max_questions: int | None = option(None, "ask at most so many questions of a set, spread evenly over it")

    def __post_init__(self) -> None:
        if not 0 <= self.shots <= MOST_SHOTS or self.max_new_tokens < 1 or (self.max_questions is not None and self.max_questions < 1):
            raise ValueError(f"needs 0 <= shots <= {MOST_SHOTS}, max_new_tokens >= 1, max_questions >= 1")
        if self.score == "options" and self.mode == "generate":
            raise ValueError("score: options compares the texts of options, which needs mode: loglikelihood")
        if self.normalise != "none" and self.score != "options":
            raise ValueError("normalise divides by the length of an option's text: it needs score: options")

    @property
    def several(self) -> bool:
        """Questions with several right letters can be asked: the answer is written out."""
        return self.mode == "generate"


@dataclass(frozen=True)
class Outcome:
    """One answered question. `said` is the chosen letter, or what was written; `scores` are log-likelihoods of the choices in order (empty for written answers)."""

    id: str
    subject: str
    category: str
    answer: str
    said: str
    correct: bool
    scores: tuple[float, ...] = ()


def available() -> bool:
    """Whether the harness is installed; looks, imports nothing."""
    import importlib.util

    return importlib.util.find_spec("lm_eval") is not None


def ask(opened: Opened, questions: QuestionSet, exam: Exam, *, name: str, batch_size: int) -> list[Outcome]:
    """The answers of a model to a set, in the set's order.

    Args:
        name: of the set; part of the tasks' names.
        batch_size: requests in one forward pass. The harness holds `batch x tokens x vocabulary` log-probabilities in fp32.

    Raises:
        SopError: where the harness is not installed, or a subject has fewer examples than shots.
    """
    if not available():
        raise missing_extra("lm_eval", "eval")
    check_shots(questions, exam, name)
    with tempfile.TemporaryDirectory(prefix="sop-exam-") as folder, _quiet():
        tasks = write_tasks(Path(folder), questions, exam, name, absolute=True)
        samples = _evaluate(opened, Path(folder), tasks, exam, batch_size)
    found = {outcome.id: outcome for task, subject in tasks.items() for outcome in _outcomes(samples[task], questions, subject, exam)}
    return [found[q.id] for q in questions.items]


def check_shots(questions: QuestionSet, exam: Exam, name: str) -> None:
    """Every subject has the examples that are to be shown.

    Raises:
        SopError: naming the first that has not.
    """
    for subject in questions.subjects if exam.shots else ():
        if (number := len(questions.examples_of(subject))) < exam.shots:
            fix = "lower exam.shots, or give solved questions in a dev split (dev/<subject>.csv) or with examples.<set>=FILE"
            raise SopError(f"{name}: {subject} has {number} solved examples, {exam.shots} are to be shown", fix=fix, code=DATA)


# --- tasks --------------------------------------------------------------------------------------------------------------------------------


def write_tasks(folder: Path, questions: QuestionSet, exam: Exam, name: str, *, absolute: bool = False) -> dict[str, str]:
    """Write one YAML task and its data for each subject; returns task -> subject. Paths in the YAML are relative to `folder`, or absolute."""
    import yaml

    (folder / "data").mkdir(parents=True, exist_ok=True)
    tasks: dict[str, str] = {}
    for number, subject in enumerate(questions.subjects):
        task = f"sop_{_plain(name)}_{number:03d}"
        tasks[task] = subject
        splits = {"test": [q for q in questions.items if q.subject == subject]}
        if exam.shots:
            splits["dev"] = questions.examples_of(subject)[: exam.shots]
        for split, rows in splits.items():
            write_jsonl(folder / "data" / f"{task}_{split}.jsonl", (_doc(q, exam) for q in rows))
        base = folder.absolute() if absolute else Path()
        files = {split: str(base / "data" / f"{task}_{split}.jsonl") for split in splits}
        body = _task(task, subject, exam, files)
        if absolute:
            body["dataset_kwargs"]["cache_dir"] = str(folder / "cache")
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(body, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return tasks


def _plain(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name.lower())


def _doc(q: Question, exam: Exam) -> dict[str, Any]:
    letters = list(LETTERS[: len(q.options)])
    gold: Any = q.answer if exam.mode == "generate" else letters.index(q.answer)
    return {"id": q.id, "question": q.question, "options": list(q.options), "letters": letters, "gold": gold}


def _task(task: str, subject: str, exam: Exam, files: Mapping[str, str]) -> dict[str, Any]:
    """The harness's task: prompt, choices, metrics."""
    description = exam.description.replace("{subject}", subject.replace("_", " ")) + "\n\n" if exam.description else ""
    body: dict[str, Any] = {
        "task": task, "dataset_path": "json", "dataset_kwargs": {"data_files": dict(files)}, "test_split": "test",
        "description": "{% raw %}" + description + "{% endraw %}" if description else "",
        "doc_to_text": ("{{question}}\n" if exam.score == "options" else _SHOWN) + "{% raw %}" + exam.ask + "{% endraw %}", "doc_to_target": "gold",
        "num_fewshot": exam.shots, "metadata": {"version": 1.0, "subject": subject},
    }  # fmt: skip
    if exam.shots:
        body |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
    if exam.mode == "generate":
        body |= {
            "output_type": "generate_until", "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": exam.max_new_tokens},
            "filter_list": [{"name": "letters", "filter": [{"function": "regex", "regex_pattern": _ANSWER}, {"function": "take_first"}]}],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": [_BETWEEN]}],
        }  # fmt: skip
    else:
        names = ["acc"] if exam.score == "letters" else list(_METRIC_OF.values())
        body |= {
            "output_type": "multiple_choice", "doc_to_choice": "letters" if exam.score == "letters" else "options",
            "metric_list": [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names],
        }  # fmt: skip
    return body


# --- running ------------------------------------------------------------------------------------------------------------------------------


def _evaluate(opened: Opened, folder: Path, tasks: Mapping[str, str], exam: Exam, batch_size: int) -> dict[str, list[dict[str, Any]]]:
    """The harness's samples of each task."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, backend="causal", batch_size=batch_size)
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(list(tasks))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(0)
    results = evaluate(model, loaded, bootstrap_iters=0, log_samples=True, apply_chat_template=exam.chat, fewshot_as_multiturn=exam.chat)
    assert results is not None
    return dict(results["samples"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness's progress bars for people only, its remarks not at all."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _outcomes(samples: Sequence[Mapping[str, Any]], questions: QuestionSet, subject: str, exam: Exam) -> Iterator[Outcome]:
    """The harness's samples of one task as outcomes; which choice counts as chosen follows the metric that is asked for."""
    asked = [q for q in questions.items if q.subject == subject]
    for sample in samples:
        q = asked[sample["doc_id"]]
        assert sample["doc"]["id"] == q.id
        if exam.mode == "generate":
            yield Outcome(q.id, q.subject, q.category, q.answer, str(sample["filtered_resps"][0]), bool(sample["exact_match"] == 1.0))
            continue
        scores = tuple(float(pair[0]) for pair in sample["filtered_resps"])
        sizes = {"none": 1, "characters": len, "bytes": lambda text: len(text.encode())}[exam.normalise]
        weighed = [s / (sizes(o) if callable(sizes) else 1) for s, o in zip(scores, q.options, strict=True)]
        best = max(range(len(weighed)), key=weighed.__getitem__)
        yield Outcome(q.id, q.subject, q.category, q.answer, LETTERS[best], bool(sample[_METRIC_OF[exam.normalise]] == 1.0), scores)
