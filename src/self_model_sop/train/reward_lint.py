"""What the rewards give right, wrong and empty answers, before a run: a set of rewards that does not tell them apart teaches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from .. import errors
from ..console import warn
from ..errors import SopError
from . import rewards
from .prompts import Prompt
from .rewards import Part, Unscored
from .rewards.text import references

ROWS = 64
KINDS = ("right", "another row's", "refusing", "empty")
_REFUSING = "材料中没有相关信息，无法回答。"


@dataclass(frozen=True)
class Table:
    """`values[reward][kind]` holds what each sampled row's answer of that kind earned; the reward `sum` is the weighted one.

    `compares`: some reward looks at the row, so that right and wrong answers must differ.
    """

    values: dict[str, dict[str, list[float]]]
    compares: bool
    rows: int

    def mean(self, kind: str, reward: str = "sum") -> float | None:
        """The mean of what answers of a kind earned, or None where there are none."""
        found = self.values[reward][kind]
        return fmean(found) if found else None

    def lines(self) -> list[str]:
        """The table in words: mean (least .. most)."""

        def told(numbers: Sequence[float]) -> str:
            return f"{fmean(numbers):.2f} ({min(numbers):.2f} .. {max(numbers):.2f})" if numbers else "-"

        out = [f"rewards on answers to {self.rows} prompts, mean (least .. most):"]
        return out + [f"  {name}: " + ", ".join(f"{kind} {told(kinds[kind])}" for kind in KINDS) for name, kinds in self.values.items()]

    def stats(self) -> dict[str, Any]:
        """The means, for the manifest."""
        return {name: {kind: round(fmean(numbers), 4) if numbers else None for kind, numbers in kinds.items()} for name, kinds in self.values.items()}

    def problem(self) -> str:
        """Why these rewards cannot teach; "" where they can."""
        right = self.mean("right")
        if not self.compares or right is None:
            return ""
        for kind in KINDS[1:]:
            other = self.mean(kind)
            if other is not None and other >= right:
                answers = f"{kind} answers" if kind != "another row's" else "answers of another row"
                return f"right answers earn {right:.3f} on average, {answers} {other:.3f}"
        return ""


def table(parts: Sequence[Part], prompts: Sequence[Prompt], most: int = ROWS) -> Table:
    """Judge the ground truths of some prompts, spread evenly, as answers to their own prompt and to others, a refusal, and nothing.

    Raises:
        SopError: exit 3 where a reward function fails.
    """
    chosen = [prompts[i * len(prompts) // min(most, len(prompts))] for i in range(min(most, len(prompts)))]
    sample = [prompt.row for prompt in chosen]
    values: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in [*(p.name for p in parts), "sum"]}
    for i, row in enumerate(sample):
        other = next((r for r in [*sample[i + 1 :], *sample[:i]] if str(r["ground_truth"]) != str(row["ground_truth"])), None)
        answers = {"right": answer(parts, row), "another row's": answer(parts, other) if other else None, "refusing": _REFUSING, "empty": ""}
        for kind, text in answers.items():
            if text is None:
                continue
            try:
                scores = rewards.each(parts, text, row)
            except Unscored as error:
                raise SopError(f"a reward failed: {error}", where=chosen[i].source, fix=f"the answer was {text[:80]!r}", code=errors.DATA) from error
            for name, value in {**scores, "sum": rewards.total(parts, scores)}.items():
                values[name][kind].append(value)
    return Table(values, any(p.compares for p in parts), len(sample))


def answer(parts: Sequence[Part], row: Mapping[str, Any]) -> str:
    """A right answer to a row in the form that the rewards ask for: the ground truth with the references it lacks, inside the tags."""
    text = str(row["ground_truth"])
    extra = row.get("extra_info") or {}
    named = extra.get("references") if any(p.name == "cite" for p in parts) else None
    if named:
        listed = [named] if isinstance(named, str) else [str(r) for r in named]
        text = "\n".join([text, *(r for r in listed if not references(r) <= references(text))])
    tags = next((p for p in parts if p.name == "tags"), None)
    for form in (f"<think>略</think>\n<answer>{text}</answer>", f"<think>略</think>\n{text}", f"<answer>{text}</answer>") if tags else ():
        if tags and tags.function(form, row) == 1:
            return form
    return text


def require(found: Table, mode: Literal["refuse", "warn"]) -> None:
    """Stop, or warn, where right answers do not earn more than wrong ones.

    Raises:
        SopError: exit 3.
    """
    problem = found.problem()
    if not problem:
        return
    fix = "look at the table above: give the reward that compares with the ground truth more weight, or fit the ground truths to it (reward_lint=warn goes on all the same)"
    if mode == "warn":
        warn(f"{problem}; {fix}")
        return
    raise SopError(f"these rewards would not teach right answers: {problem}", where="rewards", fix=fix, code=errors.DATA)
