"""Multiple-choice sets out of local files: the layouts of CMMLU, C-Eval, AGIEval and GAOKAO-Bench, and any CSV, JSON, JSONL or Parquet with a question, options and an answer.

| layout | files | subject | what is asked | examples |
|---|---|---|---|---|
| CMMLU | `test/<subject>.csv`, `dev/<subject>.csv` | file name | test | dev |
| C-Eval | `test|val|dev/<subject>_<split>.csv`, `subject_mapping.json` | file name, or the mapping's name | val (test has no answers) | dev |
| AGIEval | `<task>.jsonl` with passage, question, options, label | file name | all | none |
| GAOKAO-Bench | `<year>_<subject>_MCQs.json`: {example: [{question with its options inside, answer: [A]}]} | file name | rows with one question | none |
| any | a file, or a folder of them | the row's `subject`, else the file name | the split test, else val, else what is not dev or train | the split dev, else train |

A split is a folder's name or the end of a file's (`_dev`). What cannot be asked is counted by reason, never dropped in silence.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DATA, SopError

LETTERS = "ABCDEFGHIJ"
_SPLITS = {"test": "test", "val": "val", "valid": "val", "validation": "val", "dev": "dev", "train": "train"}
_MAPPING = "subject_mapping.json"
_INSIDE = re.compile(r"(?:^|(?<=[\s　）)。；;]))[（(]?([A-J])\s*[．.、:：）)]\s*")


@dataclass(frozen=True)
class Question:
    """One item. `options` carry no letters; `answer` is one or more letters, sorted."""

    id: str
    subject: str
    category: str
    question: str
    options: tuple[str, ...]
    answer: str


@dataclass
class QuestionSet:
    """What is asked, the solved examples for few-shot prompts, and why other rows are left out (reason -> rows)."""

    items: list[Question]
    examples: list[Question]
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(q.subject for q in self.items))

    def examples_of(self, subject: str) -> list[Question]:
        """The solved examples of a subject; of all subjects where it has none of its own."""
        return [q for q in self.examples if q.subject == subject] or self.examples


def read_set(path: Path, *, several: bool = False, limit: int | None = None, examples: Path | None = None) -> QuestionSet:
    """Read a set.

    Args:
        path: a file or a folder.
        several: keep questions with more than one right letter (only answers that are written out can be compared with them).
        limit: at most so many questions, spread evenly over the set in its order.
        examples: solved examples from another file or folder.

    Raises:
        SopError: where nothing can be asked.
    """
    left_out: Counter[str] = Counter()
    splits: dict[str, list[Question]] = {}
    for split, question in _questions(path, left_out):
        if len(question.answer) > 1 and not several:
            left_out["several_answers"] += 1
        else:
            splits.setdefault(split, []).append(question)
    asked = next((splits[name] for name in ("test", "val", "", "dev", "train") if splits.get(name)), [])
    if not asked:
        raise SopError("no question that can be asked", where=str(path), fix=f"rows left out: {dict(left_out)}" if left_out else "the file is empty", code=DATA)
    if examples is not None:
        shown = read_set(examples, several=several)
        solved = [*shown.examples, *shown.items]
    else:
        solved = next((splits[name] for name in ("dev", "train") if splits.get(name) and splits[name] is not asked), [])
    return QuestionSet(_spread(asked, limit), solved, dict(left_out))


def _spread(items: Sequence[Question], limit: int | None) -> list[Question]:
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def _questions(path: Path, left_out: Counter[str]) -> Iterator[tuple[str, Question]]:
    """(split, question) of every row that can be asked; the others are counted."""
    from ..data.records import files_of, read

    files = [f for f in files_of(path) if f.name != _MAPPING]
    names = _mapping(path)
    for file in files:
        split, subject = _place(file, path)
        for record in read(file):
            if record.row is None:
                left_out[record.error or "unreadable"] += 1
                continue
            for number, row in enumerate(_rows(record.row)):
                found = _question(row, left_out)
                if found is None:
                    continue
                own = row.get("subject") or row.get("Subject")
                name = own if isinstance(own, str) and own else subject
                shown, category = names.get(name, (name, ""))
                given = row.get("category")
                identity = f"{file.relative_to(path) if path.is_dir() else file.name}:{record.line}" + (f".{number}" if number else "")
                yield split, replace(found, id=identity, subject=shown, category=category or (given if isinstance(given, str) else ""))


def _rows(row: dict[str, Any]) -> list[dict[str, Any]]:
    """GAOKAO-Bench keeps all questions of a file in one object."""
    held = row.get("example")
    return [r for r in held if isinstance(r, dict)] if isinstance(held, list) else [row]


def _place(file: Path, root: Path) -> tuple[str, str]:
    """(split, subject) by a file's folder and name."""
    name = file.name.split(".")[0]
    head, _, tail = name.rpartition("_")
    if head and tail.lower() in _SPLITS:
        return _SPLITS[tail.lower()], head
    folders = file.relative_to(root).parent.parts if root.is_dir() else ()
    return next((_SPLITS[f.lower()] for f in reversed(folders) if f.lower() in _SPLITS), ""), name


def _mapping(path: Path) -> dict[str, tuple[str, str]]:
    """C-Eval's `subject_mapping.json`: subject -> (English name, Chinese name, category)."""
    file = path / _MAPPING if path.is_dir() else path.parent / _MAPPING
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): (str(entry[1]), str(entry[2])) for name, entry in data.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise SopError("not a mapping of subjects to [English name, Chinese name, category]", where=str(file), code=DATA) from None


def _question(row: Mapping[str, Any], left_out: Counter[str]) -> Question | None:
    from ..data.formats import RowError, choice_of

    plain = {str(k): v for k, v in row.items() if v is not None and v != ""}
    try:
        if not _has_options(plain):
            plain = _split_inside(plain)
        question, options, answer = choice_of(plain)
    except RowError as error:
        left_out[error.reason] += 1
        return None
    if answer is None or not all(options):
        left_out["empty_option" if answer else "no_answer"] += 1
        return None
    return Question("", "", "", question.strip(), tuple(options), answer)


def _has_options(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("options"), (list, dict)) or isinstance(row.get("choices"), (list, dict)) or {"A", "B"} <= set(row)


def _split_inside(row: Mapping[str, Any]) -> dict[str, Any]:
    """A question that carries its options in its own text (`... A．one B．two`) with them taken out.

    Raises:
        RowError: no_options, or several_questions where one text holds more than one.
    """
    from ..data.formats import RowError

    text, answer = row.get("question", row.get("Question")), row.get("answer", row.get("Answer"))
    if not isinstance(text, str):
        raise RowError("no_question")
    if isinstance(answer, list) and len(answer) > 1:
        raise RowError("several_questions")
    marks = list(_INSIDE.finditer(text))
    start = next((i for i, m in enumerate(marks) if [n[1] for n in marks[i:]] == list(LETTERS[: len(marks) - i])), None)
    if start is None or len(marks) - start < 2:
        raise RowError("no_options")
    ends = [m.start() for m in marks[start + 1 :]] + [len(text)]
    options = [text[m.end() : end].strip() for m, end in zip(marks[start:], ends, strict=True)]
    return {"question": text[: marks[start].start()].strip(), "options": options, "answer": answer}
