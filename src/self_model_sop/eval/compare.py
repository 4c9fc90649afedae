"""`sop eval compare`: bits per byte, loss on assistant tokens, multiple choice and answers of several models on the same sets, side by side.

One model is in memory at a time. Each measurement is kept under the hash of the model's files, the data and the settings, so that after a change of
one model or one text only that is measured again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .. import console
from ..artifact import Target
from ..config import option
from ..errors import DATA, SopError
from ..hub import HubConfig
from ..stage import Artifact, Run, Stage, stage_main
from .contamination import contaminated, summary
from .generate import Answer, Decoding, generate, measure
from .guard import Guard, enforce, judge
from .harness import Exam
from .mcq import exam_inputs, exam_problems, exam_results, exam_tasks, facts_of, read_for, write_outcomes
from .measured import Task, describe_model, measure_models, once, outcomes_of
from .models import Device, Opened, inputs_of
from .perplexity import Bits, Scored, score_texts, sequence_nats, total
from .sets import Prompt, conversations, documents, prompts
from .table import as_markdown, as_text
from .uncertainty import bits_interval, change_interval


@dataclass(frozen=True, kw_only=True)
class Config:
    """`config/eval_config/compare.yaml`."""

    models: dict[str, str] = option(help="name -> model folder, adapter folder or hub id; the first is what the others are compared with", path="model", factory=dict)
    texts: dict[str, Path] = option(help="name -> held-out text (JSONL of any format, Parquet, txt with one document per line): bits per byte", path="input", factory=dict)
    text_fields: tuple[str, ...] = option((), "fields of `texts` to read; empty: every text of the recognised format")
    questions: dict[str, Path] = option(help="name -> multiple-choice questions (see `sop eval mcq`): share of right answers", path="input", factory=dict)
    examples: dict[str, Path] = option(help="name of a question set -> solved questions for its few-shot prompts", path="input", factory=dict)
    exam: Exam = option(factory=Exam)
    sft_file: Path | None = option(None, "held-out conversations: loss on assistant tokens", path="input")
    prompts: tuple[str, ...] = option((), "questions that every model answers")
    prompts_file: Path | None = option(None, "more questions: one per line, or rows of any dialogue format", path="input")
    system: str | None = option(None, "system message before each question")
    template_path: Path | None = option(None, "chat template for models without one of their own", path="input")
    answers: Decoding = option(factory=Decoding)
    samples: int = option(0, "sampled answers per question beside the greedy one (needs answers.temperature > 0)")
    window: int = option(1024, "tokens that a model sees at once; longer documents are read in windows that overlap by half")
    batch_size: int = option(8, "windows per forward pass", cosmetic=True)
    max_documents: int | None = option(None, "measure at most so many documents of a file, chosen by content hash")
    max_chars: int | None = option(None, "read only so many characters from the beginning of each document; longer conversations of `sft_file` are left out")
    training: tuple[Path, ...] = option((), "what the models were trained on: how many items of each set it contains is counted and shown", path="input")
    guard: Guard = option(factory=Guard)
    seed: int = option(0, "seed of the bootstrap")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("float32", "dtype of the weights")
    device: Device = option("auto", "auto: a GPU where there is one")
    output_dir: Path = option(Path("runs/compare"), "the artifact", path="output", flag="--output_dir")
    cache_dir: Path | None = option(None, "measurements are kept here; default: .cache in output_dir", path="output")
    huggingface: HubConfig = option(factory=HubConfig)


# --- what is measured ---------------------------------------------------------------------------------------------------------------------


def measure_text(opened: Opened, config: Config, texts: Sequence[str]) -> dict[str, Any]:
    """Bits per byte and per character of documents, with nats and bytes of each for what is asked about some of them."""
    parts = score_texts(*opened, texts, window=config.window, batch_size=config.batch_size)
    return {**describe_bits(total(parts)), "documents": len(texts), "document_nats": [p.nll_nats for p in parts], "document_bytes": [p.bytes for p in parts]}


def describe_bits(bits: Bits) -> dict[str, Any]:
    """What a text cost, in every unit."""
    more = {"bits_per_byte": bits.bits_per_byte, "bits_per_char": bits.bits_per_char, "tokens_per_char": bits.tokens_per_char, "token_perplexity": bits.perplexity}
    return {**asdict(bits), **more}


def measure_sft(opened: Opened, config: Config, talks: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Loss on assistant tokens (end markers included): nats per token, and per byte of the assistants' text, which vocabularies share."""
    from ..train.template import TemplateError, renderer_for

    renderer, rendered, refused = renderer_for(opened.tokenizer, config.template_path), [], 0
    for talk in talks:
        try:
            rendered.append(renderer.render(talk))
        except TemplateError:
            refused += 1
    nats = sum(sequence_nats(opened.model, [Scored(r.ids, r.supervised) for r in rendered], window=config.window, batch_size=config.batch_size))
    tokens = sum(sum(r.supervised) for r in rendered)
    size = sum(len(r.text[t.start : t.end - len(t.end_marker)].encode()) for r in rendered for t in r.turns if t.weight > 0)
    if not tokens or not size:
        raise SopError("no assistant tokens to measure", where=str(config.sft_file), fix="the file needs conversations with answers", code=DATA)
    return {
        "nats_per_token": nats / tokens, "nats_per_byte": nats / size, "bits_per_byte": nats / size / math.log(2), "nll_nats": nats, "tokens": tokens, "bytes": size,
        "conversations": len(rendered), "refused_by_template": refused,
    }  # fmt: skip


