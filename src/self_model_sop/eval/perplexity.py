"""Negative log-likelihood of text: bits per byte and per character, comparable across vocabularies.

A document begins after one start token: bos where the tokenizer itself puts it in front of a text, else eos (what precedes a document in packed
pretraining), else bos; without either its first token is charged log(vocabulary size). The end of a document is not predicted. A document longer than
the window is read in windows that overlap by half, each token scored once, with at least half a window of context. Nothing crosses a document border.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import console
from ..errors import DATA, SopError
from ..train.encoding import batches, special_tokens_as_text
from .models import context_length

_LOGITS_PER_CHUNK = 1 << 25  # fp32 logits held at once (128 MiB), whatever the vocabulary


@dataclass(frozen=True)
class Bits:
    """What a text cost: nats over `tokens` predicted tokens that write `chars` characters in `bytes` bytes of UTF-8."""

    nll_nats: float = 0.0
    tokens: int = 0
    chars: int = 0
    bytes: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.nll_nats / math.log(2) / self.bytes

    @property
    def bits_per_char(self) -> float:
        return self.nll_nats / math.log(2) / self.chars

    @property
    def tokens_per_char(self) -> float:
        return self.tokens / self.chars

    @property
    def perplexity(self) -> float:
        """Per token: comparable only between models of one tokenizer."""
        return math.exp(min(self.nll_nats / self.tokens, 700.0))

    def __add__(self, other: Bits) -> Bits:
        return Bits(self.nll_nats + other.nll_nats, self.tokens + other.tokens, self.chars + other.chars, self.bytes + other.bytes)


def bits_per_byte(model: Any, tokenizer: Any, texts: Sequence[str], *, window: int, batch_size: int) -> Bits:
    """The sum of `score_texts` over all documents; equal for any batch size, and to the sum over any split of the documents.

    Raises:
        SopError: where there is no text to measure.
    """
    return total(score_texts(model, tokenizer, texts, window=window, batch_size=batch_size))


def total(parts: Sequence[Bits]) -> Bits:
    """The sum over documents.

    Raises:
        SopError: where there is no text to measure.
    """
    found = sum(parts, Bits())
    if not found.tokens:
        raise SopError("there is no text to measure", fix="check the text file and its fields", code=DATA)
    return found


def score_texts(model: Any, tokenizer: Any, texts: Sequence[str], *, window: int, batch_size: int) -> list[Bits]:
    """Bits of each document, in order."""
    start = start_id(tokenizer)
    encoded = encode_plain(tokenizer, texts)
    sequences = [Scored([*([] if start is None else [start]), *ids], [False] + [True] * (len(ids) - (start is None))) for ids in encoded]
    nats = sequence_nats(model, sequences, window=window, batch_size=batch_size)
    first = math.log(model.get_input_embeddings().weight.shape[0]) if start is None else 0.0
    return [Bits(n + (first if ids else 0.0), len(ids), len(t), len(t.encode("utf-8", "replace"))) for t, ids, n in zip(texts, encoded, nats, strict=True)]


def start_id(tokenizer: Any) -> int | None:
    """The token that a document begins after (see the top of this file)."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and bos in tokenizer("a")["input_ids"][:1]:
        return int(bos)
    chosen = eos if eos is not None else bos
    return None if chosen is None else int(chosen)


