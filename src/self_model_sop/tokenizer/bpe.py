"""Extending byte-level BPE bases (GPT-2, Qwen, Llama 3, DeepSeek, SmolLM): new tokens with real merges, appended behind everything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .base import Base, pinned, spell
from .merges import Step, Triple
from .plan import Merge, Row
from .settings import Json


def rows(base: Base, steps: Iterable[Step]) -> list[Row]:
    """Steps as plan rows with ids behind the base's; steps between existing tokens ride with the row after them."""
    ids = dict(base.vocab.items())
    pieces = {token: [i] for token, i in base.vocab.items()}
    known = set(merges_of(base.data))
    out: list[Row] = []
    waiting: list[Merge] = []
    for step in steps:
        merge = spell(step.left), spell(step.right)
        token = merge[0] + merge[1]
        if merge in known or not all(part in ids for part in merge):
            continue
        known.add(merge)
        if token in ids:
            waiting.append(merge)
            continue
        ids[token] = base.next_id + len(out)
        pieces[token] = pieces[merge[0]] + pieces[merge[1]]
        out.append(Row(ids[token], token, step.new, merge, pieces[token], tuple(waiting)))
        waiting = []
    return out


def merges_of(data: Json) -> list[Merge]:
    """The merges of a parsed `tokenizer.json`, whose files spell them as `"a b"` or as `["a", "b"]`."""
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else (m[0], m[1]) for m in data["model"]["merges"]]  # type: ignore[misc]


def append(base: Base, plan: Sequence[Row]) -> Json:
    """The base's JSON with new ids after every existing one and new merges after every base merge."""
    data = pinned(base.data)
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    joined = bool(merges) and isinstance(merges[0], str)
    for row in plan:
        vocab[row.token] = row.id
        for left, right in [*row.also, *([row.merge] if row.merge else [])]:
            merges.append(f"{left} {right}" if joined else [left, right])
    return data


def triples(base: Base, plan: Sequence[Row]) -> list[Triple] | None:
    """The plan's merges as ids, or None where a free merge makes a base token, which takes base merges too (see `ranks`)."""
    if any(row.also for row in plan):
        return None
    vocab = base.vocab | {row.token: row.id for row in plan}
    return [(vocab[row.merge[0]], vocab[row.merge[1]], row.id) for row in plan if row.merge]


def ranks(base: Base, plan: Sequence[Row]) -> Mapping[tuple[int, int], tuple[int, int]]:
    """`(left id, right id) -> (rank, new id)` for `simulate`; new rows have the ranks 0, 1, ..., what is free has others.

    Base merges have negative ranks. They are needed only where a free merge makes a base token, which may then take part in them.
    """
    vocab = base.vocab | {row.token: row.id for row in plan}
    out: dict[tuple[int, int], tuple[int, int]] = {}
    if any(row.also for row in plan):
        base_merges = merges_of(base.data)
        for n, (left, right) in enumerate(base_merges):
            if left + right in vocab:
                out[vocab[left], vocab[right]] = (n - len(base_merges), vocab[left + right])
    for n, row in enumerate(plan):
        for left, right in row.also:
            out[vocab[left], vocab[right]] = (n, vocab[left + right])
        if row.merge:
            out[vocab[row.merge[0]], vocab[row.merge[1]]] = (n, row.id)
    return out


def reaches(backend: Any, row: Row) -> bool:
    """True if merging the token's own bytes ends in the token."""
    found = backend.model.tokenize(row.token)
    return len(found) == 1 and found[0].id == row.id
