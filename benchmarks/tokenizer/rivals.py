"""The usual ways to extend a tokenizer, to be measured beside ours. Each answers a `tokenizers.Tokenizer` with at most N new tokens."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from self_model_sop.tokenizer import bpe, spm
from self_model_sop.tokenizer.base import Base, bare, unspell
from self_model_sop.tokenizer.merges import Step
from self_model_sop.tokenizer.script import HAN_RUN

AUX_VOCABULARY = 20_000


def auxiliary(lines: Sequence[str], vocab_size: int) -> Any:
    """A SentencePiece BPE with the documented keys."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=vocab_size, model_type="bpe", character_coverage=0.9995, split_digits=True, byte_fallback=True,
        max_sentence_length=1 << 20, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def usual(base: Base, lines: Sequence[str], aux: Any, n: int) -> Tokenizer:
    """(a) The usual script: count the auxiliary pieces over whole lines, take the most frequent that `get_vocab()` does not hold, `add_tokens`."""
    counted = Counter(piece for line in lines for piece in aux.encode(line, out_type=str))
    tokenizer = bare(base.data)
    vocab = tokenizer.get_vocab()
    tokenizer.add_tokens([piece for piece, _ in counted.most_common() if piece not in vocab and not piece.startswith("<0x")][:n])
    return tokenizer


def usual_done_right(base: Base, lines: Sequence[str], aux: Any, n: int) -> Tokenizer:
    """(b) The same with care: U+2581 stripped, Chinese characters only, what the base writes in one token left out, ranked by uses x (pieces - 1)."""
    counted: Counter[str] = Counter()
    for line in lines:
        counted.update(run for piece in aux.encode(line, out_type=str) for run in HAN_RUN.findall(piece))
    tokenizer = bare(base.data)
    terms = list(counted)
    pieces = [len(e.ids) for e in tokenizer.encode_batch(terms, add_special_tokens=False)]
    gain = {t: counted[t] * (p - 1) for t, p in zip(terms, pieces, strict=True) if p > 1}
    best = sorted(gain, key=lambda t: (-gain[t], t))[:n]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in best])
    return tokenizer


def independent(base: Base, lines: Sequence[str], aux: Any, n: int) -> Tokenizer | None:
    """(c) A BPE trained on the domain text by itself; its tokens and merges appended. For SentencePiece bases: the auxiliary pieces appended."""
    if base.kind == "byte_bpe":
        inner = Tokenizer(models.BPE())
        inner.normalizer, inner.pre_tokenizer = base.tokenizer.normalizer, base.tokenizer.pre_tokenizer
        size = 256 + 2 * n
        while True:
            alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
            inner.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet))
            merges = json.loads(inner.to_str())["model"]["merges"]
            steps = [Step(0, unspell(a), unspell(b)) for a, b in merges]
            rows = bpe.rows(base, steps)
            if len(rows) >= n or len(merges) < size - 300:
                return bare(bpe.append(base, rows[:n]))
            size *= 2
    if base.kind == "sentencepiece_bpe":
        known = {*base.vocab}
        steps = []
        for i in range(aux.get_piece_size()):
            piece = aux.id_to_piece(i)
            if piece not in known and not (aux.is_byte(i) or aux.is_control(i) or aux.is_unknown(i)):
                steps.append(Step(0, piece.encode(), b""))
        return bare(spm.append_bpe(base, spm.rows(base, steps)[:n]))
    return None
