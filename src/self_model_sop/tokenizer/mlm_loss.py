"""`sop tokenizer mlm-loss`: what a masked model loses on masked tokens, per token and, comparable across vocabularies, per character.

Two ways to hide text, both drawn from the seed, the document's place in the data and nothing else:

* token masks: `mask_ratio` of the tokens, each on its own. Loss and perplexity are the usual ones, averaged over all masked tokens (not over batches).
* span masks: `mask_ratio` of the text's spans of `span` characters; every token that touches a chosen span is masked. The same characters are hidden
  from any vocabulary, and none of a word's pieces gives the others away, so bits per character = nats over the masked tokens / characters that
  these tokens write / ln 2 compares models before and after an expansion (a pseudo-log-likelihood, Salazar et al. 2020; within a span the masked tokens
  are predicted independently of one another).

A chosen token is always replaced by the mask token (no 80/10/10: that is a matter of training).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import console
from ..artifact import write_atomic
from ..errors import DATA, OK, SopError
from ..stage import guarded
from ..train.encoding import special_tokens_as_text


class Chunk(NamedTuple):
    """A piece of a document that fits the model: ids with special tokens, and the characters `[start, end)` of each (empty for special tokens)."""

    document: int
    ids: list[int]
    spans: list[tuple[int, int]]


class Loss(NamedTuple):
    """Nats over the masked tokens, how many there were, and how many characters they write."""

    nats: float
    tokens: int
    chars: int

    @property
    def per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_char(self) -> float:
        return self.nats / math.log(2) / self.chars


Masks = Callable[[int, Chunk], list[int]]  # (number of the chunk, chunk) -> positions to mask


def chunks(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[Chunk]:
    """Documents cut into pieces of at most `max_length` tokens, special tokens included; what looks like a special token in a text is text."""
    front, back = _frame(tokenizer)
    room = max_length - len(front) - len(back)
    if room < 1:
        raise SopError(f"max_length {max_length} leaves no room for text", where="--max_length", fix="use at least 8")
    out = []
    for number, text in enumerate(texts):
        with special_tokens_as_text(tokenizer) as options:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options)
        for at in range(0, len(encoded["input_ids"]), room):
            ids, spans = encoded["input_ids"][at : at + room], encoded["offset_mapping"][at : at + room]
            out.append(Chunk(number, [*front, *ids, *back], [(0, 0)] * len(front) + [tuple(s) for s in spans] + [(0, 0)] * len(back)))
    return out


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    inner, whole = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    at = next(i for i in range(len(whole) - len(inner) + 1) if whole[i : i + len(inner)] == inner)
    return whole[:at], whole[at + len(inner) :]


def token_masks(ratio: float, seed: int) -> Masks:
    """`ratio` of the tokens of each chunk, at least one."""

    def draw(number: int, chunk: Chunk) -> list[int]:
        where = [i for i, (a, b) in enumerate(chunk.spans) if b > a]
        return sorted(random.Random(f"{seed}/{number}").sample(where, max(1, round(ratio * len(where))))) if where else []

    return draw


def span_masks(ratio: float, span: int, seed: int) -> Masks:
    """Every token that touches a chosen stretch of `span` characters; stretches are chosen by their place in the document, whatever the vocabulary."""

    def chosen(document: int, stretch: int) -> bool:
        return random.Random(f"{seed}/{document}/{stretch}").random() < ratio

    def draw(number: int, chunk: Chunk) -> list[int]:
        return [i for i, (a, b) in enumerate(chunk.spans) if b > a and any(chosen(chunk.document, s) for s in range(a // span, (b - 1) // span + 1))]

    return draw


def masked_loss(model: Any, tokenizer: Any, pieces: Sequence[Chunk], masks: Masks, *, batch_size: int, title: str = "reading") -> Loss:
    """Nats of the original tokens at the masked positions, fp32; the same for any batch size."""
    import torch

    work = [(chunk, where) for i, chunk in enumerate(pieces) if (where := masks(i, chunk))]
    work.sort(key=lambda item: len(item[0].ids))
    nats, tokens, chars = 0.0, 0, 0
    with torch.inference_mode():
        for at in console.track(range(0, len(work), batch_size), title, unit="batches"):
            batch = work[at : at + batch_size]
            ids, mask, rows, columns = _tensors(batch, tokenizer.pad_token_id or 0)
            true = ids[rows, columns].clone()
            ids[rows, columns] = tokenizer.mask_token_id
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits[rows.to(model.device), columns.to(model.device)]
            nats += float(torch.nn.functional.cross_entropy(logits.float(), true.to(model.device), reduction="none").double().sum())
            tokens += len(true)
            chars += sum(chunk.spans[i][1] - chunk.spans[i][0] for chunk, where in batch for i in where)
    if not tokens:
        raise SopError("no token was masked", where="--mask_ratio", fix="give more text or a larger mask_ratio", code=DATA)
    return Loss(nats, tokens, chars)


def _tensors(batch: Sequence[tuple[Chunk, list[int]]], pad: int) -> tuple[Any, Any, Any, Any]:
    """ids and attention mask `[batch, seq]`; rows and columns of the masked positions."""
    import torch

    length = max(len(chunk.ids) for chunk, _ in batch)
    ids = torch.tensor([chunk.ids + [pad] * (length - len(chunk.ids)) for chunk, _ in batch])
    mask = torch.tensor([[1] * len(chunk.ids) + [0] * (length - len(chunk.ids)) for chunk, _ in batch])
    places = [(row, i) for row, (_, where) in enumerate(batch) for i in where]
    return ids, mask, torch.tensor([p[0] for p in places]), torch.tensor([p[1] for p in places])


# --- the command --------------------------------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model and the data, measure both ways; returns what `--output` writes."""
    from ..eval.models import check_fit, context_length
    from ..eval.sets import documents
    from ..train.model import kind_of, load_model, load_tokenizer

    kind = kind_of(args.model_path)
    if kind != "masked":
        raise SopError(f"this is a {kind} model, it has no masked-token loss", where=str(args.model_path), fix="measure causal models with `sop eval compare` (bits per byte)")
    texts = documents(args.test_data, args.text_fields, args.max_documents)
    tokenizer = load_tokenizer(args.model_path)
    if tokenizer.mask_token_id is None:
        raise SopError("the tokenizer has no mask token", where=str(args.model_path), fix="use the tokenizer that the model was trained with")
    model = load_model(args.model_path, kind="masked", dtype="float32")
    check_fit(model, tokenizer, str(args.model_path))
    model = model.to(_device())
    limit = context_length(model)
    pieces = chunks(tokenizer, texts.items, min(args.max_length, limit) if limit else args.max_length)
    if not pieces:
        raise SopError("there is no text to measure", where=str(args.test_data), fix="check the file and --text_fields", code=DATA)
    by_token = masked_loss(model, tokenizer, pieces, token_masks(args.mask_ratio, args.seed), batch_size=args.batch_size, title="token masks")
    by_span = masked_loss(model, tokenizer, pieces, span_masks(args.mask_ratio, args.span, args.seed), batch_size=args.batch_size, title="span masks")
    return {
        "model": str(args.model_path), "test_data": str(args.test_data), "vocabulary": len(tokenizer), "mask_ratio": args.mask_ratio, "span": args.span, "seed": args.seed,
        "documents": len(texts.items), "unread": texts.unread, "chars": sum(map(len, texts.items)),
        "tokens": sum(1 for p in pieces for a, b in p.spans if b > a), "unknown_tokens": sum(p.ids.count(tokenizer.unk_token_id) for p in pieces),
        "masked_tokens": by_token.tokens, "loss": by_token.per_token, "perplexity": math.exp(min(by_token.per_token, 700.0)),
        "span_masked_tokens": by_span.tokens, "span_chars": by_span.chars, "bits_per_char": by_span.bits_per_char,
    }  # fmt: skip


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sop tokenizer mlm-loss", description="Masked-token loss of a masked model.", allow_abbrev=False)

    def add(flag: str, **more: Any) -> None:
        parser.add_argument(*dict.fromkeys([flag, flag.replace("_", "-")]), **more)

    add("--model_path", type=Path, required=True, help="folder (or hub id) of a masked model")
    add("--test_data", type=Path, required=True, help="held-out text: JSONL of any format, Parquet, txt with one document per line")
    add("--mask_ratio", type=float, default=0.15, help="share that is masked [0.15]")
    add("--span", type=int, default=4, help="characters hidden together for bits per character [4]")
    add("--max_length", type=int, default=512, help="tokens per piece, special tokens included [512]")
    add("--batch_size", type=int, default=8, help="pieces per forward pass; does not change the result [8]")
    add("--max_documents", type=int, default=None, help="at most so many documents, chosen by content hash")
    add("--text_fields", nargs="+", default=(), help="fields to read; none: every text of the recognised format")
    add("--seed", type=int, default=0, help="seed of the masks [0]")
    add("--output", type=Path, default=None, help="also write the result as JSON")
    args = parser.parse_args(argv)
    if not 0 < args.mask_ratio <= 1 or args.span < 1 or args.batch_size < 1:
        raise SopError("needs 0 < mask_ratio <= 1, span >= 1, batch_size >= 1", where="command line")
    return args


def _shown(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "documents", f"{result['documents']:,}"
    yield "tokens per character", f"{result['tokens'] / result['chars']:.3f}"
    yield "unknown tokens", f"{result['unknown_tokens']:,}"
    yield "masked tokens", f"{result['masked_tokens']:,}"
    yield "loss (nats per masked token)", f"{result['loss']:.4f}"
    yield "perplexity (one vocabulary only)", f"{result['perplexity']:.2f}"
    yield f"bits per character ({result['span']}-character spans)", f"{result['bits_per_char']:.4f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sop tokenizer mlm-loss`."""

    def work() -> int:
        args = _arguments(list(sys.argv[1:] if argv is None else argv))
        result = evaluate(args)
        console.table(f"masked-token loss of {args.model_path}", ("measure", "value"), list(_shown(result)))
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(args.output, json.dumps(result, ensure_ascii=False, indent=1))
            console.say(f"written to {args.output}")
        return OK

    return guarded(work)
