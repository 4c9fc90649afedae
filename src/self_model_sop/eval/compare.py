"""`sop eval compare`: bits per byte, loss on assistant tokens and answers of several models on the same texts, side by side.

One model is in memory at a time. Each measurement is kept under the hash of the model's files, the data and the settings, so that after a change of
one model or one text only that is measured again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .. import console
from ..artifact import Target, sha256_json, write_atomic
from ..config import option
from ..errors import DATA, SopError
from ..hub import HubConfig
from ..stage import Artifact, Run, Stage, stage_main
from .generate import Answer, Decoding, generate, measure
from .models import Device, Opened, free_memory, inputs_of, open_model
from .perplexity import Scored, bits_per_byte, sequence_nats
from .sets import conversations, documents, prompts
from .table import as_markdown, as_text

MEASURE_VERSION = 2  # raised when a measurement changes its meaning


@dataclass(frozen=True, kw_only=True)
class Config:
    """`config/eval_config/compare.yaml`."""

    models: dict[str, str] = option(help="name -> model folder, adapter folder or hub id; the first is what the others are compared with", path="model", factory=dict)
    texts: dict[str, Path] = option(help="name -> held-out text (JSONL of any format, Parquet, txt with one document per line): bits per byte", path="input", factory=dict)
    text_fields: tuple[str, ...] = option((), "fields of `texts` to read; empty: every text of the recognised format")
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("float32", "dtype of the weights")
    device: Device = option("auto", "auto: a GPU where there is one")
    output_dir: Path = option(Path("runs/compare"), "the artifact", path="output", flag="--output_dir")
    huggingface: HubConfig = option(factory=HubConfig)


# --- what is measured ---------------------------------------------------------------------------------------------------------------------


def measure_text(opened: Opened, config: Config, texts: Sequence[str]) -> dict[str, Any]:
    """Bits per byte and per character of documents."""
    bits = bits_per_byte(*opened, texts, window=config.window, batch_size=config.batch_size)
    more = {"bits_per_byte": bits.bits_per_byte, "bits_per_char": bits.bits_per_char, "tokens_per_char": bits.tokens_per_char, "token_perplexity": bits.perplexity}
    return {**asdict(bits), **more, "documents": len(texts)}


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


def measure_answers(opened: Opened, config: Config, questions: Sequence[str]) -> dict[str, Any]:
    """The greedy answer to each question, `samples` sampled ones, and what can be counted about the greedy ones."""
    from ..train.template import renderer_for

    renderer = renderer_for(opened.tokenizer, config.template_path)
    start = [{"role": "system", "content": config.system}] if config.system else []
    greedy, sampled = [], []
    for question in console.track(questions, "answering", unit="questions"):
        ids = renderer.prompt([*start, {"role": "user", "content": question}])
        greedy.append(generate(*opened, ids, renderer.stop_ids, replace(config.answers, temperature=0.0)))
        seeds = range(config.answers.seed, config.answers.seed + config.samples)
        sampled.append([generate(*opened, ids, renderer.stop_ids, replace(config.answers, seed=seed)) for seed in seeds])
    out: dict[str, Any] = {"greedy": [_plain(a) for a in greedy], "counts": measure(greedy)}
    if config.samples:
        out |= {"sampled": [[_plain(a) for a in several] for several in sampled], "sampled_counts": measure([a for several in sampled for a in several])}
    return out


def _plain(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "tokens": answer.tokens, "stopped": answer.stopped}


def describe_model(opened: Opened) -> dict[str, Any]:
    """Size, vocabulary and class."""
    model = opened.model
    return {"parameters": sum(p.numel() for p in model.parameters()), "vocabulary": len(opened.tokenizer), "class": type(model).__name__, "device": str(model.device)}


# --- once per model, data and settings ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One measurement of one model; `settings` are the keys of the config that it depends on."""

    kind: str  # "model", "bits", "sft" or "answers"
    name: str  # of the text; else empty
    data: Any  # hash of what it is measured on
    settings: tuple[str, ...]
    work: Callable[[Opened], dict[str, Any]]


def _tasks(run: Run[Config]) -> Iterator[_Task]:
    config, read = run.config, _once()
    common = ("dtype", "device")
    yield _Task("model", "", None, common, describe_model)
    for name, path in config.texts.items():
        sha = run.inputs[f"text {name}"]["sha256"]

        def bits(opened: Opened, path: Path = path) -> dict[str, Any]:
            return measure_text(opened, config, read(path, lambda: documents(path, config.text_fields, config.max_documents)).items)

        yield _Task("bits", name, sha, (*common, "window", "max_documents", "text_fields"), bits)
    if config.sft_file:
        path = config.sft_file
        sha = [run.inputs[k]["sha256"] for k in ("sft_file", "template") if k in run.inputs]
        yield _Task("sft", "", sha, (*common, "window", "max_documents"), lambda o: measure_sft(o, config, read(path, lambda: conversations(path, config.max_documents)).items))
    questions = prompts(config.prompts, config.prompts_file)
    if questions:
        template = run.inputs["template"]["sha256"] if "template" in run.inputs else None
        yield _Task("answers", "", [questions, template], (*common, "system", "answers", "samples"), lambda o: measure_answers(o, config, questions))


