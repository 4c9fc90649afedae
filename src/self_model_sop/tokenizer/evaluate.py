"""`sop tokenizer evaluate`: what an extended tokenizer saves, what it costs, and what it changes, on any text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import console
from ..artifact import Target
from ..data.formats import RowError, to_text
from ..data.records import files_of, read
from ..errors import DATA, SopError
from ..stage import Artifact, Run, Stage, stage_main
from ..train.encoding import batches
from . import baseline, corpus, gates, regression, report, select
from .base import Base, gather, open_base, resolve, tokenizer_files
from .earlier import TokenizerStage
from .extend import EXPANSION
from .plan import Row, read_plan
from .settings import EvaluateConfig, Json, TokenizerConfig, local

_SPEED_BYTES = 2_000_000
_SPEED_ROUNDS = 5
_SPEED_TEXTS = 64  # texts in one part


@dataclass(frozen=True)
class Side:
    """One tokenizer of the comparison."""

    base: Base
    tokenizer: Any

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Encodings (ids, offsets) without special tokens."""
        return list(self.tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False))


def opened(folder: Path) -> Side:
    """Both views of a tokenizer folder: parsed, and loaded as a trainer would."""
    from ..train.model import load_tokenizer

    return Side(open_base(folder), load_tokenizer(folder))


# --- the text -----------------------------------------------------------------------------------------------------------------------------


def texts_of(settings: EvaluateConfig, held_out: Path, tally: corpus.Tally) -> Iterator[tuple[str, str]]:
    """(source, text) of the test corpus: given files, or the held-out text of the corpus stage; every row is counted in `tally`."""
    if not settings.test_corpus:
        for document in corpus.documents(held_out):
            tally.total, tally.kept = tally.total + 1, tally.kept + 1
            yield document.source, document.text
        return
    for path in files_of(settings.test_corpus):
        for record in read(path):
            tally.total += 1
            if record.row is None:
                tally.quarantined += 1
                continue
            try:
                text = to_text(record.row)
            except RowError as error:
                tally.dropped[error.reason] += 1
                continue
            if text.strip():
                tally.kept += 1
                yield corpus.source_of(path), text
            else:
                tally.dropped["empty"] += 1


# --- measuring ----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Count:
    """Totals of one source under one tokenizer."""

    chars: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    bytes_alone: int = 0  # byte-fallback tokens of SentencePiece

    def __add__(self, other: Count) -> Count:
        return Count(*(getattr(self, k) + getattr(other, k) for k in self.__dataclass_fields__))

    def rates(self) -> Json:
        """Tokens per character, bytes per token, and the share of tokens that are unknown or lone bytes."""
        return {
            "chars": self.chars, "bytes": self.bytes, "tokens": self.tokens, "tokens_per_char": _ratio(self.tokens, self.chars), "bytes_per_token": _ratio(self.bytes, self.tokens),
            "unk_rate": _ratio(self.unknown, self.tokens), "byte_rate": _ratio(self.bytes_alone, self.tokens),
        }  # fmt: skip


def _ratio(a: float, b: float) -> float:
    return round(a / b, 5) if b else 0.0


def count(side: Side, texts: Sequence[tuple[str, str]]) -> tuple[dict[str, Count], set[int]]:
    """Totals by source, and the set of ids that occur."""
    unknown = side.tokenizer.unk_token_id if side.base.kind != "byte_bpe" else None
    lone = {i for i, token in enumerate(side.tokenizer.convert_ids_to_tokens(range(min(len(side.tokenizer), 1024)))) if token and token.startswith("<0x")}
    out: dict[str, Count] = {}
    used: set[int] = set()
    for part in batches(texts, lambda item: item[1]):
        for (source, text), encoding in zip(part, side.encode([t for _, t in part]), strict=True):
            ids = encoding.ids
            found = Count(len(text), len(text.encode()), len(ids), ids.count(unknown) if unknown is not None else 0, sum(i in lone for i in ids) if lone else 0)
            out[source] = out.get(source, Count()) + found
            used.update(ids)
    return out, used


def compare(old: Side, new: Side, texts: Sequence[tuple[str, str]], rows: Sequence[Row], terms: Sequence[str]) -> Json:
    """Everything but speed: by source and in all, use of the new tokens, regression set, round trips, lexicon, llama.cpp probe."""
    (before, _), (after, used) = count(old, texts), count(new, texts)
    pair = gates.Pair(old.base, old.tokenizer, new.tokenizer, rows)
    lines = [line for _, t in texts[:500] for line in t.split("\n")[:20] if line.strip()]
    lines += [line for name in regression.NAMES for line in regression.lines(name)]
    moved = [f for gate in (gates.base_ids, gates.special_ids, gates.template) for f in gate(pair, ())]
    return {
        "baseline": {"tokens": len(old.tokenizer), "kind": old.base.kind}, "extended": {"tokens": len(new.tokenizer), "kind": new.base.kind},
        "sources": {name: _change(before[name], after[name]) for name in sorted(before)},
        "all": _change(sum(before.values(), Count()), sum(after.values(), Count())),
        "new_tokens": _new_tokens(old, new, _added(old, new), used, rows),
        "moved": moved, "round_trip_faults": list(gates.round_trip(pair, lines)),
        "changed_regression_lines": gates.changed_lines(pair), "regression_lines": {name: len(regression.lines(name)) for name in regression.NAMES},
        "lexicon": coverage(old, new, terms), "llama_cpp_probe": gates.llama_cpp_probe(pair),
    }  # fmt: skip


