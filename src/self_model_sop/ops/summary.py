"""What a pipeline led to, read from the manifests only: printed, and written as `summary.md`, `summary.json` and `report.html` in the pipeline's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import console
from ..artifact import content_hash, write_atomic
from ..eval.table import in_order
from ..redact import redact
from ..stage import Artifact
from ..yaml_source import display
from . import report

if TYPE_CHECKING:
    from .steps import Pipeline

SHOWN_ANSWERS = 3
_ANSWER_CHARS = {"console": 140, "file": 600}
_MUST_NOT_CHANGE = ("english", "code")
_LAST_MODELS = ("train.merge", "train.grpo", "train.dpo", "train.sft", "train.pretrain", "tokenizer.resize", "data.model")


@dataclass(frozen=True)
class Table:
    """A titled table, with a line below it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def conclude(pipeline: Pipeline, done: Sequence[Artifact], seconds: float) -> None:
    """Print the summary of a finished pipeline and write it down.

    Args:
        pipeline: what was run.
        done: the artifact of each of its stages, in order.
        seconds: wall-clock time of this run (the manifests tell how long the work took when it was done).
    """
    for table in tables(pipeline, done, _ANSWER_CHARS["console"]):
        console.say()
        console.table(table.title, table.header, table.rows)
        if table.note:
            console.say(table.note)
    console.say()
    for line in closing(pipeline, done, seconds):
        console.say(line)
    write_atomic(pipeline.root / "summary.json", redact(json.dumps(record(pipeline, done, seconds), ensure_ascii=False, indent=1)) + "\n")
    write_atomic(pipeline.root / "summary.md", redact("\n".join(markdown(pipeline, done, seconds))) + "\n")
    report.write(pipeline.root)


def tables(pipeline: Pipeline, done: Sequence[Artifact], answer_chars: int) -> Iterator[Table]:
    """One table for each thing that was measured."""
    for step, made in zip(pipeline.steps, done, strict=True):
        if step.entry.name == "data.process":
            yield data_table(step.id, made.stats)
    for step, made in zip(pipeline.steps, done, strict=True):
        if step.entry.name == "tokenizer.evaluate":
            yield tokenizer_table(made.stats)
    yield from training_table(pipeline, done)
    yield from preference_table(pipeline, done)
    yield from reward_table(pipeline, done)
    compared = [made for step, made in zip(pipeline.steps, done, strict=True) if step.entry.name == "eval.compare"]
    for made in compared[-1:]:  # checks between the stages measure what the last one shows together
        stats = in_order(made.stats)
        yield models_table(stats)
        yield from answers_table(stats, answer_chars)
    yield stages_table(pipeline, done)


def data_table(name: str, stats: Mapping[str, Any]) -> Table:
    """Rows of each set: total, kept, dropped by reason, quarantined."""
    sets: Mapping[str, Mapping[str, Any]] = stats["sets"]
    reasons = sorted({r for s in sets.values() for r, n in s["dropped"].items() if n})
    rows = [["rows read", *(f"{s['total']:,}" for s in sets.values())]]
    if any(s.get("added_by_split") for s in sets.values()):
        rows.append(["added by splitting", *(f"{s.get('added_by_split', 0):,}" for s in sets.values())])
    rows += [[f"dropped: {r.replace('_', ' ')}", *(f"{s['dropped'].get(r, 0):,}" for s in sets.values())] for r in reasons]
    rows.append(["quarantined", *(f"{sum(s['quarantined'].values()):,}" for s in sets.values())])
    rows.append(["kept", *(f"{s['kept']:,}" for s in sets.values())])
    rows.append(["  train / validation", *(f"{s['train']:,} / {s['validation']:,}" for s in sets.values())])
    masked = ", ".join(f"{kind} {n}" for kind, n in stats.get("pii", {}).items())
    return Table(f"Data ({name})", ["", *sets], rows, f"personal data masked: {masked}" if masked else "")


def tokenizer_table(stats: Mapping[str, Any]) -> Table:
    """Tokens per character on held-out text, and what must not have changed."""
    before, after, reduction = stats["tokens_per_char_before"], stats["tokens_per_char_after"], stats["reduction"]
    rows = [["tokens per character, held-out domain text", f"{before:.3f}", f"{after:.3f}", f"{-reduction:+.1%}"]]
    changed: Mapping[str, int] = stats["changed_regression_lines"]
    rows.append(["lines of English and of code that encode differently", "", str(sum(changed.get(name, 0) for name in _MUST_NOT_CHANGE)), ""])
    new = stats.get("new_tokens") or {}
    notes = [f"{new['count']:,} new tokens, {new['used_on_test']:,} of them used on the held-out text"] if new else []
    others = ", ".join(f"{name} {n}" for name, n in changed.items() if n and name not in _MUST_NOT_CHANGE)
    return Table("Tokenizer", ["", "before", "after", "change"], rows, "; ".join([*notes, *([f"lines of other kinds that encode differently: {others}"] if others else [])]))