def _once() -> Callable[[Path, Callable[[], Any]], Any]:
    """Read each file once, and only where a measurement needs it."""
    known: dict[Path, Any] = {}

    def read(path: Path, load: Callable[[], Any]) -> Any:
        if path not in known:
            known[path] = load()
        return known[path]

    return read


def _measure_model(run: Run[Config], name: str, tasks: Sequence[_Task]) -> tuple[dict[tuple[str, str], Any], int]:
    """Every measurement of one model, and how many of them were already known; the model is loaded only where one is missing."""
    config, cache = run.config, run.config.output_dir / ".cache"
    hashes = [run.inputs[label]["sha256"] for label in (f"model {name}", f"model {name} base") if label in run.inputs]
    found: dict[tuple[str, str], Any] = {}
    opened, known = None, 0
    for task in tasks:
        settings = {key: asdict(value) if isinstance(value := getattr(config, key), Decoding) else value for key in task.settings}
        key = sha256_json({"version": MEASURE_VERSION, "kind": task.kind, "model": hashes, "data": task.data, "settings": settings})
        path = cache / f"{key}.json"
        if hashes and path.is_file():
            found[task.kind, task.name], known = json.loads(path.read_text(encoding="utf-8")), known + 1
            continue
        opened = opened or open_model(config.models[name], dtype=config.dtype, device=config.device)
        console.note(f"{name}: {task.kind} {task.name}".rstrip())
        result = found[task.kind, task.name] = task.work(opened)
        if hashes:  # a hub id has no local contents to hash
            cache.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(result, ensure_ascii=False, allow_nan=False))
    return found, known


# --- the stage ----------------------------------------------------------------------------------------------------------------------------


def build(run: Run[Config]) -> dict[str, Any]:
    """Measure model after model; write results.json and results.md."""
    config, tasks = run.config, list(_tasks(run))
    results: dict[str, Any] = {"models": {}, "bits": {}, "sft": {}, "answers": {}, "prompts": prompts(config.prompts, config.prompts_file)}
    known = 0
    for name in config.models:
        found, from_cache = _measure_model(run, name, tasks)
        known += from_cache
        free_memory()
        results["models"][name] = found["model", ""]
        results["bits"][name] = {text: value for (kind, text), value in found.items() if kind == "bits"}
        for kind in ("sft", "answers"):
            if (kind, "") in found:
                results[kind][name] = found[kind, ""]
    (run.work / "results.json").write_text(json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False), encoding="utf-8")
    (run.work / "results.md").write_text(as_markdown(results), encoding="utf-8")
    return {**results, "measured": len(tasks) * len(config.models) - known, "from_cache": known}


def _inputs(config: Config) -> dict[str, Path | None]:
    found: dict[str, Path | None] = {label: path for name, source in config.models.items() for label, path in inputs_of(name, source)}
    found |= {f"text {name}": path for name, path in config.texts.items()}
    more = {"sft_file": config.sft_file, "prompts_file": config.prompts_file, "template": config.template_path}
    return found | {name: path for name, path in more.items() if path}


def _preflight(config: Config) -> Iterator[tuple[str, str, str]]:
    if not config.models:
        yield "models", "no model to measure", "models: {base: models/base, tuned: self_model/checkpoints/merged}"
    if not (config.texts or config.sft_file or config.prompts or config.prompts_file):
        yield "texts", "nothing to measure on", "give texts, sft_file or prompts"
    if config.samples and not config.answers.temperature:
        yield "answers.temperature", "sampled answers at temperature 0 would all be the greedy one", "for example answers.temperature=0.8"
    if config.window < 2 or config.batch_size < 1 or config.samples < 0 or (config.max_documents is not None and config.max_documents < 1):
        yield "window", "needs window >= 2, batch_size >= 1, samples >= 0, max_documents >= 1", ""


STAGE = Stage(
    name="eval.compare", version=2, config=Config, output=lambda config: Target(config.output_dir), inputs=_inputs, build=build, apart=True,
    preflight=lambda config: list(_preflight(config)), summary=lambda done: as_text(done.stats),
    plan=lambda config: [f"{name}: {source}" for name, source in config.models.items()],
    next=lambda config: f"sop infer chat --model {list(config.models.values())[-1]}" if config.models else "",
)  # fmt: skip


def run(config: Config) -> Artifact:
    """Measure, or find it done."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sop eval compare`."""
    return stage_main(STAGE, argv)