def _added(old: Side, new: Side) -> list[int]:
    """Ids that only the extended tokenizer has."""
    return sorted(set(new.tokenizer.get_vocab().values()) - set(old.tokenizer.get_vocab().values()))


def _change(old: Count, new: Count) -> Json:
    return {"before": old.rates(), "after": new.rates(), "reduction": round(1 - new.tokens / old.tokens, 5) if old.tokens else 0.0}


def _new_tokens(old: Side, new: Side, added: Sequence[int], used: set[int], rows: Sequence[Row]) -> Json:
    """How many new tokens are used, unreachable, fragments of characters, or shadows of what one base token says already."""
    texts = {i: new.base.bytes_of[i].decode("utf-8", "replace") if i in new.base.bytes_of else "" for i in added}
    whole = [i for i in added if "\ufffd" not in texts[i]]
    shadowed = [i for i, ids in zip(whole, gates.ids(old.tokenizer, [texts[i] for i in whole]), strict=True) if len(ids) == 1 and ids[0] != old.tokenizer.unk_token_id]
    by_id = {r.id: r for r in rows}
    pair = gates.Pair(old.base, old.tokenizer, new.tokenizer, [by_id.get(i) or Row(i, _spelled(new, i), new.base.bytes_of[i], None, []) for i in added])
    return {
        "count": len(added), "used_on_test": sum(i in used for i in added), "used_on_training": sum(r.train_count > 0 for r in rows) if rows else None,
        "unreachable": len(list(gates.reachable(pair, ()))), "shadowed": len(shadowed), "fragments": len(added) - len(whole),
    }  # fmt: skip


def _spelled(side: Side, i: int) -> str:
    return str(side.tokenizer.convert_ids_to_tokens(i))


def coverage(old: Side, new: Side, terms: Sequence[str]) -> Json | None:
    """How many terms are one token, and the mean number of tokens, before and after."""
    if not terms:
        return None
    lengths = [[len(i) for i in gates.ids(side.tokenizer, terms)] for side in (old, new)]
    single = [sum(n == 1 for n in found) for found in lengths]
    split = [term for term, n in zip(terms, lengths[1], strict=True) if n > 1]
    return {
        "terms": len(terms), "single_before": single[0], "single_after": single[1], "still_split": len(split), "examples_still_split": split[:20],
        "tokens_per_term_before": _ratio(sum(lengths[0]), len(terms)), "tokens_per_term_after": _ratio(sum(lengths[1]), len(terms)),
    }  # fmt: skip


def speed(old: Side, new: Side, texts: Sequence[tuple[str, str]]) -> dict[str, float]:
    """MB of text encoded per second of CPU time (other work on the machine does not count), and the ratio new / old."""
    sample, size = [], 0
    for _, text in texts:
        sample.append(text)
        size += len(text.encode())
        if size > _SPEED_BYTES:
            break
    seconds = fastest([side.tokenizer.backend_tokenizer for side in (old, new)], sample)
    rates = [size / 1e6 / s for s in seconds]
    return {"baseline_mb_per_s": round(rates[0], 2), "extended_mb_per_s": round(rates[1], 2), "ratio": round(rates[1] / rates[0], 3)}


def fastest(tokenizers: Sequence[Any], texts: Sequence[str], rounds: int = _SPEED_ROUNDS) -> list[float]:
    """CPU seconds that each `tokenizers.Tokenizer` takes for the texts.

    The texts go by in parts, each part through every tokenizer in turn, the whole several times; what counts is each part's best time. So a disturbance
    spoils one part of one round, and the library's cache of words works as it does on a long text.
    """
    parts = [texts[i : i + _SPEED_TEXTS] for i in range(0, len(texts), _SPEED_TEXTS)]
    best = [[float("inf")] * len(parts) for _ in tokenizers]
    for _ in range(rounds):
        for p, part in enumerate(parts):
            for n, tokenizer in enumerate(tokenizers):
                start = time.process_time()
                tokenizer.encode_batch_fast(list(part), add_special_tokens=False)
                best[n][p] = min(best[n][p], time.process_time() - start)
    return [max(1e-9, sum(times)) for times in best]


# --- the stage ----------------------------------------------------------------------------------------------------------------------------


