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
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from .counts import PRIVATE, Units, split, tally
from .script import continues, has_script, only_script, whole

if TYPE_CHECKING:
    import numpy as np

Group = tuple[bytes, ...]  # the base tokens of one atom
Cut = Callable[[str], set[int]]  # text of a unit -> character positions that no token may cross


class Step(NamedTuple):
    """One candidate in order of gain: `new` is `left` + `right` (`right` empty: a character that becomes a token without a merge)."""

    gain: float
    left: bytes
    right: bytes

    @property
    def new(self) -> bytes:
        return self.left + self.right


# --- atoms --------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Atoms:
    """The whole-character groups of base tokens that occur in a corpus, and the corpus written in them.

    Args:
        free: every atom may join every other; otherwise no token without Chinese text is made.
        groups: the base tokens of each atom.
        inside: whether the atom may start a token: it holds Chinese text, or the scope is free.
        count: uses of each atom.
        words: the corpus as strings of private code points (one for each atom) with counts; no token spans two words.
    """

    free: bool = False
    groups: list[Group] = field(default_factory=list)
    inside: list[bool] = field(default_factory=list)
    count: list[float] = field(default_factory=list)
    words: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    number: dict[Group, int] = field(default_factory=dict)

    def add(self, groups: Sequence[Group], count: float) -> None:
        """Count one word, given as its groups."""
        numbers = [self.number[g] if g in self.number else self.new(g) for g in groups]
        for n in numbers:
            self.count[n] += count
        if len(numbers) > 1:
            self.words["".join(chr(PRIVATE + n) for n in numbers)] += count

    def new(self, group: Group) -> int:
        """Number a group that was not seen before."""
        text = whole(b"".join(group))
        number = self.number[group] = len(self.groups)
        self.groups.append(group)
        self.inside.append(text is not None and (self.free or has_script(text)))
        self.count.append(0)
        return number

    def data(self, n: int) -> bytes:
        """The bytes of an atom."""
        return b"".join(self.groups[n])

    def text(self, spelled: str) -> bytes:
        """The bytes of a string of private code points."""
        return b"".join(self.data(ord(c) - PRIVATE) for c in spelled)


def atoms_of(units: Units, data: Mapping[int, bytes], *, free: bool, cut: Cut | None = None) -> Atoms:
    """Group the tokens of the units into atoms; a token that begins inside a character belongs to the group before it.

    Args:
        units: the counted corpus.
        data: the bytes of each base token.
        free: see `Atoms`.
        cut: positions that no token may cross (word scope).
    """
    import numpy as np

    atoms = Atoms(free)
    if not len(units.ids):
        return atoms
    within = np.zeros(1 + max(data), dtype=bool)
    within[[i for i, b in data.items() if continues(b)]] = True
    first = ~within[units.ids]
    first[units.starts[:-1]] = True
    begins = np.flatnonzero(first)
    numbers, groups = _numbered(units.ids, begins, np.diff(np.append(begins, len(units.ids))))
    for group in groups:
        atoms.new(tuple(data[i] for i in group))
    unit_of = np.repeat(np.arange(len(units.counts)), units.lengths)[begins]
    atoms.count = np.bincount(numbers, weights=units.counts[unit_of], minlength=len(groups)).tolist()
    inside = np.array(atoms.inside)
    parted = np.ones(len(numbers), dtype=bool)
    parted[1:] = (unit_of[1:] != unit_of[:-1]) | ~(inside[numbers][1:] | inside[numbers][:-1])
    if cut:
        parted |= _cuts(atoms, numbers, unit_of, cut)
    breaks = np.flatnonzero(parted)
    for word, count in zip(split(numbers, breaks[1:]), units.counts[unit_of[breaks]].tolist(), strict=True):
        if len(word) > 1:
            atoms.words[word] += count
    return atoms


