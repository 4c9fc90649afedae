"""Does the export answer as the trained model does? Measured on a fixed probe set; what is out of bounds is not published.

Both sides get the same token ids (teacher forcing), so one early difference does not hide what follows. The source writes the answers greedily; at each of their
tokens the export's logits are compared with the source's: largest difference, Kullback-Leibler divergence in nats, and whether both put the same token first.
A disagreement counts where the source itself was decided: its two largest logits differ by more than `margin`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..artifact import write_atomic
from ..config import option
from ..errors import DATA, SopError

if TYPE_CHECKING:
    import numpy as np

    from .probes import Probes

REPORT = "parity.json"
FAILED = "parity.failed.json"  # as a hidden file beside the artifact: no part of it
_SHOWN = 3  # texts that are tokenised differently, in the report
Kind = Literal["f32", "f16", "bf16", "q8", "q5", "q4", "low"]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a kind of export may differ by."""

    agreement: float = option(help="smallest share of answer tokens that both put first")
    kl: float = option(help="largest mean Kullback-Leibler divergence of the next-token distributions, nats")
    bits: float = option(help="largest relative rise of bits per byte (0.01: 1 %)")
    logits: float | None = option(None, "largest difference of any logit, as a share of the source's largest; none: not looked at")

    def __post_init__(self) -> None:
        if not 0 <= self.agreement <= 1 or min(self.kl, self.bits, self.logits or 0) < 0:
            raise ValueError("needs 0 <= agreement <= 1, kl >= 0, bits >= 0, logits >= 0")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """By the bits that a weight has."""

    f32: Bound = option(factory=lambda: Bound(agreement=1.0, kl=1e-5, bits=0.001, logits=0.005))
    f16: Bound = option(factory=lambda: Bound(agreement=1.0, kl=1e-3, bits=0.01, logits=0.01))
    bf16: Bound = option(factory=lambda: Bound(agreement=0.98, kl=5e-3, bits=0.01, logits=0.1))
    q8: Bound = option(factory=lambda: Bound(agreement=0.95, kl=0.01, bits=0.02))
    q5: Bound = option(factory=lambda: Bound(agreement=0.85, kl=0.1, bits=0.05))
    q4: Bound = option(factory=lambda: Bound(agreement=0.75, kl=0.3, bits=0.10))
    low: Bound = option(factory=lambda: Bound(agreement=0.4, kl=1.5, bits=0.50))


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How source and export are compared."""

    prompts: int = option(32, "conversations that are answered (at most the 32 that ship)")
    tokens: int = option(32, "tokens of each answer, written greedily by the source")
    lines: int = option(1000, "mixed lines that both tokenizers must give the same ids for")
    margin: float = option(0.05, "a disagreement counts where the source's two largest logits differ by more than this")
    heldout: Path | None = option(None, "held-out text for bits per byte; none: the passages of the probe set", path="input")
    heldout_chars: int = option(8000, "so many characters of it, whole documents")
    bounds: Bounds = option(factory=Bounds)

    def __post_init__(self) -> None:
        if not 1 <= self.prompts <= 32 or self.tokens < 1 or self.lines < 0 or self.margin < 0:
            raise ValueError("needs 1 <= prompts <= 32, tokens >= 1, lines >= 0, margin >= 0")


class Side(Protocol):
    """A model that can be asked: the source, or an export."""

    name: str

    def template(self) -> str | None:
        """The chat template that lies beside or in the weights, byte for byte."""

    def vocabulary(self) -> int:
        """Rows of the output layer."""

    def encode(self, texts: Sequence[str], *, control: bool) -> list[list[int]]:
        """Ids of each text without anything added; `control`: control tokens are recognised."""

    def stops(self, token: int) -> bool:
        """Whether generation ends at this token."""

    def logits(self, ids: Sequence[int], first: int) -> np.ndarray:
        """`[len(ids) - first, vocabulary]` float32: what follows each id from position `first` on."""


class Source(Side, Protocol):
    """The trained model, through the one rendering."""

    def prompt(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[int]]:
        """Text and ids of a conversation up to where the model speaks."""

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Greedy continuations, each exactly `tokens` long (end tokens do not end them)."""

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""

    def start(self) -> list[int]:
        """What a document begins after: one id, or none."""


@dataclass(frozen=True)
class Asked:
    """One answer: prompt and answer ids, and where the source's logits `[answer, vocabulary]` lie."""

    text: str
    prompt: list[int]
    answer: list[int]
    logits: Path