def measure_answers(opened: Opened, config: Config, questions: Sequence[Prompt]) -> dict[str, Any]:
    """The greedy answer to each question, `samples` sampled ones, and what can be counted about the greedy ones."""
    from ..train.template import renderer_for

    renderer = renderer_for(opened.tokenizer, config.template_path)
    start = [{"role": "system", "content": config.system}] if config.system else []
    references = [q.reference for q in questions] if any(q.reference for q in questions) else []
    greedy, sampled = [], []
    for question in console.track(questions, "answering", unit="questions"):
        ids = renderer.prompt([*start, {"role": "user", "content": question.question}])
        greedy.append(generate(*opened, ids, renderer.stop_ids, replace(config.answers, temperature=0.0)))
        seeds = range(config.answers.seed, config.answers.seed + config.samples)
        sampled.append([generate(*opened, ids, renderer.stop_ids, replace(config.answers, seed=seed)) for seed in seeds])
    out: dict[str, Any] = {"greedy": [_plain(a) for a in greedy], "counts": measure(greedy, references)}
    if config.samples:
        repeated = [r for r in references for _ in range(config.samples)]
        out |= {"sampled": [[_plain(a) for a in several] for several in sampled], "sampled_counts": measure([a for several in sampled for a in several], repeated)}
    return out


def _plain(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "tokens": answer.tokens, "stopped": answer.stopped}


# --- once per model, data and settings ----------------------------------------------------------------------------------------------------


def _tasks(run: Run[Config]) -> Iterator[Task]:
    config, read = run.config, once()
    common = ("dtype", "device")
    yield Task("model", "", None, common, describe_model)
    for name, path in config.texts.items():
        sha = run.inputs[f"text {name}"]["sha256"]

        def bits(opened: Opened, path: Path = path) -> dict[str, Any]:
            return measure_text(opened, config, read(path, lambda: documents(path, config.text_fields, config.max_documents, config.max_chars)).items)

        yield Task("bits", name, sha, (*common, "window", "max_documents", "max_chars", "text_fields"), bits)
    if config.sft_file:
        path = config.sft_file
        sha = [run.inputs[k]["sha256"] for k in ("sft_file", "template") if k in run.inputs]

        def sft(opened: Opened, path: Path = path) -> dict[str, Any]:
            return measure_sft(opened, config, read(path, lambda: conversations(path, config.max_documents, config.max_chars)).items)

        yield Task("sft", "", sha, (*common, "window", "max_documents", "max_chars"), sft)
    yield from exam_tasks(config, run.inputs)
    asked = prompts(config.prompts, config.prompts_file)
    if asked:
        template = run.inputs["template"]["sha256"] if "template" in run.inputs else None
        yield Task("answers", "", [asked, template], (*common, "system", "answers", "samples"), lambda o: measure_answers(o, config, asked))


