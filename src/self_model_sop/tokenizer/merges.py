"""Continued BPE: learn further merges on top of a base tokenizer's own segmentation (method: arXiv 2512.03989), with public parts only.

The base tokens of the corpus are grouped into whole characters (an *atom*: one or more base tokens), every atom becomes one private code point,
and the library's BPE trainer learns merges over the counted strings. Completing a character that the base writes in several tokens competes with
joining atoms by the same measure, tokens saved. So a new token never begins or ends inside a character, but for the shared beginnings that
completing needs. In scope `script` every new token holds Chinese text, therefore text without any encodes exactly as before, by construction.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, NamedTuple

from .base import Base, bare
from .script import SCRIPT_RUN, continues, has_script, whole

_PRIVATE = 0x10000
_BATCH = 256
_CHARACTERS = 1 << 22

Unit = tuple[int, ...]
Texts = Iterable[tuple[str, float]]
Units = Mapping[Unit, float]  # counted id sequences


class Step(NamedTuple):
    """One candidate in order of gain: `new` is `left` + `right` (`right` empty: a character that becomes a token without a merge)."""

    gain: float
    left: bytes
    right: bytes

    @property
    def new(self) -> bytes:
        return self.left + self.right


# --- what the base tokenizer makes of the corpus ------------------------------------------------------------------------------------------


def count_pretokens(base: Base, texts: Texts) -> Units:
    """Count the pre-tokens of two or more base tokens, as tuples of base ids, in their real context (weights of the texts included)."""
    import numpy as np

    tokenizer, counted = base.bare(), defaultdict[bytes, float](float)
    for batch, weights in _batches(texts):
        for encoding, weight in zip(tokenizer.encode_batch(batch, add_special_tokens=False), weights, strict=True):
            ids = np.array(encoding.ids, dtype=np.uint32)
            words = np.array([-1 if w is None else w for w in encoding.word_ids], dtype=np.int64)
            edges = [0, *(np.flatnonzero(np.diff(words)) + 1).tolist(), len(ids)]
            data = ids.tobytes()
            for start, stop in pairwise(edges):
                if stop - start > 1:
                    counted[data[4 * start : 4 * stop]] += weight
    return {tuple(np.frombuffer(key, dtype=np.uint32).tolist()): count for key, count in counted.items()}


def count_runs(base: Base, texts: Texts) -> Units:
    """Count the runs of Chinese text, as tuples of base ids; for tokenizers without pre-tokens (SentencePiece)."""
    runs = defaultdict[str, float](float)
    for text, weight in texts:
        for run in SCRIPT_RUN.findall(text):
            runs[run] += weight
    tokenizer = bare({**base.data, "normalizer": None, "pre_tokenizer": None})
    counted = defaultdict[Unit, float](float)
    keys = iter(runs)
    while part := list(islice(keys, 4096)):
        for run, encoding in zip(part, tokenizer.encode_batch(part, add_special_tokens=False), strict=True):
            counted[tuple(encoding.ids)] += runs[run]
    return counted


def _batches(texts: Texts) -> Iterator[tuple[list[str], list[float]]]:
    batch: list[str] = []
    weights: list[float] = []
    size = 0
    for text, weight in texts:
        batch.append(text)
        weights.append(weight)
        size += len(text)
        if len(batch) >= _BATCH or size > _CHARACTERS:
            yield batch, weights
            batch, weights, size = [], [], 0
    if batch:
        yield batch, weights


# --- atoms --------------------------------------------------------------------------------------------------------------------------------

Group = tuple[bytes, ...]  # the base tokens of one atom
Cut = Callable[[str], set[int]]


@dataclass
class Atoms:
    """The whole-character groups of base tokens that occur in a corpus, and the corpus written in them."""

    free: bool = False  # every atom may join every other; otherwise no token without Chinese text is made
    cut: Cut | None = None  # text of a unit -> character positions that no token may cross (word scope)
    groups: list[Group] = field(default_factory=list)
    inside: list[bool] = field(default_factory=list)  # may start a token: holds Chinese text, or the scope is free
    count: list[float] = field(default_factory=list)
    words: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    number: dict[Group, int] = field(default_factory=dict)

    def add(self, groups: Sequence[Group], count: float) -> None:
        """Count one unit, given as the groups of its base tokens."""
        numbers = [self.number[g] if g in self.number else self._new(g) for g in groups]
        for n in numbers:
            self.count[n] += count
        for word in self._words(numbers):
            self.words[word] += count

    def data(self, n: int) -> bytes:
        """The bytes of an atom."""
        return b"".join(self.groups[n])

    def text(self, spelled: str) -> bytes:
        """The bytes of a string of private code points."""
        return b"".join(self.data(ord(c) - _PRIVATE) for c in spelled)

    def _new(self, group: Group) -> int:
        text = whole(b"".join(group))
        number = self.number[group] = len(self.groups)
        self.groups.append(group)
        self.inside.append(text is not None and (self.free or has_script(text)))
        self.count.append(0)
        return number

    def _words(self, numbers: Sequence[int]) -> Iterator[str]:
        """The unit as strings of private code points, parted where two neighbours are both outside the script, and at word edges."""
        edges = self.cut(b"".join(self.data(n) for n in numbers).decode("utf-8", "replace")) if self.cut else ()
        word, before, at = "", True, 0
        for n in numbers:
            if len(word) > 0 and (at in edges or not (before or self.inside[n])):
                if len(word) > 1:
                    yield word
                word = ""
            word += chr(_PRIVATE + n)
            before = self.inside[n]
            at += len(self.data(n).decode("utf-8", "replace")) if edges else 0
        if len(word) > 1:
            yield word


def grouped(units: Units, data: Mapping[int, bytes], into: Atoms) -> Atoms:
    """Add id sequences to `into`; a token that begins inside a character belongs to the group before it."""
    within = {i for i, b in data.items() if continues(b)}
    for unit, count in units.items():
        groups: list[Group] = []
        for i in unit:
            if groups and i in within:
                groups[-1] = (*groups[-1], data[i])
            else:
                groups.append((data[i],))
        into.add(groups, count)
    return into


# --- learning -----------------------------------------------------------------------------------------------------------------------------


def candidates(atoms: Atoms, known: set[bytes], limit: int, *, min_freq: int, max_chars: int, direct: bool = False) -> list[Step]:
    """At least `limit` new tokens where the corpus supports so many, as steps in order of tokens saved; steps to existing tokens come for free.

    Args:
        atoms: the counted corpus.
        known: the bytes of the base tokens.
        limit: wanted number of new tokens.
        min_freq: fewest uses of a step.
        max_chars: longest token, in characters.
        direct: a character becomes a token at once (SentencePiece), not by merging its parts.
    """
    steps = [(s.gain, 0, s) for s in _completions(atoms, min_freq, direct)]
    steps += [(s.gain, 1 + i, s) for i, s in enumerate(_joins(atoms, limit, min_freq, max_chars))]
    steps.sort(key=lambda item: (-item[0], item[1]))
    return list(_possible((s for _, _, s in steps), set(known), limit, max_chars))


def _completions(atoms: Atoms, min_freq: int, direct: bool) -> Iterator[Step]:
    """Steps that make one token of an atom that the base writes in several; a chain from the left."""
    wanted = [n for n, group in enumerate(atoms.groups) if len(group) > 1 and atoms.inside[n] and atoms.count[n] >= min_freq]
    for n in sorted(wanted, key=lambda n: (-atoms.count[n] * (len(atoms.groups[n]) - 1), atoms.groups[n])):
        group, gain = atoms.groups[n], atoms.count[n] * (len(atoms.groups[n]) - 1)
        if direct:
            yield Step(gain, atoms.data(n), b"")
            continue
        left = group[0]
        for right in group[1:]:
            yield Step(gain, left, right)
            left += right


def _joins(atoms: Atoms, limit: int, min_freq: int, max_chars: int) -> list[Step]:
    """Merges of atoms by the library's BPE trainer, with the count of each at its time."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if not atoms.words:
        return []
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    alphabet = len(set().union(*atoms.words))
    trainer = trainers.BpeTrainer(vocab_size=alphabet + limit, min_frequency=max(1, min_freq), show_progress=False, initial_alphabet=[], max_token_length=max_chars)
    inner.train_from_iterator(_repeated(atoms.words), trainer)
    merges = [tuple(m) for m in json.loads(inner.to_str())["model"]["merges"]]
    fires = _fires(inner, merges, atoms.words)
    least, out = float("inf"), []
    for (left, right), count in zip(merges, fires, strict=True):
        least = min(least, count)  # the trainer's order is kept; two ways to one token blur the counts a little
        out.append(Step(least, atoms.text(left), atoms.text(right)))
    return out