def training_table(pipeline: Pipeline, done: Sequence[Artifact]) -> Iterator[Table]:
    """Loss of each training stage: first and last on the training data, before and after on held-out data."""
    rows = []
    for step, made in zip(pipeline.steps, done, strict=True):
        s = made.stats
        if "train_loss_last" not in s or "algorithm" in s:
            continue
        change = f"{s['eval_loss_after'] / s['eval_loss_before'] - 1:+.1%}" if s.get("eval_loss_before") and s.get("eval_loss_after") is not None else ""
        losses = [_number(s.get(k)) for k in ("train_loss_first", "train_loss_last", "eval_loss_before", "eval_loss_after")]
        rows.append([step.id, f"{s['steps']:,}", f"{s['tokens']:,}", *losses, change, console.human_seconds(s.get("train_seconds", 0.0))])
    if rows:
        header = ["", "steps", "tokens", "training loss: first", "last", "held-out loss: before", "after", "change", "took"]
        yield Table("Training (nats per token; fine-tuning counts assistant tokens only)", header, rows)


def preference_table(pipeline: Pipeline, done: Sequence[Artifact]) -> Iterator[Table]:
    """Accuracy and margin of each preference training on held-out pairs."""
    rows = []
    for step, made in zip(pipeline.steps, done, strict=True):
        s = made.stats
        if step.entry.name in ("train.dpo", "train.reward"):
            measures = [_number(s.get(f"eval_{key}_{when}")) for key in ("accuracy", "margin") for when in ("before", "after")]
            took = console.human_seconds(s.get("train_seconds", 0.0))
            rows.append(
                [step.id, s["algorithm"], f"{s['rows']['kept']:,}", f"{s['steps']:,}", _number(s.get("train_loss_first")), _number(s.get("train_loss_last")), *measures, took]
            )
    if rows:
        header = ["", "method", "pairs", "steps", "training loss: first", "last", "held-out accuracy: before", "after", "margin: before", "after", "took"]
        yield Table("Preferences (held-out pairs in which the chosen answer gets the larger reward, and by how much)", header, rows)