# --- the stage ----------------------------------------------------------------------------------------------------------------------------


def build(run: Run[Config]) -> dict[str, Any]:
    """Measure model after model; write results.json, results.md, and what is known about single documents and questions."""
    config, tasks = run.config, list(_tasks(run))
    asked = prompts(config.prompts, config.prompts_file)
    results: dict[str, Any] = {"order": list(config.models), **{key: {} for key in ("models", "bits", "sft", "exams", "answers")}}
    results |= {"prompts": [p.question for p in asked], "references": [p.reference for p in asked]}
    outcomes: dict[str, dict[str, Any]] = {}
    known = 0
    for name, found, from_cache in measure_models(run, tasks, config.cache_dir or config.output_dir / ".cache"):
        known += from_cache
        results["models"][name], results["bits"][name], outcomes[name] = found["model", ""], outcomes_of(found, "bits"), outcomes_of(found)
        for kind in ("sft", "answers"):
            if (kind, "") in found:
                results[kind][name] = found[kind, ""]
    results["exams"] = exam_results(outcomes, config.seed)
    results["question_sets"] = {name: facts_of(read_for(config, name)) for name in config.questions}
    results["contamination"] = _contamination(config)
    write_outcomes(run.work, outcomes)
    (run.work / "documents.json").write_text(json.dumps(_by_document(results)), encoding="utf-8")
    _compare(results, outcomes, config.seed)
    results["guard"] = judge(results, config.guard)
    (run.work / "results.json").write_text(json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False), encoding="utf-8")
    (run.work / "results.md").write_text(as_markdown(results), encoding="utf-8")
    return {**results, "measured": len(tasks) * len(config.models) - known, "from_cache": known}


def _contamination(config: Config) -> dict[str, Any]:
    """Of each text and question set: how many items the training data contains."""
    if not config.training:
        return {}
    sets: dict[str, Sequence[Any]] = {name: documents(path, config.text_fields, config.max_documents, config.max_chars).items for name, path in config.texts.items()}
    sets |= {name: read_for(config, name).items for name in config.questions}
    return {name: summary(items, contaminated(items, config.training)) for name, items in sets.items()}


def _by_document(results: Mapping[str, Any]) -> dict[str, Any]:
    """text -> bytes of each document, and nats of each model on it."""
    first: dict[str, Any] = next(iter(results["bits"].values()), {})
    return {
        text: {"bytes": part["document_bytes"], "nats": {model: [round(n, 6) for n in bits[text]["document_nats"]] for model, bits in results["bits"].items()}}
        for text, part in first.items()
    }


