"""Extending WordPiece bases (BERT): Chinese is split into characters before the model, so only added tokens are ever reached."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .base import Base, pinned
from .counts import Texts
from .merges import Atoms
from .plan import Row
from .script import HAN_RUN
from .settings import Json

_SHARE = 0.2  # of the candidates above the limit that each round of pruning drops


def runs_of(texts: Texts) -> dict[str, float]:
    """Counted runs of Chinese characters."""
    runs = defaultdict[str, float](float)
    for text, weight in texts:
        for run in HAN_RUN.findall(text):
            runs[run] += weight
    return runs


def atoms_of(runs: Mapping[str, float]) -> Atoms:
    """The runs in single characters, as the base sees them."""
    atoms = Atoms()
    for run, count in runs.items():
        atoms.add([(c.encode(),) for c in run], count)
    return atoms


def choose(runs: Mapping[str, float], terms: Iterable[str], limit: int, min_freq: int) -> list[tuple[str, float]]:
    """The `limit` terms that save most, with what each saves, best first.

    All candidates compete in one segmentation of the corpus (leftmost, longest: as the library matches added tokens); the weakest fifth goes, and the rest
    is measured again, until `limit` are left. A term's gain is its uses times (characters - 1).
    """
    kept = dict.fromkeys(t for t in terms if len(t) > 1)
    while True:
        uses = used(runs, kept)
        gain = {t: uses[t] * (len(t) - 1) for t in kept if uses[t] >= min_freq}
        ranked = sorted(gain, key=lambda t: (-gain[t], t))
        if len(ranked) <= limit and len(ranked) == len(kept):
            return [(t, gain[t]) for t in ranked]
        drop = max(1, int((len(ranked) - limit) * _SHARE) if len(ranked) - limit > 50 else len(ranked) - limit)
        kept = dict.fromkeys(ranked[: len(ranked) - drop] if len(ranked) > limit else ranked)


def used(runs: Mapping[str, float], terms: Mapping[str, object]) -> dict[str, float]:
    """Uses of each term in the leftmost-longest segmentation."""
    longest, uses = max(map(len, terms), default=0), defaultdict[str, float](float)
    for run, count in runs.items():
        for term in segment(run, terms, longest):
            uses[term] += count
    return uses


def segment(run: str, terms: Mapping[str, object], longest: int) -> Iterator[str]:
    """The terms that a run is matched with, from the left, the longest first."""
    at, size = 0, len(run)
    while at < size:
        for n in range(min(longest, size - at), 1, -1):
            if run[at : at + n] in terms:
                yield run[at : at + n]
                at += n
                break
        else:
            at += 1


def marginal(runs: Mapping[str, float], terms: Sequence[str]) -> list[float]:
    """What each term saves on the runs, given the terms before it: exact, since every run that holds the term is segmented again."""
    index: dict[str, list[str]] = {t: [] for t in terms}
    longest = max(map(len, terms), default=0)
    for run in runs:
        for term in {run[i : i + n] for i in range(len(run)) for n in range(2, longest + 1) if run[i : i + n] in index}:
            index[term].append(run)
    present: dict[str, None] = {}
    saved: dict[str, int] = {}
    out = []
    for term in terms:
        present[term] = None
        gain = 0.0
        for run in index[term]:
            now = sum(len(t) - 1 for t in segment(run, present, longest))
            gain += (now - saved.get(run, 0)) * runs[run]
            saved[run] = now
        out.append(gain)
    return out


def rows(base: Base, terms: Iterable[str], sources: Mapping[str, str]) -> list[Row]:
    """Terms as plan rows; their pieces are what the base writes them in."""
    tokenizer, out = base.bare(), list[Row]()
    taken = {*base.vocab, *base.added.values()}
    for term in terms:
        if term not in taken:
            pieces = tokenizer.encode(term, add_special_tokens=False).ids
            out.append(Row(base.next_id + len(out), term, term.encode(), None, pieces, source=sources.get(term, "corpus")))
    return out


def append(base: Base, plan: Sequence[Row]) -> Json:
    """Added tokens behind every id, matched in the text as it is, before any normalising; each also stands in the vocabulary with its id."""
    data = pinned(base.data)
    for row in plan:
        data["model"]["vocab"][row.token] = row.id
        data["added_tokens"].append({"id": row.id, "content": row.token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False})
    return data
