"""Values for the rows of new tokens, out of the rows of the pieces that the base tokenizer wrote them in."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DATA, SopError
from ..train.encoding import batches

Weighting = Literal["mean", "last", "first"]
Init = Literal["random", "library", "mean_of_pieces", "weighted", "count_bias", "calibrated"]
_RIDGE = 1e-2  # share of the mean variance that is added to the diagonal
_MOST = 2.0  # nats by which a calibration moves a token at most


def read_plan(path: Path | None) -> dict[int, dict[str, Any]]:
    """The rows of `plan.jsonl` by token id; empty where there is none."""
    if path is None or not path.is_file():
        return {}
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    return {row["id"]: row for row in rows}


def pieces_of(base: Any, extended: Any, ids: Iterable[int], plan: Mapping[int, Mapping[str, Any]]) -> list[list[int]]:
    """For each new id, the base tokenizer's ids of the same bytes: as the plan says, else computed here.

    Raises:
        SopError: where a piece is no token of the base tokenizer.
    """
    added, model = extended.added_tokens_decoder, base.backend_tokenizer.model
    whole_text = type(model).__name__ == "WordPiece"
    out, rows = [], len(base)
    for i in ids:
        row = plan.get(i)
        token = extended.convert_ids_to_tokens(i)
        if row and row.get("pieces"):
            pieces = [int(p) for p in row["pieces"]]
        elif i in added or whole_text:
            pieces = list(base(added[i].content if i in added else token.removeprefix("##"), add_special_tokens=False)["input_ids"])
        else:
            pieces = [t.id for t in model.tokenize(token)]
        if any(not 0 <= p < rows for p in pieces):
            what = f"new token {i} ({token!r}) is written in ids that the base tokenizer does not have: {pieces}"
            raise SopError(what, fix="extend and resize with the same base tokenizer", code=DATA)
        out.append(pieces)
    return out


def before_expansion(extended: Any, new: range) -> Any:
    """The base of an extended tokenizer: without the ids `new`, and without the merges that lead to or through them."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    data = json.loads(extended.backend_tokenizer.to_str())
    model = data["model"]
    vocabulary = model["vocab"]
    model["vocab"] = {t: i for t, i in vocabulary.items() if i not in new} if isinstance(vocabulary, dict) else [row for i, row in enumerate(vocabulary) if i not in new]
    if "merges" in model:
        model["merges"] = [(left, right) for left, right in model["merges"] if {left, right, left + right} <= model["vocab"].keys()]
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] not in new]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))


# --- mixing rows --------------------------------------------------------------------------------------------------------------------------


def mix(table: Any, pieces: Sequence[Sequence[int]], weighting: Weighting) -> Any:
    """Weighted means of rows, fp32 `[len(pieces), width]`.

    `mean`: all pieces alike; `last`: piece k of n has weight k (the reader has just seen the end of the token);
    `first`: the first piece alone (the writer decides on the beginning). A token without pieces gets the mean of all rows.
    """
    import torch

    out = torch.empty(len(pieces), table.shape[1], dtype=torch.float32)
    everything = None
    for i, ids in enumerate(pieces):
        if not ids:
            everything = table.float().mean(0) if everything is None else everything
            out[i] = everything
            continue
        rows = table[list(ids)].float()
        if weighting == "mean":
            out[i] = rows.mean(0)
        elif weighting == "first":
            out[i] = rows[0]
        else:
            weights = torch.arange(1, len(ids) + 1, dtype=torch.float32)
            out[i] = (weights / weights.sum()) @ rows
    return out


@dataclass(frozen=True)
class NewRows:
    """Rows of the new tokens: input `[new, width]`, output `[new, width]` (None where tied), output bias `[new]` (None where there is none)."""

    input: Any
    output: Any
    bias: Any


_WEIGHTINGS: dict[str, tuple[Weighting, Weighting]] = {
    "mean_of_pieces": ("mean", "mean"),
    "weighted": ("last", "first"),
    "count_bias": ("last", "first"),
    "calibrated": ("last", "first"),
}