@dataclass(frozen=True)
class Reference:
    """What the source says; made once, for any number of exports."""

    name: str
    template: str | None
    vocabulary: int
    asked: list[Asked]
    lines: list[tuple[str, list[int]]]
    stop_ids: list[int]
    texts: list[tuple[int, list[int], float]]  # bytes, ids with the start token, nats


def refer(source: Source, probes: Probes, texts: Sequence[str], tokens: int, folder: Path) -> Reference:
    """Ask the source everything once; its logits go to files in `folder` (4 bytes x vocabulary per answer token)."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    prompts = [source.prompt(list(c)) for c in probes.conversations]
    answers = source.answers([ids for _, ids in prompts], tokens)
    asked = []
    for i, ((text, prompt), answer) in enumerate(zip(prompts, answers, strict=True)):
        path = folder / f"{i}.npy"
        np.save(path, source.logits([*prompt, *answer[:-1]], len(prompt) - 1))
        asked.append(Asked(text, prompt, answer, path))
    start = source.start()
    encoded = [[*start, *ids] for ids in source.encode(texts, control=False)]
    scored = [(len(t.encode()), ids, _nats(source, ids)) for t, ids in zip(texts, encoded, strict=True)]
    lines = list(zip(probes.lines, source.encode(probes.lines, control=False), strict=True))
    return Reference(source.name, source.template(), source.vocabulary(), asked, lines, source.stop_ids(), scored)


def _nats(side: Side, ids: Sequence[int]) -> float:
    """Nats of all but the first id."""
    import numpy as np

    if len(ids) < 2:
        return 0.0
    table = _log_softmax(side.logits(ids[:-1], 0))
    return float(-table[np.arange(len(ids) - 1), list(ids[1:])].sum())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


# --- measuring an export --------------------------------------------------------------------------------------------------------------------


def measure(reference: Reference, export: Side, margin: float) -> dict[str, Any]:
    """What differs, in numbers; where the two cannot be compared at all (another vocabulary), only that."""
    found: dict[str, Any] = {
        "source": reference.name, "export": export.name, "same_template": export.template() == reference.template,
        "vocabulary": [reference.vocabulary, export.vocabulary()], **_tokenizers(reference, export),
        "stop_tokens_missing": [i for i in reference.stop_ids if not export.stops(i)],
    }  # fmt: skip
    return found if reference.vocabulary != export.vocabulary() else {**found, **_answers(reference, export, margin), **_bits(reference, export)}


def _tokenizers(reference: Reference, export: Side) -> dict[str, Any]:
    prompts = list(_retokenised([(a.text, a.prompt) for a in reference.asked], export, control=True))
    lines = list(_retokenised(reference.lines, export, control=False))
    return {
        "prompts": len(reference.asked), "prompts_tokenised_differently": len(prompts),
        "lines": len(reference.lines), "lines_tokenised_differently": len(lines), "first_differences": [*prompts, *lines][:_SHOWN],
    }  # fmt: skip


def _retokenised(texts: Sequence[tuple[str, list[int]]], export: Side, *, control: bool) -> Iterator[dict[str, Any]]:
    """The texts that the export tokenises differently, with the ids of both."""
    for (text, ids), other in zip(texts, export.encode([t for t, _ in texts], control=control), strict=True):
        if other != ids:
            yield {"text": text[:80], "source": ids[:24], "export": other[:24]}


def _answers(reference: Reference, export: Side, margin: float) -> dict[str, Any]:
    import numpy as np

    divergence, difference, largest, agreed, tokens, undecided = 0.0, 0.0, 0.0, 0, 0, 0
    worst: dict[str, Any] = {}
    for asked in reference.asked:
        source = np.load(asked.logits)
        other = export.logits([*asked.prompt, *asked.answer[:-1]], len(asked.prompt) - 1)
        p, q = _log_softmax(source), _log_softmax(other)
        each = (np.exp(p) * (p - q)).sum(axis=-1)
        two = np.partition(source, -2, axis=-1)[:, -2:]
        same, close = source.argmax(axis=-1) == other.argmax(axis=-1), two[:, 1] - two[:, 0] <= margin
        agreed, undecided, tokens = agreed + int((same | close).sum()), undecided + int((~same & close).sum()), tokens + len(each)
        divergence, largest = divergence + float(each.sum()), max(largest, float(np.abs(source).max()))
        difference = float(np.fmax(difference, np.abs(source - other).max())) if np.isfinite(other).all() else math.inf
        if not worst or float(each.mean()) > worst["kl"] or not math.isfinite(float(each.mean())):
            worst = {"prompt": asked.text[-80:], "kl": float(each.mean())}
    return {
        "answer_tokens": tokens, "agreement": agreed / tokens, "undecided": undecided, "kl": divergence / tokens,
        "largest_logit_difference": difference, "largest_logit": largest, "worst": worst,
    }  # fmt: skip


def _bits(reference: Reference, export: Side) -> dict[str, Any]:
    size = sum(n for n, _, _ in reference.texts) * math.log(2)
    if not size:
        return {}
    source, other = sum(nats for _, _, nats in reference.texts) / size, sum(_nats(export, ids) for _, ids, _ in reference.texts) / size
    return {"bits_per_byte": {"source": source, "export": other, "change": other / source - 1}}


# --- judging ------------------------------------------------------------------------------------------------------------------------------------


def violations(measured: dict[str, Any], bound: Bound) -> list[str]:
    """Why an export may not be published, in words; empty where it may."""
    return list(_violations(measured, bound))


def _violations(found: dict[str, Any], bound: Bound) -> Iterator[str]:
    source, export = found["vocabulary"]
    if not found["same_template"]:
        yield "its chat template is not the one that was trained with"
    if source != export:
        yield f"its output layer has {export:,} rows, the source's {source:,}"
    for what in ("prompts", "lines"):
        if found[f"{what}_tokenised_differently"]:
            yield f"{found[f'{what}_tokenised_differently']} of {found[what]} {what} are tokenised differently"
    if found["stop_tokens_missing"]:
        yield f"it does not stop at the tokens {found['stop_tokens_missing']}"
    if "agreement" in found:
        if not found["agreement"] >= bound.agreement:
            yield f"it agrees on {found['agreement']:.2%} of {found['answer_tokens']:,} answer tokens (at least {bound.agreement:.0%})"
        if not found["kl"] <= bound.kl:
            yield f"mean KL divergence {found['kl']:.2g} nats (at most {bound.kl:g})"
        share = found["largest_logit_difference"] / found["largest_logit"]
        if bound.logits is not None and not share <= bound.logits:
            yield f"a logit differs by {share:.2%} of the largest one (at most {bound.logits:.1%})"
    if "bits_per_byte" in found and not found["bits_per_byte"]["change"] <= bound.bits:
        yield f"bits per byte {found['bits_per_byte']['change']:+.2%} (at most {bound.bits:+.1%})"


def enforce(measured: dict[str, Any], bound: Bound, *, report: Path, failed: Path, allow: bool, fix: str = "") -> dict[str, Any]:
    """Write the report and return it. Out of bounds: it goes to `failed`, and the caller publishes nothing.

    Args:
        report: in the artifact's work folder, so that it becomes part of the artifact.
        failed: beside the artifact's place, for an export that is refused.
        allow: publish all the same, with the violations on record.

    Raises:
        SopError: exit 3 where a bound is exceeded and `allow` is off.
    """
    broken = violations(measured, bound)
    found = {**measured, "bound": dataclasses.asdict(bound), "violations": broken, "allowed": bool(broken) and allow}
    text = json.dumps(found, ensure_ascii=False, indent=1) + "\n"
    if broken and not allow:
        write_atomic(failed, text)
        what = "the export does not answer as its source does: " + "; ".join(broken)
        raise SopError(what, where=str(failed), fix=fix or "nothing was published; --allow_divergence publishes it with this on record", code=DATA)
    report.write_text(text, encoding="utf-8")
    failed.unlink(missing_ok=True)
    return found


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """What a manifest keeps of a report."""
    return {name: value for name, value in report.items() if name not in ("first_differences", "worst", "source", "export", "bound")}


def line(report: dict[str, Any]) -> str:
    """A report, or what a manifest keeps of it, in one line."""
    if "kl" not in report:
        return "parity: not comparable (" + "; ".join(report["violations"]) + ")"
    bits = report.get("bits_per_byte")
    shown = f"; bits per byte {bits['source']:.3f} -> {bits['export']:.3f} ({bits['change']:+.2%})" if bits else ""
    allowed = " — OUT OF BOUNDS, published because divergence was allowed" if report.get("allowed") else ""
    return f"parity: {report['agreement']:.2%} of {report['answer_tokens']:,} greedy tokens agree, KL {report['kl']:.1e} nats{shown}{allowed}"
