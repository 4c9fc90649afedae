"""The extension methods behind one face: candidates -> plan rows -> appended files, and what each row saves on a text."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ..errors import ENVIRONMENT, SopError
from . import bpe, merges, spm, wordpiece
from .base import Base, bare, copy_side_files
from .plan import Row
from .script import HAN_RUN
from .settings import Json, SelectionConfig

Method = Literal["continued_bpe", "sentencepiece", "added_tokens"]
Terms = Sequence[tuple[str, str]]  # (term, where it comes from)
FITS: dict[str, tuple[Method, ...]] = {
    "byte_bpe": ("continued_bpe",), "sentencepiece_bpe": ("sentencepiece",), "unigram": ("sentencepiece",), "wordpiece": ("added_tokens",),
}  # fmt: skip


def method_of(base: Base, settings: SelectionConfig) -> Method:
    """The method for a base: `auto` takes the one that fits its kind.

    Raises:
        SopError: where the wanted method cannot work on this base.
    """
    fitting = FITS[base.kind]
    if settings.method == "auto":
        return fitting[0]
    if settings.method not in fitting:
        what = f"selection.method {settings.method} does not fit a {base.kind} tokenizer"
        raise SopError(what, where=str(base.folder), fix=f"use auto, or {' or '.join(fitting)}")
    return settings.method


@dataclass(frozen=True)
class Corpus:
    """Counted text, in whatever form the method needs. `texts` answers the same texts at each call."""

    texts: Callable[[], Iterable[tuple[str, float]]]


def propose(base: Base, corpus: Corpus, settings: SelectionConfig, limit: int, terms: Terms = ()) -> list[Row]:
    """Rows for at most `limit` new tokens, in order of what they save on the corpus.

    Args:
        base: the base tokenizer.
        corpus: training text.
        settings: scope, min_freq, max_token_chars, max_base_pieces.
        limit: upper bound.
        terms: candidates from elsewhere (the auxiliary tokenizer, a lexicon). They compete where tokens are independent of each other (added
            tokens); where a token is built by merges, whatever saves enough is found among the merges itself.
    """
    method = method_of(base, settings)
    atoms = merges.Atoms(free=settings.scope == "free", cut=_word_edges() if settings.scope == "word" else None)
    if method == "added_tokens":
        return _propose_added(base, corpus, settings, limit, terms, atoms)
    known = {base.bytes_of[i] for i in base.vocab.values()}
    if base.kind == "byte_bpe":
        merges.grouped(merges.count_pretokens(base, corpus.texts()), base.bytes_of, atoms)
        steps = merges.candidates(atoms, known, limit, min_freq=settings.min_freq, max_chars=settings.max_token_chars)
        return _within(bpe.rows(base, steps), settings.max_base_pieces, base.next_id)
    if base.kind == "unigram":
        spm.unigram_atoms(base, corpus.texts(), atoms)
    else:
        merges.grouped(merges.count_runs(base, corpus.texts()), base.bytes_of, atoms)
    steps = merges.candidates(atoms, known, limit, min_freq=settings.min_freq, max_chars=settings.max_token_chars, direct=True)
    return _within(spm.rows(base, steps), settings.max_base_pieces, base.next_id)


def _propose_added(base: Base, corpus: Corpus, settings: SelectionConfig, limit: int, terms: Terms, atoms: merges.Atoms) -> list[Row]:
    runs = wordpiece.runs_of(corpus.texts())
    wordpiece.atoms_of(runs, atoms)
    found = merges.candidates(atoms, {atoms.data(n) for n in range(len(atoms.groups))}, 2 * limit, min_freq=settings.min_freq, max_chars=settings.max_token_chars)
    sources = dict(reversed(terms)) | {s.new.decode(): "corpus" for s in found}
    most = min(settings.max_token_chars, settings.max_base_pieces or settings.max_token_chars)
    allowed = [t for t in sources if 1 < len(t) <= most and HAN_RUN.fullmatch(t)]
    chosen = wordpiece.choose(runs, allowed, limit, settings.min_freq)
    return wordpiece.rows(base, (t for t, _ in chosen), sources)


def _within(rows: list[Row], most: int | None, first: int) -> list[Row]:
    """Rows of at most `most` base pieces; what is built on a longer one has more pieces still, so nothing loses its parts."""
    return renumbered([r for r in rows if most is None or len(r.pieces) <= most], first)


def renumbered(rows: Sequence[Row], first: int) -> list[Row]:
    """Copies of the rows with contiguous ids from `first`."""
    return [dataclasses.replace(row, id=first + n) for n, row in enumerate(rows)]


def without(rows: Sequence[Row], gone: set[int], first: int) -> list[Row]:
    """The rows without those ids, numbered anew; free merges of a dropped row move to the next one."""
    out: list[Row] = []
    waiting: tuple[tuple[str, str], ...] = ()
    for row in rows:
        if row.id in gone:
            waiting += row.also
        else:
            out.append(dataclasses.replace(row, also=waiting + row.also))
            waiting = ()
    return renumbered(out, first)


def _word_edges() -> merges.Cut:
    """Word boundaries by jieba, which is not among this project's dependencies."""
    try:
        import jieba  # type: ignore[import-not-found]
    except ImportError:
        raise SopError("selection.scope word needs the package jieba", fix="pip install jieba, or use scope: script (which saves more)", code=ENVIRONMENT) from None
    jieba.setLogLevel(60)

    def edges(text: str) -> set[int]:
        at, out = 0, set()
        for word in jieba.cut(text, HMM=False):
            at += len(word)
            out.add(at)
        return out

    return edges


