"""Items -> tensors. Segments in one row never see one another: position ids restart, and there is no attention mask to say otherwise.

On a causal model right padding needs no mask either: no real token looks at what comes after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .packing import Item, best_fit
from .tokens import Segment

Layout = Literal["padded", "compact", "flat"]
IGNORE = -100


def _facts(items: Sequence[Item]) -> dict[str, Any]:
    """What the trainer counts and takes out before the model sees the batch: example numbers `[n]` and real tokens."""
    import torch

    return {"examples": torch.tensor([e for item in items for e in item.examples]), "tokens": torch.tensor(sum(len(s.ids) for item in items for s in item.segments))}


@dataclass(frozen=True)
class CausalCollator:
    """Batches for next-token prediction.

    Args:
        pad_id: fills the end of short rows; its labels are ignored.
        layout: `padded` one item a row; `compact` segments best-fitted into rows as wide as the longest; `flat` all in one row (padding-free).
        keep: `none` logits of every position; `index` or `mask`: only of positions that are learned (`index` needs a single row, so `mask` where there are more).
        weighted: tokens count differently in the loss; their weights come with the labels.
    """

    pad_id: int
    layout: Layout = "padded"
    keep: Literal["none", "index", "mask"] = "none"
    weighted: bool = False

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Tensors `input_ids`, `position_ids`, `labels` `[rows, width]` (int64), `examples` `[n]`, `tokens` (a number); with `keep`, labels of the kept positions only;
        with `weighted`, `weights` of the shape of the labels."""
        import torch

        rows = self._rows(items)
        width = max(sum(len(s.ids) for s in row) for row in rows)
        ids = np.full((len(rows), width), self.pad_id, np.int64)
        labels = np.full((len(rows), width), IGNORE, np.int64)
        weights = np.zeros((len(rows), width), np.float32)
        positions = np.tile(np.arange(width), (len(rows), 1))
        for r, row in enumerate(rows):
            at = 0
            for segment in row:
                n = len(segment.ids)
                ids[r, at : at + n] = segment.ids
                labels[r, at + 1 : at + n] = np.where(segment.supervised[1:], segment.ids[1:], IGNORE)
                weights[r, at + 1 : at + n] = segment.weights[1:]
                positions[r, at : at + n] = np.arange(n)
                at += n
            positions[r, at:] = np.arange(at, width) if len(row) == 1 else np.arange(width - at)
        batch = {"input_ids": torch.from_numpy(ids), "position_ids": torch.from_numpy(positions), "labels": torch.from_numpy(labels)}
        if self.weighted:
            batch["weights"] = torch.from_numpy(weights)
        return self._narrowed({**batch, **_facts(items)})

    def _rows(self, items: Sequence[Item]) -> list[list[Segment]]:
        if self.layout == "padded":
            return [item.segments for item in items]
        segments = [s for item in items for s in item.segments]
        if self.layout == "flat":
            return [segments]
        lengths = [len(s.ids) for s in segments]
        return [[segments[i] for i in row] for row in best_fit(lengths, max(lengths))]

    def _narrowed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ask the model for the logits of learned positions only; their labels come already shifted."""
        import torch

        rows = len(batch["labels"])
        if self.keep == "none" or (self.keep == "index" and rows > 1):
            return batch
        shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        mask = shifted != IGNORE
        batch["logits_to_keep"] = mask[0].nonzero()[:, 0] if rows == 1 else mask
        kept = shifted[mask]
        if self.weighted:
            batch["weights"] = torch.nn.functional.pad(batch["weights"][:, 1:], (0, 1))[mask]
        batch["labels"] = batch["shift_labels"] = kept[None] if rows == 1 else kept
        return batch


@dataclass(frozen=True)
class MaskedCollator:
    """Batches for masked-token prediction (BERT, arXiv 1810.04805): of the chosen tokens 80 % become [MASK], 10 % another token, 10 % stay.

    One segment a row, since masked models look both ways. What is masked follows from `seed` and the item's place in the training alone, not from a running generator:
    the same whatever the batch, the number of processes, and after a resumption; another choice in each pass.
    """

    pad_id: int
    mask_id: int
    vocabulary: int
    special: frozenset[int]
    share: float = 0.15
    seed: int = 0

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Tensors `input_ids`, `labels`, `attention_mask` `[rows, width]`, `examples` `[n]` and `tokens`. A short segment may have no label at all."""
        import torch

        rows = [(segment, np.random.default_rng([self.seed, item.place, k])) for item in items for k, segment in enumerate(item.segments)]
        shape = (len(rows), max(len(segment.ids) for segment, _ in rows))
        ids, labels, attention = np.full(shape, self.pad_id, np.int64), np.full(shape, IGNORE, np.int64), np.zeros(shape, np.int64)
        for r, (segment, draw) in enumerate(rows):
            n = len(segment.ids)
            chosen = (draw.random(n) < self.share) & ~np.isin(segment.ids, list(self.special))
            fate = draw.random(n)
            ids[r, :n] = np.where(chosen & (fate < 0.8), self.mask_id, np.where(chosen & (fate >= 0.9), draw.integers(self.vocabulary, size=n), segment.ids))
            labels[r, :n] = np.where(chosen, segment.ids, IGNORE)
            attention[r, :n] = 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(attention), "labels": torch.from_numpy(labels), **_facts(items)}
