"""The extension methods behind one face: candidates -> plan rows -> appended files, and what each row saves on a text."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ENVIRONMENT, SopError
from . import bpe, merges, spm, wordpiece
from .base import Base, bare, copy_side_files
from .counts import Units, count_pretokens, count_runs, tally
from .plan import Row
from .script import HAN_RUN
from .settings import Json, SelectionConfig

if TYPE_CHECKING:
    import numpy as np

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


class Corpus:
    """A text in whatever form a method needs; it is read and encoded by the base once.

    Args:
        texts: answers the same (text, weight) pairs at each call.
    """

    def __init__(self, texts: Callable[[], Iterable[tuple[str, float]]]) -> None:
        self.texts = texts
        self._units: Units | None = None
        self._runs: dict[str, float] | None = None

    def units(self, base: Base) -> Units:
        """The text in base ids."""
        if self._units is None:
            self._units = count_pretokens(base, self.texts()) if base.kind == "byte_bpe" else count_runs(base, self.texts())
        return self._units

    def runs(self) -> dict[str, float]:
        """The runs of Chinese characters."""
        if self._runs is None:
            self._runs = wordpiece.runs_of(self.texts())
        return self._runs


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
    if method_of(base, settings) == "added_tokens":
        return _propose_added(base, corpus, settings, limit, terms)
    free, cut = settings.scope == "free", _word_edges() if settings.scope == "word" else None
    known = {base.bytes_of[i] for i in base.vocab.values()}
    byte_level = base.kind == "byte_bpe"
    atoms = spm.unigram_atoms(base, corpus.texts()) if base.kind == "unigram" else merges.atoms_of(corpus.units(base), base.bytes_of, free=free, cut=cut)
    steps = merges.candidates(atoms, known, limit, min_freq=settings.min_freq, max_chars=settings.max_token_chars, direct=not byte_level)
    return _within(bpe.rows(base, steps) if byte_level else spm.rows(base, steps), settings.max_base_pieces, base.next_id)


def _propose_added(base: Base, corpus: Corpus, settings: SelectionConfig, limit: int, terms: Terms) -> list[Row]:
    runs = corpus.runs()
    atoms = wordpiece.atoms_of(runs)
    characters = {atoms.data(n) for n in range(len(atoms.groups))}
    found = merges.candidates(atoms, characters, 2 * limit, min_freq=settings.min_freq, max_chars=settings.max_token_chars)
    sources = {t: s for t, s in terms if s != "lexicon"} | {s.new.decode(): "corpus" for s in found} | {t: s for t, s in terms if s == "lexicon"}
    most = min(settings.max_token_chars, settings.max_base_pieces or settings.max_token_chars)
    allowed = [t for t in sources if 1 < len(t) <= most and HAN_RUN.fullmatch(t)]
    chosen = wordpiece.choose(runs, allowed, limit, settings.min_freq)
    return wordpiece.rows(base, chosen, sources)


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
    out.mkdir(parents=True, exist_ok=True)
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


def counts(data: Json, corpus: Corpus) -> np.ndarray:
    """Weighted uses of every id of a parsed tokenizer in a text, by encoding it; float64 `[highest id + 1]`."""
    return tokens(bare(data), corpus)


def tokens(tokenizer: Any, corpus: Corpus) -> np.ndarray:
    """`counts` for a `tokenizers.Tokenizer`."""
    return tally(tokenizer, corpus.texts(), 1 + max(tokenizer.get_vocab(with_added_tokens=True).values()))


def uses(base: Base, rows: Sequence[Row], corpus: Corpus) -> np.ndarray:
    """Weighted uses of the new tokens in a text, indexed by id (base ids are not counted fully)."""
    triples = bpe.triples(base, rows) if base.kind == "byte_bpe" else None
    if triples is None:
        return counts(appended(base, rows), corpus)
    return merges.segmented(corpus.units(base), triples, base.next_id + len(rows))


def gains(base: Base, rows: Sequence[Row], corpus: Corpus) -> list[float]:
    """Tokens that each row saves on a text, given the rows before it.

    Exact for merges and added tokens. For Unigram bases, whose segmentation is global: uses times (base pieces - 1).
    """
    return measured(base, rows, corpus)[1]


def measured(base: Base, rows: Sequence[Row], corpus: Corpus) -> tuple[np.ndarray, list[float]]:
    """`uses` and `gains` in one pass where that is possible."""
    found = uses(base, rows, corpus)
    if base.kind == "wordpiece":
        return found, wordpiece.marginal(corpus.runs(), [r.token for r in rows])
    if base.kind == "unigram":
        return found, [float(found[r.id]) * max(1, len(r.pieces) - 1) for r in rows]
    if base.kind == "sentencepiece_bpe":
        units, saved = spm.with_characters(base, rows, corpus.units(base))
        fires = merges.simulate(units, spm.ranks(base, rows))
        return found, [fires.get(n, 0.0) + saved.get(n, 0.0) for n in range(len(rows))]
    triples = bpe.triples(base, rows)
    if triples is not None:
        return found, merges.fired(triples, found)
    fires = merges.simulate(corpus.units(base).items(), bpe.ranks(base, rows))
    return found, [fires.get(n, 0.0) for n in range(len(rows))]