def _numbered(ids: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """A number for each group of tokens, and the groups by number."""
    import numpy as np

    numbers = np.empty(len(begins), dtype=np.int64)
    groups: list[tuple[int, ...]] = []
    for length in np.unique(lengths):
        at = np.flatnonzero(lengths == length)
        rows = ids[begins[at][:, None] + np.arange(length)]
        keys, inverse = np.unique(rows, axis=0, return_inverse=True)
        numbers[at] = inverse.reshape(-1) + len(groups)
        groups += [tuple(k) for k in keys.tolist()]
    return numbers, groups


def _cuts(atoms: Atoms, numbers: np.ndarray, unit_of: np.ndarray, cut: Cut) -> np.ndarray:
    """Where a word edge falls on an atom's beginning."""
    import numpy as np

    texts = [atoms.data(n).decode("utf-8", "replace") for n in range(len(atoms.groups))]
    out = np.zeros(len(numbers), dtype=bool)
    edges = np.flatnonzero(np.diff(unit_of, prepend=-1)).tolist()
    for start, stop in pairwise([*edges, len(numbers)]):
        parts = [texts[n] for n in numbers[start:stop].tolist()]
        found, at = cut("".join(parts)), 0
        for n, part in enumerate(parts):
            out[start + n] = at in found
            at += len(part)
    return out


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
    steps = [(s.gain, 0, s) for s in _completions(atoms, known, min_freq, direct)]
    steps += [(s.gain, 1 + i, s) for i, s in enumerate(_joins(atoms, limit, min_freq, max_chars))]
    steps.sort(key=lambda item: (-item[0], item[1]))
    return list(_possible((s for _, _, s in steps), set(known), limit, max_chars))


def _completions(atoms: Atoms, known: set[bytes], min_freq: int, direct: bool) -> Iterator[Step]:
    """Steps that make one token of an atom that the base writes in several; a chain from the left.

    A beginning that other text shares (the first two bytes of full-width `，` begin full-width `ａ` too) must not become a token: that would change it.
    """
    wanted = [n for n, group in enumerate(atoms.groups) if len(group) > 1 and atoms.inside[n] and atoms.count[n] >= min_freq]
    for n in sorted(wanted, key=lambda n: (-atoms.count[n] * (len(atoms.groups[n]) - 1), atoms.groups[n])):
        group, gain = atoms.groups[n], atoms.count[n] * (len(atoms.groups[n]) - 1)
        if direct:
            yield Step(gain, atoms.data(n), b"")
            continue
        beginnings = [b"".join(group[: i + 1]) for i in range(1, len(group) - 1)]
        if atoms.free or all(only_script(b) for b in beginnings):
            for left, right in zip([group[0], *beginnings], group[1:], strict=True):
                yield Step(gain, left, right)


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
    merges = [(m[0], m[1]) for m in json.loads(inner.to_str())["model"]["merges"]]
    uses = tally(inner, atoms.words.items(), inner.get_vocab_size())
    vocab = inner.get_vocab()
    fires = fired([(vocab[a], vocab[b], vocab[a + b]) for a, b in merges], uses)
    least, out = float("inf"), []
    for (left, right), count in zip(merges, fires, strict=True):
        least = min(least, count)  # the trainer's order is kept; two ways to one token blur the counts a little
        out.append(Step(least, atoms.text(left), atoms.text(right)))
    return out


def _repeated(words: Mapping[str, float]) -> Iterator[str]:
    """Each word as often as it was counted, many to a string: the trainer takes no counts."""
    batch: list[str] = []
    size = 0
    for word, count in words.items():
        times = round(count)
        for done in range(0, times, 1000):
            batch.append(f"{word} " * min(1000, times - done))
            size += len(batch[-1])
        if size > 1 << 16:
            yield "".join(batch)
            batch, size = [], 0
    yield "".join(batch)


def _possible(steps: Iterable[Step], known: set[bytes], limit: int, max_chars: int) -> Iterator[Step]:
    """Steps whose parts exist by then, until `limit` new tokens; a step that repeats an earlier one is left out."""
    seen, new = set[tuple[bytes, bytes]](), 0
    for step in steps:
        if step[1:] in seen or (step.right and (step.left not in known or step.right not in known)):
            continue
        if (not step.right and step.left in known) or len(step.new.decode("utf-8", "replace")) > max_chars:
            continue
        seen.add(step[1:])
        new += step.new not in known
        known.add(step.new)
        yield step
        if new == limit:
            return


# --- measuring ----------------------------------------------------------------------------------------------------------------------------

Triple = tuple[int, int, int]  # left, right, new


def fired(merges: Sequence[Triple], uses: np.ndarray) -> list[float]:
    """How often each merge happens, from the uses of every token in the final segmentation: its token's uses and those as a part of later merges.

    Later merges never influence earlier ones, so the sum over the first k merges is exactly what those k alone save.
    """
    left = uses.tolist()
    out = [0.0] * len(merges)
    for n in range(len(merges) - 1, -1, -1):
        a, b, new = merges[n]
        out[n] = left[new]
        left[a] += out[n]
        left[b] += out[n]
    return out


def segmented(units: Units, merges: Sequence[Triple], size: int) -> np.ndarray:
    """Uses of each id below `size` once the merges, in their order, have been applied to the units; float64 `[size]`."""
    from tokenizers import Tokenizer, models

    spelled = {int(i): chr(PRIVATE + int(i)) for i in set(units.ids.tolist())}
    pairs = []
    for a, b, new in merges:
        if a in spelled and b in spelled:
            spelled[new] = spelled[a] + spelled[b]
            pairs.append((spelled[a], spelled[b]))
    inner = Tokenizer(models.BPE(vocab={s: i for i, s in spelled.items()}, merges=pairs))
    return tally(inner, zip(units.strings(), units.counts.tolist(), strict=True), size)


def simulate(units: Iterable[tuple[tuple[int, ...], float]], ranks: Mapping[tuple[int, int], tuple[int, int]]) -> dict[int, float]:
    """Apply ranked merges `(left, right) -> (rank, new)` to id sequences exactly as BPE does; rank -> how often it happened.

    Slower than `segmented` and `fired`, and right also where a token can come about in several ways.
    """
    fires = defaultdict[int, float](float)
    for unit, count in units:
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