# --- appending ----------------------------------------------------------------------------------------------------------------------------


def appended(base: Base, rows: Sequence[Row]) -> Json:
    """The base's `tokenizer.json` with the rows appended; nothing of it is deleted or reordered."""
    if base.kind == "byte_bpe":
        return bpe.append(base, rows)
    if base.kind == "wordpiece":
        return wordpiece.append(base, rows)
    return spm.append_unigram(base, rows) if base.kind == "unigram" else spm.append_bpe(base, rows)


def write(base: Base, rows: Sequence[Row], out: Path) -> None:
    """Write a complete tokenizer folder: the base's files with the rows appended."""
    data = appended(base, rows)
    copy_side_files(base, out, leave=(model.name,) if (model := spm.model_file(base)) and rows else ())
    (out / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    if base.kind in ("sentencepiece_bpe", "unigram"):
        spm.write_model(base, data, rows, out)
    if (base.folder / "vocab.txt").is_file():
        _write_vocab(base, data, out / "vocab.txt")


def _write_vocab(base: Base, data: Json, path: Path) -> None:
    """BERT's `vocab.txt`, one token per line at the line of its id."""
    tokens = sorted(data["model"]["vocab"].items(), key=lambda item: item[1])
    if [i for _, i in tokens] == list(range(len(tokens))):
        path.write_text("".join(f"{t}\n" for t, _ in tokens), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)
        shutil.copyfile(base.folder / "vocab.txt", path)


# --- measuring ----------------------------------------------------------------------------------------------------------------------------


def counts(data: Json, corpus: Corpus) -> Any:
    """Weighted uses of every id of a tokenizer in a text, as an array indexed by id."""
    import numpy as np

    tokenizer = bare(data)
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    uses = np.zeros(size)
    texts = iter(corpus.texts())
    while part := list(islice(texts, 256)):
        encodings = tokenizer.encode_batch_fast([t for t, _ in part], add_special_tokens=False)
        lengths = [len(e.ids) for e in encodings]
        ids = np.fromiter((i for e in encodings for i in e.ids), dtype=np.int64, count=sum(lengths))
        uses += np.bincount(ids, weights=np.repeat([w for _, w in part], lengths), minlength=size)
    return uses


def gains(base: Base, rows: Sequence[Row], corpus: Corpus) -> list[float]:
    """Tokens that each row saves on a text, given the rows before it.

    Exact for merges and added tokens. For Unigram bases, whose segmentation is global: uses times (base pieces - 1).
    """
    if base.kind == "wordpiece":
        return wordpiece.marginal(wordpiece.runs_of(corpus.texts()), [r.token for r in rows])
    if base.kind == "unigram":
        uses = counts(appended(base, rows), corpus)
        return [float(uses[r.id]) * max(1, len(r.pieces) - 1) for r in rows]
    if base.kind == "byte_bpe":
        fires = merges.simulate(merges.count_pretokens(base, corpus.texts()), bpe.ranks(base, rows))
    else:
        units, found = spm.with_characters(base, rows, merges.count_runs(base, corpus.texts()))
        fires = merges.simulate(units, spm.ranks(base, rows))
        return [fires.get(n, 0.0) + found.get(n, 0.0) for n in range(len(rows))]
    return [fires.get(n, 0.0) for n in range(len(rows))]