@dataclass(frozen=True)
class Tables:
    """The old rows of a model, `[old, width]`; `output` is None where tied, `bias` `[old, 1]` None where the output layer has none."""

    input: Any
    output: Any
    bias: Any
    scale: float

    @classmethod
    def of(cls, model: Any, old: int) -> Tables:
        table, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings()
        tied = head is None or head.weight.data_ptr() == table.data_ptr()
        bias = getattr(head, "bias", None)
        scale = getattr(model.config.get_text_config(), "initializer_range", 0.02)
        return cls(table[:old], None if tied else head.weight.detach()[:old], None if bias is None else bias.detach()[:old, None], scale)


def plain_rows(tables: Tables, n: int, init: Literal["random", "library"], seed: int) -> NewRows:
    """Rows that know nothing of the token: N(0, initializer_range), or the mean of all rows (the library's default but for its noise of 1e-9)."""
    import torch

    source = torch.Generator().manual_seed(seed)

    def rows(table: Any) -> Any:
        if table is None:
            return None
        return torch.randn(n, table.shape[1], generator=source) * tables.scale if init == "random" else table.float().mean(0).expand(n, -1)

    bias = None if tables.bias is None else torch.zeros(n) if init == "random" else tables.bias.float().mean().expand(n)
    return NewRows(rows(tables.input), rows(tables.output), bias)


def mixed_rows(tables: Tables, pieces: Sequence[Sequence[int]], init: Literal["mean_of_pieces", "weighted", "count_bias", "calibrated"]) -> NewRows:
    """Rows out of the rows of the pieces; the bias itself is added by `add_count_bias` or `calibration` and `shifted`.

    A tied row is read and predicted with: of the measured choices the plain mean serves both best, and the count bias leaves it so.
    """
    to_read, to_write = _WEIGHTINGS[init]
    if tables.output is None and init in ("count_bias", "calibrated"):
        to_read = "mean"
    output = None if tables.output is None else mix(tables.output, pieces, to_write)
    return NewRows(mix(tables.input, pieces, to_read), output, None if tables.bias is None else mix(tables.bias, pieces, to_write)[:, 0])


def add_count_bias(rows: NewRows, pieces: Sequence[Sequence[int]], counts: Counts, strength: float, direction: Any) -> NewRows:
    """Make a token as much less likely than its first piece as it is rarer: on the output bias, else along `direction` of the output rows.

    Args:
        strength: factor of log(uses of the token / uses of its first piece); 0.5 was best on held-out text.
        direction: `[width]`, u with u.h about 1 for the states that the output layer sees; not used where there is an output bias.
    """
    import torch

    return shifted(rows, strength * torch.tensor(counts.log_ratios(pieces), dtype=torch.float32), direction)


def shifted(rows: NewRows, shift: Any, direction: Any) -> NewRows:
    """Rows whose logits are higher by `shift` `[new]` nats: on the output bias, else along `direction` (see `add_count_bias`)."""
    if rows.bias is not None:
        return NewRows(rows.input, rows.output, rows.bias + shift)
    moved = shift[:, None] * direction.float()
    return NewRows(rows.input + moved, None, None) if rows.output is None else NewRows(rows.input, rows.output + moved, None)


# --- count bias ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Uses of each new token (in order) in extended text, and of each base id in base text."""

    new: Sequence[int]
    base: Mapping[int, int]

    def log_ratios(self, pieces: Sequence[Sequence[int]]) -> list[float]:
        """b_t = log(uses of t / uses of its first piece): how much rarer the token is than what it begins with; 0 where nothing is known."""
        out = []
        for uses, ids in zip(self.new, pieces, strict=True):
            first = self.base.get(ids[0], 0) if ids else 0
            out.append(min(0.0, math.log((uses + 0.5) / (first + 0.5))) if first else 0.0)
        return out


def count_text(base: Any, extended: Any, ids: range, texts: Iterable[str]) -> Counts:
    """Count uses in a text: of new ids as the extended tokenizer writes it, of base ids as the base tokenizer writes it."""
    new: Counter[int] = Counter()
    old: Counter[int] = Counter()
    for batch in batches(texts, str):
        for encoded in extended(batch, add_special_tokens=False)["input_ids"]:
            new.update(i for i in encoded if i in ids)
        for encoded in base(batch, add_special_tokens=False)["input_ids"]:
            old.update(encoded)
    return Counts([new[i] for i in ids], old)