def _compare(results: dict[str, Any], outcomes: Mapping[str, Mapping[str, Any]], seed: int) -> None:
    """Fill in intervals, changes against the first model, and scores without the contaminated items; single documents leave the results."""
    first = next(iter(results["models"]))
    nats = {name: {text: part.pop("document_nats") for text, part in bits.items()} for name, bits in results["bits"].items()}
    sizes = {name: {text: part.pop("document_bytes") for text, part in bits.items()} for name, bits in results["bits"].items()}
    for name, bits in results["bits"].items():
        for text, part in bits.items():
            part["low"], part["high"] = bits_interval(nats[name][text], sizes[name][text], seed=seed) or (None, None)
            if name != first:
                low, high = change_interval(nats[first][text], nats[name][text], seed=seed) or (None, None)
                part["against_first"] = {"change": part["bits_per_byte"] / bits_of(results, first, text) - 1, "low": low, "high": high}
            found = set(results["contamination"].get(text, {}).get("positions", ()))
            if found and len(found) < len(nats[name][text]):
                clean = [i for i in range(len(nats[name][text])) if i not in found]
                part["clean_bits_per_byte"] = sum(nats[name][text][i] for i in clean) / sum(sizes[name][text][i] for i in clean) / math.log(2)
    for name, part in results["sft"].items():
        if name != first:
            part["against_first"] = {"change": part["bits_per_byte"] / results["sft"][first]["bits_per_byte"] - 1, "low": None, "high": None}
    for name, sets in results["exams"].items():
        for exam, part in sets.items():
            found = set(results["contamination"].get(exam, {}).get("positions", ()))
            clean = [o["correct"] for i, o in enumerate(outcomes[name][exam]) if i not in found]
            if found and clean:
                part["clean_accuracy"] = sum(clean) / len(clean)


def bits_of(results: Mapping[str, Any], model: str, text: str) -> float:
    """Bits per byte of one model on one text."""
    return float(results["bits"][model][text]["bits_per_byte"])


def _gate(done: Artifact, config: Config) -> None:
    entries = done.stats.get("guard") or []
    for line in (f"{e['model']} lost too much on {e['set']}: {e['shown']}" for e in entries if e["broken"] and not config.guard.stop):
        console.warn(line)
    enforce(entries, config.guard, list(config.models)[-1], str(done.path))


def _inputs(config: Config) -> dict[str, Path | None]:
    found: dict[str, Path | None] = {label: path for name, source in config.models.items() for label, path in inputs_of(name, source)}
    found |= {f"text {name}": path for name, path in config.texts.items()} | exam_inputs(config)
    found |= {f"training {i}": path for i, path in enumerate(config.training)}
    more = {"sft_file": config.sft_file, "prompts_file": config.prompts_file, "template": config.template_path}
    return found | {name: path for name, path in more.items() if path}


def _preflight(config: Config) -> Iterator[tuple[str, str, str]]:
    if not config.models:
        yield "models", "no model to measure", "models: {base: models/base, tuned: self_model/checkpoints/merged}"
    if not (config.texts or config.questions or config.sft_file or config.prompts or config.prompts_file):
        yield "texts", "nothing to measure on", "give texts, questions, sft_file or prompts"
    if config.samples and not config.answers.temperature:
        yield "answers.temperature", "sampled answers at temperature 0 would all be the greedy one", "for example answers.temperature=0.8"
    if config.window < 2 or config.batch_size < 1 or config.samples < 0 or any(n is not None and n < 1 for n in (config.max_documents, config.max_chars)):
        yield "window", "needs window >= 2, batch_size >= 1, samples >= 0, max_documents >= 1, max_chars >= 1", ""
    for name in config.guard.general:
        if name not in config.texts and name not in config.questions:
            yield "guard.general", f"no text or question set {name!r}", "known: " + ", ".join([*config.texts, *config.questions])
    for name in set(config.texts) & set(config.questions):
        yield f"questions.{name}", "a text has the same name", "give one of them another name"
    yield from exam_problems(config)


STAGE = Stage(
    name="eval.compare", version=3, config=Config, output=lambda config: Target(config.output_dir), inputs=_inputs, build=build, apart=True,
    preflight=lambda config: list(_preflight(config)), gate=_gate, summary=lambda done: as_text(done.stats),
    plan=lambda config: [f"{name}: {source}" for name, source in config.models.items()],
    next=lambda config: f"sop infer chat --model {list(config.models.values())[-1]}" if config.models else "",
)  # fmt: skip


def run(config: Config) -> Artifact:
    """Measure, or find it done."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sop eval compare`."""
    return stage_main(STAGE, argv)
