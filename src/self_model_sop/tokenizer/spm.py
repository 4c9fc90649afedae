"""Extending SentencePiece bases: BPE (Llama 2) by pieces with all their merges, Unigram by pieces with scores; `.model` kept in step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DATA, SopError
from .base import SENTENCEPIECE, Base, pinned
from .counts import Texts, Units, on_runs
from .merges import Atoms, Step
from .plan import Row
from .script import SCRIPT_RUN, continues
from .settings import Json

_MARGIN = 0.1  # a new Unigram piece beats the best older segmentation of its text by so much
_CONTROL, _USER_DEFINED, _NORMAL = 3, 4, 1  # SentencePiece.Type


# --- candidates ---------------------------------------------------------------------------------------------------------------------------


def unigram_atoms(base: Base, texts: Texts) -> Atoms:
    """The Chinese runs of the corpus in the pieces of a Unigram base; an unknown character counts as two, so that knowing it is worth a token."""
    runs: dict[str, float] = {}
    for text, weight in texts:
        for run in SCRIPT_RUN.findall(text):
            runs[run] = runs.get(run, 0) + weight
    tokenizer, atoms = on_runs(base), Atoms()
    unknown = base.data["model"].get("unk_id")
    keys = iter(runs)
    while part := list(islice(keys, 4096)):
        for run, encoding in zip(part, tokenizer.encode_batch(part, add_special_tokens=False), strict=True):
            atoms.add(list(_groups(run, encoding, unknown)), runs[run])
    return atoms


def _groups(run: str, encoding: Any, unknown: int | None) -> Iterable[tuple[bytes, ...]]:
    at = -1
    for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
        if start < at:  # a further byte of the same character
            continue
        at = stop
        cost = sum(1 for s, _ in encoding.offsets if s == start)
        for text in run[start:stop] if i == unknown or cost > 1 else (run[start:stop],):
            yield (text.encode(),) if i != unknown and cost == 1 else (text.encode()[:1], text.encode()[1:])


def rows(base: Base, steps: Iterable[Step]) -> list[Row]:
    """Steps as plan rows; a single character that the vocabulary lacks needs no merge."""
    ids = dict(base.vocab)
    tokenizer = on_runs(base)
    out: list[Row] = []
    for step in steps:
        token = step.new.decode()
        if token in ids:
            continue
        merge = (step.left.decode(), step.right.decode()) if step.right else None
        if merge and not (merge[0] in ids and merge[1] in ids):
            continue
        ids[token] = base.next_id + len(out)
        out.append(Row(ids[token], token, step.new, merge, tokenizer.encode(token, add_special_tokens=False).ids))
    return out


# --- appending ----------------------------------------------------------------------------------------------------------------------------


def append_bpe(base: Base, plan: Sequence[Row]) -> Json:
    """New pieces behind every id. All ways to part a new piece in two become merges, as SentencePiece itself joins whatever makes a piece."""
    data = pinned(base.data)
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    joined = bool(merges) and isinstance(merges[0], str)
    vocab.update({row.token: row.id for row in plan})
    for row in plan:
        for left, right in splits(row, vocab):
            merges.append(f"{left} {right}" if joined else [left, right])
    return data


def splits(row: Row, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to part a piece into two others, the plan's own first."""
    parts = ((row.token[:i], row.token[i:]) for i in range(1, len(row.token)))
    found = [p for p in parts if p[0] in vocab and p[1] in vocab]
    return sorted(found, key=lambda p: p != row.merge)


def ranks(base: Base, plan: Sequence[Row]) -> dict[tuple[int, int], tuple[int, int]]:
    """`(left id, right id) -> (rank, new id)` for `simulate`."""
    vocab = base.vocab | {row.token: row.id for row in plan}
    return {(vocab[a], vocab[b]): (n, row.id) for n, row in enumerate(plan) for a, b in splits(row, vocab)}


def append_unigram(base: Base, plan: Sequence[Row]) -> Json:
    """New pieces behind every id, each with a score that beats the best older segmentation of its text, and no more."""
    data = pinned(base.data)
    vocab = data["model"]["vocab"]
    lowest = min(score for _, score in vocab)
    for i in range(len(vocab), base.next_id):  # added tokens outside of the list hold these ids; a piece that no text reaches keeps the place
        vocab.append([base.added.get(i, f"<unused_{i}>"), lowest * 100])
    score = dict(vocab)
    for row in plan:
        score[row.token] = max(lowest, _best(row.token, score, lowest - 10) + _MARGIN)
        vocab.append([row.token, score[row.token]])
    return data


def _best(text: str, score: Mapping[str, float], unknown: float) -> float:
    """The score of the best segmentation of a text (Viterbi)."""
    best = [0.0] + [float("-inf")] * len(text)
    for stop in range(1, len(text) + 1):
        for start in range(stop):
            found = score.get(text[start:stop], unknown if stop - start == 1 else None)
            if found is not None:
                best[stop] = max(best[stop], best[start] + found)
    return best[-1]


def model_file(base: Base) -> Path | None:
    """The SentencePiece model beside a tokenizer.json, if there is one."""
    return next((base.folder / name for name in SENTENCEPIECE if (base.folder / name).is_file()), None)


def write_model(base: Base, data: Json, plan: Sequence[Row], out: Path) -> None:
    """Append the plan's pieces to the folder's SentencePiece model, so that it says the same as the extended `tokenizer.json`.

    Raises:
        SopError: where the base's own two files disagree about an id.
    """
    path = model_file(base)
    if path is None or not plan:
        return
    proto = _proto()
    proto.ParseFromString(path.read_bytes())
    if len(proto.pieces) > base.next_id or any(base.vocab.get(p.piece) not in (i, None) for i, p in enumerate(proto.pieces) if p.type == _NORMAL):
        raise SopError(f"{path.name} and tokenizer.json of the base give different ids", where=str(base.folder), fix="remove one of the two", code=DATA)
    special = {a["id"]: a for a in data["added_tokens"]}
    lowest = min(p.score for p in proto.pieces)
    for i in range(len(proto.pieces), base.next_id):
        held = special.get(i, {"content": f"<unused_{i}>", "special": True})
        proto.pieces.add(piece=held["content"], score=0.0, type=_CONTROL if held["special"] else _USER_DEFINED)
    scores = dict(map(tuple, data["model"]["vocab"][base.next_id :])) if base.kind == "unigram" else {}
    for n, row in enumerate(plan):
        proto.pieces.add(piece=row.token, score=scores.get(row.token, lowest - 1 - n), type=_NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    (out / path.name).write_bytes(proto.SerializeToString())


def _proto() -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto()


def with_characters(base: Base, plan: Sequence[Row], units: Units) -> tuple[list[tuple[tuple[int, ...], float]], dict[int, float]]:
    """Units in which the bytes of each new single-character piece are that piece; and rank -> tokens that this saved."""
    whole = {tuple(row.pieces): (n, row.id) for n, row in enumerate(plan) if row.merge is None}
    within = {i for i, b in base.bytes_of.items() if continues(b)}
    out, saved = [], defaultdict[int, float](float)
    for unit, count in units.items():
        ids: list[int] = []
        for group in _grouped(unit, within):
            found = whole.get(group)
            ids += [found[1]] if found else group
            if found:
                saved[found[0]] += count * (len(group) - 1)
        out.append((tuple(ids), count))
    return out, saved


def _grouped(unit: tuple[int, ...], within: set[int]) -> Iterable[tuple[int, ...]]:
    group: tuple[int, ...] = ()
    for i in unit:
        if group and i not in within:
            yield group
            group = ()
        group += (i,)
    yield group
