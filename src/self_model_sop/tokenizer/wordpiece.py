"""Extending WordPiece bases (BERT): Chinese is split into characters before the model, so only added tokens are ever reached."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .base import Base, pinned
from .counts import Texts, tally
from .merges import Atoms
from .plan import Row
from .script import HAN_RUN
from .settings import Json

_MOST_RUNS = 400_000  # unique runs that the choice is measured on


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


def choose(runs: Mapping[str, float], terms: Iterable[str], limit: int, min_freq: int) -> list[str]:
    """The `limit` terms that save most, most valuable first, so that any beginning of the list is a good choice too.

    All candidates compete in one segmentation of the corpus (leftmost, longest: as the library matches added tokens). A term's value is what its
    absence would cost: its uses times the further tokens that its text would then take, in other terms and single characters. The least valuable
    go, the rest is measured again; the order is that in which they would go.
    """
    kept = dict.fromkeys(t for t in terms if len(t) > 1)
    runs = _frequent(runs)
    gone: list[str] = []
    while kept:
        value = _values(runs, kept, min_freq)
        ranked = sorted(value, key=lambda t: (-value[t], t))
        kept = dict.fromkeys(ranked)
        size = _next_size(len(ranked), limit)
        if len(ranked) <= limit:
            gone += ranked[size:][::-1]
        kept = dict.fromkeys(ranked[:size])
    return gone[::-1]


def _next_size(size: int, limit: int) -> int:
    """How many terms the next round keeps: down to the limit in halves of the excess, then a quarter less each time."""
    if size > limit:
        return limit + (size - limit) // 2 if size - limit > 50 else limit
    return size * 3 // 4 if size > 100 else 0


def _frequent(runs: Mapping[str, float]) -> dict[str, float]:
    """The runs that make up most of the text."""
    return dict(sorted(runs.items(), key=lambda item: (-item[1] * len(item[0]), item[0]))[:_MOST_RUNS])


def _values(runs: Mapping[str, float], terms: Mapping[str, object], min_freq: int) -> dict[str, float]:
    """Uses times further tokens without the term; terms below `min_freq` uses are left out."""
    longest, uses = max(map(len, terms)), used(runs, terms)
    out = {}
    for term in terms:
        if uses[term] >= min_freq:
            joined = sum(len(t) - 1 for t in segment(term, terms, min(longest, len(term) - 1)))
            out[term] = uses[term] * (len(term) - 1 - joined)
    return out


def used(runs: Mapping[str, float], terms: Iterable[str]) -> dict[str, float]:
    """Uses of each term in the leftmost-longest segmentation, by the library itself."""
    from tokenizers import AddedToken, Tokenizer, models

    terms = list(dict.fromkeys(terms))
    tokenizer = Tokenizer(models.WordLevel(vocab={"?": 0}, unk_token="?"))
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in terms])
    uses = tally(tokenizer, runs.items(), len(terms) + 1)
    return dict(zip(terms, uses[1:].tolist(), strict=True))


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
    tokenizer, out = base.tokenizer, list[Row]()
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
