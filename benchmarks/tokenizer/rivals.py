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
from self_model_sop.tokenizer.plan import Row
from self_model_sop.tokenizer.script import HAN_RUN

AUX_VOCABULARY = 20_000


def auxiliary(lines: Sequence[str]) -> Any:
    """A SentencePiece BPE with the documented keys."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=AUX_VOCABULARY, model_type="bpe", character_coverage=0.9995, split_digits=True, byte_fallback=True,
        max_sentence_length=1 << 20, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def counted(aux: Any, lines: Sequence[str]) -> Counter[str]:
    """Uses of the auxiliary pieces over whole lines."""
    return Counter(piece for line in lines for piece in aux.encode(line, out_type=str))


def usual(base: Base, pieces: Counter[str], n: int) -> Tokenizer:
    """(a) The usual script: the most frequent auxiliary pieces that `get_vocab()` does not hold, `add_tokens`.

    One kindness: pieces that the base's normaliser strips to nothing are left out. With one of them tokenizers 0.23 panics or takes all memory at the first text.
    """
    tokenizer = bare(base.data)
    vocab, normalizer = tokenizer.get_vocab(), tokenizer.normalizer
    new = [piece for piece, _ in pieces.most_common() if piece not in vocab and not piece.startswith("<0x")]
    tokenizer.add_tokens([piece for piece in new if normalizer is None or normalizer.normalize_str(piece)][:n])
    return tokenizer


def usual_done_right(base: Base, pieces: Counter[str], n: int) -> Tokenizer:
    """(b) The same with care: U+2581 stripped, Chinese characters only, what the base writes in one token left out, ranked by uses x (pieces - 1)."""
    uses: Counter[str] = Counter()
    for piece, count in pieces.items():
        for run in HAN_RUN.findall(piece):
            uses[run] += count
    tokenizer = bare(base.data)
    terms = list(uses)
    lengths = [len(e.ids) for e in tokenizer.encode_batch(terms, add_special_tokens=False)]
    gain = {t: uses[t] * (p - 1) for t, p in zip(terms, lengths, strict=True) if p > 1}
    best = sorted(gain, key=lambda t: (-gain[t], t))[:n]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in best])
    return tokenizer


def independent(base: Base, lines: Sequence[str], aux: Any, most: int) -> list[Row] | None:
    """(c) A BPE trained on the domain text by itself; its tokens and merges appended, the first N of them for N tokens.

    For SentencePiece bases: the auxiliary pieces appended. None for WordPiece, which has no merges.
    """
    if base.kind == "sentencepiece_bpe":
        plain = (i for i in range(aux.get_piece_size()) if not (aux.is_byte(i) or aux.is_control(i) or aux.is_unknown(i)))
        return spm.rows(base, [Step(0, piece.encode(), b"") for piece in map(aux.id_to_piece, plain) if piece not in base.vocab])[:most]
    if base.kind != "byte_bpe":
        return None
    inner = Tokenizer(models.BPE())
    inner.normalizer, inner.pre_tokenizer = base.tokenizer.normalizer, base.tokenizer.pre_tokenizer
    alphabet, size = sorted(pre_tokenizers.ByteLevel.alphabet()), 256 + 2 * most
    while True:
        inner.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet))
        merges = json.loads(inner.to_str())["model"]["merges"]
        rows = bpe.rows(base, [Step(0, unspell(a), unspell(b)) for a, b in merges])
        if len(rows) >= most or len(merges) < size - 300:
            return rows[:most]
        size *= 2


def appended(base: Base, rows: Sequence[Row]) -> Tokenizer:
    """The base with the rows of `independent`."""
    return bare(bpe.append(base, rows) if base.kind == "byte_bpe" else spm.append_bpe(base, rows))
