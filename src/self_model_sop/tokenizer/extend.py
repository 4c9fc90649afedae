"""`sop tokenizer extend`: append the chosen tokens to the base tokenizer. Nothing of the base is deleted, reordered or renumbered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import console
from ..artifact import Target
from ..errors import DATA, SopError
from ..stage import Artifact, Run, stage_main
from . import baseline, corpus, gates, methods, select
from .base import Base
from .earlier import TokenizerStage
from .plan import Row, read_plan, write_plan
from .settings import Json, TokenizerConfig

EXPANSION = "expansion.json"
REPORT = "gates.json"
_SAMPLE_DOCUMENTS = 500


def write(base: Base, rows: Sequence[Row], method: str, out: Path, curve: Sequence[Json] = ()) -> None:
    """A complete tokenizer folder: the base's files, the rows appended, `expansion.json` (with the N-curve) and the plan beside them."""
    methods.write(base, rows, out)
    first = base.next_id
    record = {"base_vocab_size": base.size, "new_ids": [first, first + len(rows)], "method": method, "tokens": len(rows), "curve": list(curve)}
    (out / EXPANSION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_plan(out / select.PLAN, rows)


def opened_pair(base: Base, rows: Sequence[Row], folder: Path, *, free: bool) -> gates.Pair:
    """Both tokenizers, loaded from their files as a trainer would."""
    from ..train.model import load_tokenizer

    return gates.Pair(base, load_tokenizer(base.folder), load_tokenizer(folder), rows, free)


def sample(path: Path) -> list[str]:
    """Lines of held-out documents for the gates."""
    found = (line for document in corpus.documents(path, _SAMPLE_DOCUMENTS) for line in document.text.split("\n")[:20])
    return [line for line in found if line.strip()]


def build(run: Run[TokenizerConfig]) -> dict[str, Any]:
    """Append, reload, check, measure."""
    config = run.config
    base = baseline.opened(config)
    rows = read_plan(config.below("selection").folder / select.PLAN)
    check_plan(base, rows)
    method = methods.method_of(base, config.selection)
    curve = json.loads((config.below("selection").folder / select.CURVE).read_text(encoding="utf-8"))
    write(base, rows, method, run.work, curve)
    pair = opened_pair(base, rows, run.work, free=config.selection.scope == "free")
    held_out = config.below("corpus").folder / corpus.HELD_OUT
    console.note(f"checking {len(rows)} new tokens on the reloaded files")
    texts = sample(held_out)
    passed = gates.check(pair, [*texts, *gates.without_chinese(texts)])
    report = {"gates": passed, "changed_regression_lines": gates.changed_lines(pair), "llama_cpp_probe": gates.llama_cpp_probe(pair)}
    (run.work / REPORT).write_text(gates.dump(report | {"special_ids": baseline.special_ids(pair.new)}), encoding="utf-8")
    return {"method": method, "tokens": len(rows), "base_tokens": base.size, "new_ids": [base.next_id, base.next_id + len(rows)], **report, **reduction(pair, held_out)}


def check_plan(base: Base, rows: Sequence[Row]) -> None:
    """The plan must have been made for this base.

    Raises:
        SopError: where its ids do not follow the base's.
    """
    if [r.id for r in rows] != list(range(base.next_id, base.next_id + len(rows))):
        what = f"the plan's ids begin at {rows[0].id if rows else '?'}, those behind the base at {base.next_id}"
        raise SopError(what, where=str(base.folder), fix="run the select stage again (sop tokenizer select --overwrite)", code=DATA)


def reduction(pair: gates.Pair, held_out: Path) -> dict[str, float]:
    """Tokens per character on the held-out text, before and after."""
    counted = select.held_out_text(held_out)
    chars = sum(len(text) for text, _ in counted.texts())
    before, after = (float(methods.tokens(t.backend_tokenizer, counted).sum()) for t in (pair.old, pair.new))
    return {"tokens_per_char_before": round(before / chars, 4), "tokens_per_char_after": round(after / chars, 4), "reduction": round(1 - after / before, 5)}


def inputs(config: TokenizerConfig) -> Mapping[str, Path]:
    """Base, plan, and the held-out text that the gates read."""
    below = config.below
    return {"baseline": baseline.folder(config), "plan": below("selection").folder, "held-out": below("corpus").folder / corpus.HELD_OUT}


def summary(done: Artifact) -> list[str]:
    """What changed, and what did not."""
    s = done.stats
    changed = ", ".join(f"{k} {v}" for k, v in s["changed_regression_lines"].items() if v) or "none"
    probe = "recognised as before" if s["llama_cpp_probe"]["same"] else "differs: export with the base's tokenizer.ggml.pre"
    return [
        f"{s['tokens']} tokens appended to {s['base_tokens']}; held-out tokens per character {s['tokens_per_char_before']} -> {s['tokens_per_char_after']} (-{s['reduction']:.1%})",
        f"gates passed: {', '.join(s['gates'])}",
        f"changed regression lines: {changed}; llama.cpp pre-tokenizer probe: {probe}",
    ]


STAGE = TokenizerStage(
    name="tokenizer.extend", version=1, config=TokenizerConfig, output=lambda c: Target(c.extended_tokenizer), build=build, inputs=inputs, uses=("selection",),
    earlier=lambda c: (baseline.STAGE, select.STAGE), plan=lambda c: [f"append tokens to {c.base_tokenizer}"], summary=summary, next=lambda c: "sop tokenizer resize",
)  # fmt: skip


def run(config: TokenizerConfig) -> Artifact:
    """Extend the base tokenizer."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop tokenizer extend`."""
    return stage_main(STAGE, argv)
