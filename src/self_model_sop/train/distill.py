"""Token distillation (arXiv 2505.20133): the rows of new tokens learn to leave a model in the states that the tokens' old pieces leave it in.

The teacher is the model itself, reading each new token as its base pieces: in a phase that trains new rows alone nothing that it reads ever moves, so there is no second copy.
What is compared are the last hidden states, as the output layer gets them, at the last piece of each token, from the first new token of a document on; before it both read
the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import errors
from ..errors import SopError
from .batches import CausalCollator
from .packing import Item
from .tokens import Ids, Segment

if TYPE_CHECKING:
    from .textdata import Prepared

_TEACHER = ("teacher_ids", "teacher_positions", "teacher_ends", "compared")


@dataclass(frozen=True)
class DistillCollator:
    """Batches of `student`, with what the teacher reads beside them.

    Args:
        student: one item a row (layout `padded`); the teacher's rows are made by it too, so documents stay apart there as well.
        pieces: new id -> base ids.
        limit: tokens that the model reads at most; of a document whose pieces are more, the rest is not compared. None: no limit.
    """

    student: CausalCollator
    pieces: Mapping[int, Sequence[int]]
    limit: int | None = None

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """The student's tensors, and `teacher_ids`, `teacher_positions` `[rows, teacher's width]`, `teacher_ends` `[rows, width]` (where in the teacher's row a token's last
        piece is) and `compared` `[rows, width]` (bool)."""
        import torch

        batch = self.student(items)
        ends, compared = np.zeros(batch["input_ids"].shape, np.int64), np.zeros(batch["input_ids"].shape, np.bool_)
        read = []
        for r, item in enumerate(items):
            at = after = 0
            segments = []
            for segment in item.segments:
                ids, last = self.spelled(segment.ids)
                ids, n = ids[: self.limit], len(segment.ids)
                ends[r, at : at + n] = after + np.minimum(last, len(ids) - 1)
                compared[r, at : at + n] = np.logical_or.accumulate([i in self.pieces for i in segment.ids.tolist()]) & (last < len(ids))
                segments.append(Segment(ids, np.ones(len(ids), np.float16)))
                at, after = at + n, after + len(ids)
            read.append(item._replace(segments=segments))
        teacher = self.student(read)
        positions = teacher["position_ids"] if self.limit is None else teacher["position_ids"].clamp(max=self.limit - 1)  # padding may go on beyond the limit
        return {**batch, **dict(zip(_TEACHER, (teacher["input_ids"], positions, torch.from_numpy(ends), torch.from_numpy(compared)), strict=True))}

    def spelled(self, ids: Ids) -> tuple[Ids, Ids]:
        """(`ids` with each new one as its pieces, for each of `ids` the place of its last piece)."""
        parts = [self.pieces.get(i, (i,)) for i in ids.tolist()]
        return np.fromiter(chain.from_iterable(parts), np.int32), np.cumsum([len(part) for part in parts], dtype=np.int32) - 1


def pieces_for(tokenizer: Any, new: range) -> dict[int, list[int]]:
    """For each new id of an extended tokenizer, the base ids of the same text."""
    from ..tokenizer.new_rows import before_expansion, pieces_of

    return dict(zip(new, pieces_of(before_expansion(tokenizer, new), tokenizer, new, {}), strict=True))


def collator_for(prepared: Prepared) -> DistillCollator:
    """The collator of a phase that distils.

    Raises:
        SopError: where a new token has no pieces (exit 3), or one process would spread a batch over several GPUs (exit 4).
    """
    import torch

    from .ranks import world

    if torch.cuda.device_count() > 1 and world() == 1:
        raise SopError("objective distill: one process cannot use several GPUs", fix="start it with torchrun, or set CUDA_VISIBLE_DEVICES=0", code=errors.ENVIRONMENT)
    new, tokenizer = prepared.new_rows, prepared.tokenizer
    assert new is not None
    pieces = pieces_for(tokenizer, new)
    silent = next((i for i, ids in pieces.items() if not ids), None)
    if silent is not None:
        raise SopError(f"new token {silent} ({tokenizer.convert_ids_to_tokens(silent)!r}) has no base pieces to learn from", where="phases", code=errors.DATA)
    return DistillCollator(prepared.collator, pieces, getattr(prepared.model.config.get_text_config(), "max_position_embeddings", None))


def body_of(model: Any) -> Any:
    """The part of a model (or of the one that peft wraps) whose output is the last hidden state.

    Raises:
        SopError: where the model has no such part.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if inner.base_model is inner:
        raise SopError(f"objective distill: {type(inner).__name__} has no body apart from its output layer", where="phases", fix="use objective: next_token")
    return inner.base_model


def targets(body: Any, inputs: dict[str, Any], autocast: Callable[[], Any]) -> tuple[Any, Any]:
    """(The teacher's states at the compared positions `[n, hidden]` in fp32, which those are `[rows, width]`); takes the teacher's tensors out of `inputs`."""
    import torch

    ids, positions, ends, compared = (inputs.pop(name) for name in _TEACHER)
    training = body.training
    body.eval()  # no dropout in what is to be matched
    with torch.no_grad(), autocast():
        states = body(input_ids=ids, position_ids=positions, use_cache=False)[0]
    body.train(training)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return states[rows, ends][compared].float(), compared


@contextlib.contextmanager
def watched(body: Any) -> Iterator[list[Any]]:
    """Collects the last hidden states `[rows, width, hidden]` of what the model reads inside."""
    seen: list[Any] = []
    hook = body.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        hook.remove()


def distance(states: Any, teacher: Any, compared: Any) -> Any:
    """Squared distance from the teacher's state as a share of that state's own square, summed over the compared positions: 0 where they are equal, about 2 each where unrelated."""
    student = states[compared].float()
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1)).sum()