def reward_table(pipeline: Pipeline, done: Sequence[Artifact]) -> Iterator[Table]:
    """The mean reward of greedy answers before and after each training by rewards, and of the sampled ones."""
    rows = []
    for step, made in zip(pipeline.steps, done, strict=True):
        s = made.stats
        if step.entry.name == "train.grpo" and s["engine"] == "trl":
            measures = [_number((s[f"reward_{when}"] or {}).get("sum")) for when in ("before", "after")] + [_number(s[f"reward_sampled_{when}"]) for when in ("first", "last")]
            rows.append([step.id, s["algorithm"], f"{s['rows']['kept']:,}", f"{s['steps']:,}", *measures, s["reward_on"], console.human_seconds(s.get("train_seconds", 0.0))])
    if rows:
        header = ["", "method", "prompts", "updates", "mean reward: before", "after", "sampled answers: first", "last", "before and after on", "took"]
        yield Table("Rewards (greedy answers before and after; sampled answers at the first and the last update)", header, rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def models_table(stats: Mapping[str, Any]) -> Table:
    """Bits per byte of each model on each text, and of the assistants' answers, each with its change against the first model."""
    first = next(iter(stats["models"]))
    texts, sft = list(stats["bits"][first]), stats.get("sft") or {}
    rows = []
    for name, info in stats["models"].items():
        cells = [name, f"{info['parameters'] / 1e6:.1f} M", f"{info['vocabulary']:,}"]
        cells += [_against(stats["bits"][name][t]["bits_per_byte"], stats["bits"][first][t]["bits_per_byte"]) for t in texts]
        rows.append([*cells, _against(sft[name]["bits_per_byte"], sft[first]["bits_per_byte"])] if sft else cells)
    header = ["model", "parameters", "vocabulary", *(f"text: {t}" for t in texts), *(["held-out answers"] if sft else [])]
    return Table("Models: bits per byte on the same held-out text (lower is better; vocabularies may differ)", header, rows)


def _against(value: float, first: float) -> str:
    return f"{value:.3f}" if value == first else f"{value:.3f} ({value / first - 1:+.1%})"


def answers_table(stats: Mapping[str, Any], most: int) -> Iterator[Table]:
    """The first answers of each model, side by side."""
    answers: Mapping[str, Any] = stats.get("answers") or {}
    if not answers:
        return
    rows = [[question, *(_cut(a["greedy"][i]["text"], most) for a in answers.values())] for i, question in enumerate(stats["prompts"][:SHOWN_ANSWERS])]
    yield Table("Answers (greedy)", ["question", *answers], rows)


def _cut(text: str, most: int) -> str:
    flat = " ".join(text.split())
    return (flat[:most] + "…" if len(flat) > most else flat) or "(empty)"


def stages_table(pipeline: Pipeline, done: Sequence[Artifact]) -> Table:
    """Time, memory and place of each stage."""
    rows = []
    for step, made in zip(pipeline.steps, done, strict=True):
        m = made.manifest
        state = "up to date" if made.skipped else "done"
        rows.append([step.id, m["stage"], state, console.human_seconds(m["seconds"]), f"{m.get('peak_memory_mib', 0) / 1024:.1f}", display(made.path)])
    total = sum(a.manifest["seconds"] for a in done)
    peak = max((a.manifest.get("peak_memory_mib", 0) for a in done), default=0)
    rows.append(["total", "", "", console.human_seconds(total), f"{peak / 1024:.1f}", display(pipeline.root)])
    return Table("Stages (times are of the run that did the work)", ["", "stage", "state", "took", "peak memory, GiB", "artifact"], rows)


def closing(pipeline: Pipeline, done: Sequence[Artifact], seconds: float) -> Iterator[str]:
    """Where everything lies, and what to type next."""
    ran = sum(not a.skipped for a in done)
    yield f"{pipeline.name}: {ran} stages done, {len(done) - ran} up to date, in {console.human_seconds(seconds)}; everything lies in {display(pipeline.root)} (see report.html)"
    model = last_model(pipeline, done)
    if model is not None:
        yield f"next: sop infer chat --model {display(model.path)}"
        yield f"      sop infer gguf --model_path {display(model.path)} --output_path exports/{pipeline.name}.gguf --quantize q4_k_m      (for llama.cpp and Ollama)"
    yield f"      sop runs verify {display(pipeline.root)}"


def last_model(pipeline: Pipeline, done: Sequence[Artifact]) -> Artifact | None:
    """The model that the pipeline ends with."""
    made = {step.entry.name: a for step, a in zip(pipeline.steps, done, strict=True)}
    return next((made[name] for name in _LAST_MODELS if name in made), None)


def record(pipeline: Pipeline, done: Sequence[Artifact], seconds: float) -> dict[str, Any]:
    """The summary as data."""
    stages = [
        {
            "id": step.id, "stage": a.manifest["stage"], "path": str(a.path), "seconds": a.manifest["seconds"], "peak_memory_mib": a.manifest.get("peak_memory_mib"),
            "up_to_date": a.skipped, "fingerprint": a.manifest["fingerprint"], "content_hash": content_hash(a.manifest), "stats": a.stats,
        }
        for step, a in zip(pipeline.steps, done, strict=True)
    ]  # fmt: skip
    return {
        "pipeline": pipeline.name, "file": str(pipeline.path), "root": str(pipeline.root), "stages": stages, "seconds_this_run": round(seconds, 2),
        "seconds_of_work": round(sum(s["seconds"] for s in stages), 2), "peak_memory_mib": max((s["peak_memory_mib"] or 0 for s in stages), default=0),
    }  # fmt: skip


def markdown(pipeline: Pipeline, done: Sequence[Artifact], seconds: float) -> Iterator[str]:
    """The summary as a Markdown page."""
    yield f"# {pipeline.name}"
    for table in tables(pipeline, done, _ANSWER_CHARS["file"]):
        yield from ("", f"## {table.title}", "")
        for cells in (table.header, ["---"] * len(table.header), *table.rows):
            yield "| " + " | ".join(_cell(c) for c in cells) + " |"
        if table.note:
            yield from ("", table.note)
    yield ""
    yield from (line.replace("next: ", "Next: ").strip() + "  " for line in closing(pipeline, done, seconds))


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