def encode_plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids without anything added; what looks like a special token in a text is text."""
    with special_tokens_as_text(tokenizer) as options:
        return [ids for batch in batches(texts, str) for ids in tokenizer(batch, add_special_tokens=False, verbose=False, **options)["input_ids"]]


# --- sequences to nats --------------------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """Token ids, and which of them are to be predicted (never the first)."""

    ids: Sequence[int]
    scored: Sequence[bool]


class _Window(NamedTuple):
    sequence: int
    ids: Sequence[int]
    targets: list[int]  # positions in ids


def sequence_nats(model: Any, sequences: Sequence[Scored], *, window: int, batch_size: int, title: str = "reading") -> list[float]:
    """Nats over the scored tokens of each sequence, fp32 log-softmax, summed in double precision.

    Args:
        window: tokens that the model sees at once (start token included); at most its context length is used.
        batch_size: windows in one forward pass.
    """
    import torch

    window = min(window, context_length(model) or window)
    if window < 2 or batch_size < 1:
        raise SopError(f"window {window} and batch size {batch_size} must be at least 2 and 1")
    work = [w for i, s in enumerate(sequences) for w in _windows(i, s, window)]
    work.sort(key=lambda w: (-len(w.ids), w.sequence))  # like lengths together: little padding, and the largest batch first
    nats = [0.0] * len(sequences)
    if not work:
        return nats
    score = _Scorer(model, work[-1].ids)
    batches = [work[i : i + batch_size] for i in range(0, len(work), batch_size)]
    with torch.inference_mode():
        for batch in console.track(batches, title, unit="batches"):
            for w, value in zip(batch, score(batch), strict=True):
                nats[w.sequence] += value
    return nats


def _windows(index: int, sequence: Scored, window: int) -> Iterator[_Window]:
    """Windows that overlap by half; each scored token is a target of the first window that holds it."""
    last = max((i for i, s in enumerate(sequence.scored) if s), default=0)
    start, done = 0, 1
    while done <= last:
        end = min(start + window, last + 1)
        targets = [i - start for i in range(done, end) if sequence.scored[i]]
        if targets:
            yield _Window(index, sequence.ids[start:end], targets)
        start, done = start + max(1, window // 2), end


class _Scorer:
    """Nats of a batch of windows. The output layer sees the scored positions alone, a chunk at a time, where that provably gives the model's own logits."""

    def __init__(self, model: Any, probe: Sequence[int]) -> None:
        import torch

        self.model = model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.body: Any = getattr(inner, inner.base_model_prefix, None)
        self.head: Any = inner.get_output_embeddings()
        ids = torch.tensor([list(probe[:8])], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits.float()
            self.split = self.body is not None and self.body is not inner and self.head is not None
            if self.split:  # models that scale or cap their logits go the long way
                self.split = torch.allclose(self.head(self._states(ids, torch.ones_like(ids))).float(), logits, rtol=1e-3, atol=1e-3)

    def _states(self, ids: Any, mask: Any) -> Any:
        return self.body(input_ids=ids, attention_mask=mask, use_cache=False)[0]

    def __call__(self, batch: Sequence[_Window]) -> list[float]:
        import torch

        length = max(len(w.ids) for w in batch)
        ids, mask = torch.zeros(len(batch), length, dtype=torch.long), torch.zeros(len(batch), length, dtype=torch.long)
        for row, w in enumerate(batch):
            ids[row, : len(w.ids)], mask[row, : len(w.ids)] = torch.tensor(w.ids), 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        states = self._states(ids, mask) if self.split else self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        rows = torch.tensor([r for r, w in enumerate(batch) for _ in w.targets], device=states.device)
        columns = torch.tensor([t for w in batch for t in w.targets], device=states.device)
        values = self._nats(states[rows, columns - 1], ids[rows, columns]).double().cpu()
        return [float(part.sum()) for part in values.split([len(w.targets) for w in batch])]

    def _nats(self, states: Any, targets: Any) -> Any:
        """`[n, width]` states (or logits) and `[n]` ids -> `[n]` nats."""
        import torch

        width = self.head.weight.shape[0] if self.split else states.shape[1]
        step = max(1, _LOGITS_PER_CHUNK // width)
        out = []
        for part, ids in zip(states.split(step), targets.split(step), strict=True):
            logits = (self.head(part) if self.split else part).float()
            out.append(torch.nn.functional.cross_entropy(logits, ids, reduction="none"))
        return torch.cat(out)