def _repeated(words: Mapping[str, float]) -> Iterator[str]:
    """Each word as often as it was counted, many to a string: the trainer takes no counts."""
    for word, count in words.items():
        for done in range(0, round(count), 1000):
            yield f"{word} " * min(1000, round(count) - done)


def _fires(inner: Any, merges: Sequence[tuple[str, ...]], words: Mapping[str, float]) -> list[float]:
    """How often each merge happens: uses of its token in the final segmentation plus those as a part of later merges."""
    import numpy as np

    vocab = inner.get_vocab()
    uses = np.zeros(len(vocab))
    keys = iter(words)
    while part := list(islice(keys, 8192)):
        encodings = inner.encode_batch_fast(part, add_special_tokens=False)
        lengths = [len(e.ids) for e in encodings]
        ids = np.fromiter((i for e in encodings for i in e.ids), dtype=np.int64, count=sum(lengths))
        uses += np.bincount(ids, weights=np.repeat([words[w] for w in part], lengths), minlength=len(vocab))
    out = [0.0] * len(merges)
    for n in range(len(merges) - 1, -1, -1):
        left, right = merges[n]
        out[n] = count = float(uses[vocab[left + right]])
        uses[vocab[left]] += count
        uses[vocab[right]] += count
    return out


def _possible(steps: Iterable[Step], known: set[bytes], limit: int, max_chars: int) -> Iterator[Step]:
    """Steps whose parts exist by then, until `limit` new tokens; a step that repeats an earlier one is left out."""
    seen, new = set[tuple[bytes, bytes]](), 0
    for step in steps:
        if step[1:] in seen or (step.right and (step.left not in known or step.right not in known)):
            continue
        if not step.right and step.left in known:
            continue
        seen.add(step[1:])
        if len(step.new.decode("utf-8", "replace")) > max_chars:
            continue
        new += step.new not in known
        known.add(step.new)
        yield step
        if new == limit:
            return


# --- measuring ----------------------------------------------------------------------------------------------------------------------------


def simulate(units: Units, ranks: Mapping[tuple[int, int], tuple[int, int]]) -> dict[int, float]:
    """Apply ranked merges `(left, right) -> (rank, new)` to id sequences exactly as BPE does; rank -> how often it happened.

    Later merges never influence earlier ones, so the sum over the first k ranks is exactly what those k alone save.
    """
    fires = defaultdict[int, float](float)
    for unit, count in units.items():
        ids = list(unit)
        while len(ids) > 1:
            best = min((ranks[p] for p in pairwise(ids) if p in ranks), default=None)
            if best is None:
                break
            at = 0
            while at < len(ids) - 1:
                if ranks.get((ids[at], ids[at + 1])) == best:
                    ids[at : at + 2] = [best[1]]
                    fires[best[0]] += count
                at += 1
    return fires
