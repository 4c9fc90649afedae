"""`sop tokenizer select`: choose new tokens by what each saves on held-out text, and write down why (`plan.jsonl`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import console
from ..errors import DATA, SopError
from ..stage import Artifact, Run, Stage, stage_main
from . import baseline, corpus, methods, train
from .base import Base
from .earlier import TokenizerStage
from .methods import Corpus, Terms
from .plan import Row, write_plan
from .script import HAN_RUN
from .settings import SelectionConfig, TokenizerConfig

if TYPE_CHECKING:
    import numpy as np

PLAN = "plan.jsonl"
CURVE = "curve.json"
WINDOW = 100  # rows whose mean gain the stopping rule looks at
HELD_OUT_CHARS = 5_000_000  # gains are measured on so much held-out text at most
_ROUNDS = 4


def candidates_from(config: TokenizerConfig, base: Base) -> Terms:
    """Terms of the lexicon and of the auxiliary tokenizer, where the method lets them compete."""
    if methods.method_of(base, config.selection) != "added_tokens":
        return ()
    out: list[tuple[str, str]] = []
    if config.selection.lexicon:
        out += [(term, "lexicon") for term, _ in lexicon(config.selection.lexicon)]
    model = config.below("aux").folder / train.MODEL
    if model.is_file():
        out += [(run, "auxiliary") for piece, _ in train.pieces(model) for run in HAN_RUN.findall(piece)]
    return out


def lexicon(path: Path) -> list[tuple[str, float]]:
    """Terms with frequencies: one per line, `term` or `term<TAB>frequency`.

    Raises:
        SopError: for a frequency that is no number.
    """
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        term, _, frequency = line.strip().partition("\t")
        if not term.strip():
            continue
        try:
            out.append((term.strip(), float(frequency) if frequency.strip() else 1.0))
        except ValueError:
            raise SopError(f"the frequency {frequency!r} is no number", where=f"{path}:{number}", fix="write term<TAB>frequency", code=DATA) from None
    return out


# --- choosing -----------------------------------------------------------------------------------------------------------------------------


def choose(base: Base, training: Corpus, held_out: Corpus, settings: SelectionConfig, terms: Terms = ()) -> tuple[list[Row], dict[str, Any]]:
    """The plan, and what was measured: `curve` (reduction on held-out text after each 100 rows), base token counts.

    Raises:
        SopError: where nothing is worth a token.
    """
    limit = settings.new_tokens or settings.max_new_tokens
    spare = 0 if base.kind == "wordpiece" else limit // 5  # rows to replace others with; where tokens are independent there is nothing to replace
    rows = used_enough(base, methods.propose(base, training, settings, limit + spare, terms), training, settings.min_freq)
    total = float(methods.tokens(base.tokenizer, held_out).sum())
    if not rows or not total:
        raise SopError("no candidate is used often enough", fix="lower selection.min_freq, or give more Chinese text (corpus.inputs)", code=DATA)
    wanted = settings.new_tokens or stop(methods.gains(base, rows[:limit], held_out), total, settings.min_gain)
    if settings.new_tokens and len(rows) < settings.new_tokens:
        console.warn(f"the corpus supports {len(rows)} new tokens at min_freq {settings.min_freq}, not {settings.new_tokens}")
    if not wanted:
        what = f"no {WINDOW} candidates save {settings.min_gain} tokens each per million held-out tokens"
        raise SopError(what, fix="lower selection.min_gain, or set selection.new_tokens", code=DATA)
    rows, in_training = lean(base, rows, wanted, training, settings.max_unused)
    in_held_out = methods.counts(methods.appended(base, rows), held_out)
    for row, gain in zip(rows, methods.gains(base, rows, held_out), strict=True):
        row.gain, row.train_count, row.heldout_count = gain, float(in_training[row.id]), float(in_held_out[row.id])
    return rows, {"heldout_tokens_before": total, "heldout_tokens_after": float(in_held_out.sum()), "curve": curve([r.gain for r in rows], total)}


def used_enough(base: Base, rows: list[Row], training: Corpus, min_freq: int) -> list[Row]:
    """Drop rows that the training text uses less than `min_freq` times and that no kept row is built from; measured, in a few rounds."""
    for _ in range(_ROUNDS):
        uses = methods.uses(base, rows, training)
        parts = {part for r in rows for part in parts_of(r)}
        gone = {r.id for r in rows if uses[r.id] < min_freq and r.token not in parts}
        if not gone:
            break
        rows = methods.without(rows, gone, base.next_id)
    return rows


def parts_of(row: Row) -> list[str]:
    """The tokens that a row is built from."""
    return [part for merge in [*row.also, *([row.merge] if row.merge else [])] for part in merge]


def lean(base: Base, rows: list[Row], wanted: int, training: Corpus, max_unused: float) -> tuple[list[Row], np.ndarray]:
    """The first `wanted` rows, without the weakest of those families of rows whose root the training text never uses by itself; and all uses.

    A token that only serves to build longer ones is never trained. Its family is the row and everything built from it; those that save
    least for each row make room for later rows until at most `max_unused` of the rows are unused, or no later rows are left.
    """
    for last in range(_ROUNDS, 0, -1):
        head, spare = rows[:wanted], len(rows) - wanted
        uses = methods.uses(base, head, training)
        unused = [r for r in head if uses[r.id] == 0]
        excess = len(unused) - int(max_unused * wanted)
        if excess <= 0 or spare <= 0 or last == 1:
            break
        saved = {r.id: float(uses[r.id]) * (len(r.pieces) - 1) for r in head}
        families = [family(rows, r) for r in unused]
        families.sort(key=lambda ids: (sum(saved.get(i, 0.0) for i in ids) / len(ids), min(ids)))
        gone: set[int] = set()
        for ids in families[:excess]:
            gone |= ids if len(gone | ids) <= spare else set()
        if not gone:
            break
        rows = methods.without(rows, gone, base.next_id)
    return head, uses


def family(rows: Sequence[Row], root: Row) -> set[int]:
    """The ids of a row and of every row that is built from it."""
    tokens, out = {root.token}, {root.id}
    for row in rows:
        if row.id > root.id and tokens.intersection(parts_of(row)):
            tokens.add(row.token)
            out.add(row.id)
    return out


def stop(gains: Sequence[float], total: float, min_gain: float) -> int:
    """The number of rows before the first window of 100 whose mean gain per million held-out tokens is below `min_gain`."""
    for start in range(0, len(gains), WINDOW):
        window = gains[start : start + WINDOW]
        if sum(window) / len(window) * 1e6 / total < min_gain:
            return start
    return len(gains)


def curve(gains: Sequence[float], total: float) -> list[dict[str, float]]:
    """Held-out reduction after 100, 200, ... rows: any smaller N is a prefix of the plan."""
    out, saved = [], 0.0
    for n, gain in enumerate(gains, 1):
        saved += gain
        if n % WINDOW == 0 or n == len(gains):
            out.append({"tokens": n, "reduction": round(saved / total, 5), "gain_per_million": round(gain * 1e6 / total, 2)})
    return out


def mark(rows: Sequence[Row], terms: Sequence[tuple[str, float]]) -> None:
    """Name the lexicon as the source of the rows that write one of its terms."""
    named = {term for term, _ in terms}
    for row in rows:
        if row.text in named:
            row.source = "lexicon"


def held_out_text(path: Path, most: int = HELD_OUT_CHARS) -> Corpus:
    """The held-out corpus, unweighted, up to `most` characters."""

    def texts() -> Iterator[tuple[str, float]]:
        left = most
        for document in corpus.documents(path):
            if left <= 0:
                return
            yield document.text, 1.0
            left -= len(document.text)

    return Corpus(texts)


def training_text(path: Path, max_samples: int | None, terms: Sequence[tuple[str, float]] = (), share: float = 0.0) -> Corpus:
    """The training corpus with its weights, and behind it terms as often as their frequencies say, scaled to `share` of all characters."""

    def texts() -> Iterator[tuple[str, float]]:
        chars = 0.0
        for d in console.track(corpus.documents(path, max_samples), "reading the training text", unit="documents"):
            chars += d.weight * len(d.text)
            yield d.text, d.weight
        wanted, given = chars * share / (1 - share), sum(len(term) * frequency for term, frequency in terms)
        yield from ((term, frequency * wanted / given) for term, frequency in terms if frequency > 0)

    return Corpus(texts)


# --- the stage ----------------------------------------------------------------------------------------------------------------------------


def build(run: Run[TokenizerConfig]) -> dict[str, Any]:
    """Propose, prune, measure, stop."""
    config, settings = run.config, run.config.selection
    base = baseline.opened(config)
    method = methods.method_of(base, settings)
    console.note(f"choosing tokens for a {base.kind} tokenizer of {base.size} tokens by {method}")
    folder = config.below("corpus").folder
    terms = lexicon(settings.lexicon) if settings.lexicon and method != "added_tokens" else []
    training, held_out = training_text(folder / corpus.TRAIN, settings.max_samples, terms, settings.lexicon_share), held_out_text(folder / corpus.HELD_OUT)
    rows, measured = choose(base, training, held_out, settings, candidates_from(config, base))
    mark(rows, terms)
    write_plan(run.work / PLAN, rows)
    (run.work / CURVE).write_text(json.dumps(measured["curve"], indent=1) + "\n", encoding="utf-8")
    before, after = measured["heldout_tokens_before"], measured["heldout_tokens_after"]
    return {
        "method": method, "tokens": len(rows), "heldout_tokens_before": before, "heldout_tokens_after": after, "reduction": round(1 - after / before, 5),
        "reduction_by_gains": measured["curve"][-1]["reduction"], "unused_on_training": sum(r.train_count == 0 for r in rows),
        "unused_on_heldout": sum(r.heldout_count == 0 for r in rows), "fragments": sum(r.fragment for r in rows),
        "sources": {s: sum(r.source == s for r in rows) for s in sorted({r.source for r in rows})},
    }  # fmt: skip


def _needs_auxiliary(config: TokenizerConfig) -> bool:
    """The auxiliary tokenizer is a source of candidates for added tokens alone; the kind of a local base is known without loading it."""
    if config.selection.method != "auto":
        return config.selection.method == "added_tokens"
    record = config.below("baseline").folder / baseline.RECORD
    return record.is_file() and json.loads(record.read_text(encoding="utf-8"))["kind"] == "wordpiece"


def _earlier(config: TokenizerConfig) -> Iterator[Stage[TokenizerConfig]]:
    yield baseline.STAGE
    yield corpus.STAGE
    if _needs_auxiliary(config):  # asked after the baseline has been recorded
        yield train.STAGE


def inputs(config: TokenizerConfig) -> Mapping[str, Path | None]:
    """Baseline, corpus, and where they take part the auxiliary tokenizer and the lexicon."""
    aux = config.below("aux").folder / train.MODEL
    found: dict[str, Path | None] = {"baseline": baseline.folder(config), "corpus": config.below("corpus").folder}
    return found | {"auxiliary": aux if _needs_auxiliary(config) else None, "lexicon": config.selection.lexicon}


def summary(done: Artifact) -> list[str]:
    """What the plan does."""
    s = done.stats
    used = f"unused: {s['unused_on_training']} on training text, {s['unused_on_heldout']} on held-out text"
    return [f"{s['tokens']} new tokens ({s['method']}): held-out tokens {s['heldout_tokens_before']:,.0f} -> {s['heldout_tokens_after']:,.0f} (-{s['reduction']:.1%}); {used}"]


STAGE = TokenizerStage(
    name="tokenizer.select", version=1, config=TokenizerConfig, output=lambda c: c.below("selection"), build=build, inputs=inputs, uses=("selection",),
    earlier=_earlier, summary=summary, next=lambda c: "sop tokenizer extend",
)  # fmt: skip


def run(config: TokenizerConfig) -> Artifact:
    """Choose the new tokens."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop tokenizer select`."""
    return stage_main(STAGE, argv)