def build(run: Run[TokenizerConfig]) -> dict[str, Any]:
    """Compare, and write the report as JSON, Markdown and HTML. Its speeds alone differ from run to run."""
    config, settings = run.config, run.config.evaluate
    extended, copies = Path(settings.extended_tokenizer or config.extended_tokenizer), run.work / ".tokenizers"
    gather(resolve(settings.baseline_tokenizer, config.huggingface) if settings.baseline_tokenizer else baseline.folder(config), copies / "baseline")
    gather(resolve(extended, config.huggingface), copies / "extended")
    old, new = opened(copies / "baseline"), opened(copies / "extended")
    tally = corpus.Tally()
    texts = list(texts_of(settings, config.below("corpus").folder / corpus.HELD_OUT, tally))
    if not texts:
        raise SopError("no text to compare on", where=", ".join(map(str, settings.test_corpus)), fix="give a text or JSONL file with --test_corpus", code=DATA)
    console.note(f"comparing {len(old.tokenizer)} with {len(new.tokenizer)} tokens on {len(texts)} texts")
    terms = [t for t, _ in select.lexicon(settings.lexicon)] if settings.lexicon else []
    rows = read_plan(extended / select.PLAN) if (extended / select.PLAN).is_file() else []
    found = compare(old, new, texts, rows, terms) | {"curve": _curve(extended), "rows": tally.stats(), "speed": speed(old, new, texts)}
    samples = report.samples(texts, settings.samples)
    pictures = [report.Picture(source, *(report.spans(side.encode([text])[0], text) for side in (old, new))) for source, text in samples]
    (run.work / "report.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (run.work / "report.md").write_text(report.markdown(found), encoding="utf-8")
    (run.work / "report.html").write_text(
        report.html(found, pictures, min(set(new.tokenizer.get_vocab().values()) - set(old.tokenizer.get_vocab().values()), default=None)), encoding="utf-8"
    )
    return _stats(found)


def _curve(folder: Path) -> list[dict[str, float]]:
    """The held-out reduction at smaller N as the plan measured it, where the folder has a plan of ours."""
    path = folder / EXPANSION
    return list(json.loads(path.read_text(encoding="utf-8")).get("curve", [])) if path.is_file() else []


def _stats(found: Json) -> Json:
    whole = found["all"]
    return {
        "tokens_per_char_before": whole["before"]["tokens_per_char"], "tokens_per_char_after": whole["after"]["tokens_per_char"], "reduction": whole["reduction"],
        "unk_rate_before": whole["before"]["unk_rate"], "unk_rate_after": whole["after"]["unk_rate"], "sources": {k: v["reduction"] for k, v in found["sources"].items()},
        "changed_regression_lines": found["changed_regression_lines"], "new_tokens": found["new_tokens"], "moved": len(found["moved"]),
        "round_trip_faults": len(found["round_trip_faults"]), "lexicon": found["lexicon"], "llama_cpp_probe_same": found["llama_cpp_probe"]["same"], "speed": found["speed"],
        "rows": found["rows"],
    }  # fmt: skip


def inputs(config: TokenizerConfig) -> Mapping[str, Path | None]:
    """Both tokenizers' files, the text, the lexicon."""
    settings = config.evaluate
    extended = settings.extended_tokenizer or str(config.extended_tokenizer)
    if not settings.extended_tokenizer and not (Path(extended) / "tokenizer.json").is_file():
        raise SopError("no extended tokenizer here yet", where=extended, fix="run first: sop tokenizer extend (or give --extended_tokenizer)")
    out: dict[str, Path | None] = {}
    for name, folder in (("baseline", settings.baseline_tokenizer or str(baseline.folder(config))), ("extended", extended)):
        found = local(folder)
        out |= {f"{name} {p.name}": p for p in (*tokenizer_files(found), found / select.PLAN, found / EXPANSION) if p.is_file()} if found else {}
    paths = settings.test_corpus or (config.below("corpus").folder / corpus.HELD_OUT,)
    return out | {f"text {n}": p for n, p in enumerate(paths)} | {"lexicon": settings.lexicon}


def _earlier(config: TokenizerConfig) -> Iterator[Stage[TokenizerConfig]]:
    if not config.evaluate.baseline_tokenizer:
        yield baseline.STAGE
    if not config.evaluate.test_corpus:
        yield corpus.STAGE


def summary(done: Artifact) -> list[str]:
    """The table, and where the report lies."""
    found = json.loads((done.path / "report.json").read_text(encoding="utf-8"))
    for title, header, rows in report.tables(found):
        console.table(title, header, rows)
    return [f"report: {done.path / 'report.html'} (also .md, .json)"]


def _output(config: TokenizerConfig) -> Target:
    return Target(config.evaluate.output_dir) if config.evaluate.output_dir else config.below("evaluation")


STAGE = TokenizerStage(
    name="tokenizer.evaluate", version=3, config=TokenizerConfig, output=_output, build=build, inputs=inputs, uses=("evaluate",),
    earlier=_earlier, summary=summary, next=lambda c: "",
)  # fmt: skip


def run(config: TokenizerConfig) -> Artifact:
    """Compare two tokenizers."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop tokenizer evaluate`."""
    return stage_main(STAGE, argv)