def count_plan(plan: Mapping[int, Mapping[str, Any]], ids: range, pieces: Sequence[Sequence[int]]) -> Counts:
    """Without a text: the plan's training counts; a first piece counts as often as the new tokens that begin with it."""
    new = [int(plan.get(i, {}).get("train_count", 0)) for i in ids]
    first: Counter[int] = Counter()
    for uses, of in zip(new, pieces, strict=True):
        if of:
            first[of[0]] += uses
    return Counts(new, first)


def output_direction(model: Any, tokenizer: Any, texts: Sequence[str], *, max_tokens: int = 8192, length: int = 128) -> Any:
    """u `[width]` with u.h about 1 for the states h before the output layer: ridge regression of 1 on the states of `texts`."""
    moments = _Moments(model)
    for _ in moments.read(_chunks(tokenizer, texts, length), max_tokens):
        pass
    return moments.direction()


def calibration(model: Any, tokenizer: Any, texts: Sequence[str], ids: range, uses: Sequence[int], *, max_tokens: int = 8192, length: int = 256) -> tuple[Any, Any]:
    """What makes a grown causal model predict each new token as often, in sum over a text, as it occurs: `(shift [new], u [width])` for `shifted`.

    One round of matching first moments: log(uses that the text has / uses that the model expects), at most 2 nats either way. No weight is trained.

    Args:
        tokenizer: the extended tokenizer.
        texts: training text; the beginnings of evenly spread documents are read.
        uses: uses of each new token in the whole training text.
    """
    import torch

    step = max(1, len(texts) * length // max_tokens)
    beginnings = (chunk for text in texts[::step] for chunk in [next(_chunks(tokenizer, [text], length), [])] if len(chunk) > 1)
    moments, expected, found = _Moments(model), torch.zeros(len(ids), dtype=torch.float64), 0
    for chunk, logits in moments.read(beginnings, max_tokens):
        expected += torch.softmax(logits[:-1].float(), 1)[:, ids.start : ids.stop].double().sum(0).cpu()
        found += sum(i in ids for i in chunk[1:])
    wanted = torch.tensor(uses, dtype=torch.float64)
    wanted = wanted * (found / max(1.0, float(wanted.sum())))
    return torch.log((wanted + 0.5) / (expected + 0.5)).clamp(-_MOST, _MOST).float(), moments.direction()


class _Moments:
    """Second and first moments of the states that the output layer of a model sees."""

    def __init__(self, model: Any) -> None:
        import torch

        self.model, self.seen = model, 0
        width = model.get_output_embeddings().weight.shape[1]
        self.gram, self.total = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)

    def read(self, chunks: Iterable[list[int]], max_tokens: int) -> Iterator[tuple[list[int], Any]]:
        """Run the model on chunks of ids until `max_tokens`; yields each with its logits `[len, rows]`."""
        import torch

        states: list[Any] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda module, args: states.append(args[0].detach()))
        try:
            for ids in chunks:
                with torch.inference_mode():
                    logits = self.model(input_ids=torch.tensor([ids], device=self.model.device), **_decoder(self.model, ids)).logits[0]
                    h = states.pop().reshape(-1, len(self.total)).double().cpu()
                    self.gram, self.total, self.seen = self.gram + h.T @ h, self.total + h.sum(0), self.seen + len(h)
                yield ids, logits
                if self.seen >= max_tokens:
                    break
        finally:
            hook.remove()

    def direction(self) -> Any:
        """u with u.h about 1.

        Raises:
            SopError: where nothing was read.
        """
        import torch

        if not self.seen:
            raise SopError("no text to fit the bias of the new rows on", fix="run the corpus stage first, or choose resize.init=mean_of_pieces", code=DATA)
        ridge = torch.eye(len(self.total), dtype=torch.float64) * (_RIDGE * self.gram.trace() / len(self.total))
        return torch.linalg.solve(self.gram + ridge, self.total).float().clone()


def _decoder(model: Any, ids: list[int]) -> dict[str, Any]:
    import torch

    return {"decoder_input_ids": torch.tensor([ids], device=model.device)} if model.config.is_encoder_decoder else {}


def _chunks(tokenizer: Any, texts: Iterable[str], length: int) -> Iterator[list[int]]:
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        yield from (ids[i : i + length] for i in range(0, len(ids), length))
