"""What quantisation is calibrated on: the project's own processed text, chosen by a seed, and never a row of the text that the result is judged on."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import errors
from ..data.formats import RowError, detect, to_messages, to_preference, to_text, tools_of
from ..data.records import Record, files_of, read
from ..errors import SopError

_PARTS = ("pretrain", "finetune")  # of a processed folder: preference pairs hold answers that the model shall not give
_NAMES = ("train.jsonl", "train.parquet")


class Calibration(NamedTuple):
    """Token ids `[samples][length]`, and where they come from."""

    samples: list[list[int]]
    facts: dict[str, Any]


class _Row(NamedTuple):
    """A row and its place in the seeded order; `number` only keeps the comparison of two rows from reaching the row itself."""

    key: bytes
    number: int
    record: Record


def training_files(paths: Sequence[Path]) -> list[Path]:
    """The files that calibration reads; a folder that `sop data process` wrote stands for its pretraining passages and conversations.

    Raises:
        SopError: for a folder without them.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        folders = [folder for part in _PARTS if (folder := path / part).is_dir()] or [path]
        inside = [file for folder in folders if (file := next((folder / name for name in _NAMES if (folder / name).is_file()), None))]
        if not inside:
            fix = "point to a folder of sop data process (pretrain/train.jsonl, finetune/train.jsonl), or to files"
            raise SopError("no processed training data in this folder", where=str(path), fix=fix)
        found += inside
    return found


def collect(files: Sequence[Path], tokenizer: Any, *, samples: int, length: int, seed: int, heldout: Path | None = None) -> Calibration:
    """`samples` windows of `length` tokens, filled with passages and conversations in the order of a seeded hash.

    A conversation is written by the chat template, a passage ends as in pretraining. Of a long one the first `length` tokens are taken, so that many texts take
    part; what is left of them follows where all texts together do not suffice. The order depends on seed and texts alone, not on files or lines, and equal texts
    count once. Memory: as many rows as there are tokens to fill.

    Args:
        files: rows of any format.
        tokenizer: fast; without a chat template conversations are read as plain text.
        heldout: what the result will be judged on.

    Raises:
        SopError: exit 3 where the text is too little, or shares rows with `heldout`.
    """
    from ..train.template import renderer_for
    from ..train.textdata import document_end

    unread: Counter[str] = Counter()
    shared: list[Record] = []
    total = Counter[str]()
    judged = _digests(heldout)
    chosen = heapq.nsmallest(samples * length, _rows(files, seed, judged, unread, shared, total))
    if shared:
        raise SopError(
            f"{len(shared):,} of the {total['rows']:,} calibration rows are in the held-out text too: the result would be judged on what it was fitted to",
            where=f"{shared[0].file}:{shared[0].line}", fix=f"calibrate on other rows, or judge on other text than {heldout}", code=errors.DATA,
        )  # fmt: skip
    renderer = renderer_for(tokenizer) if tokenizer.chat_template else None
    end = document_end(tokenizer, "auto")
    ids: list[int] = []
    rest: list[list[int]] = []
    used: Counter[str] = Counter()
    for row in chosen:
        if len(ids) >= samples * length:
            break
        try:
            kind, found = _encode(row.record, tokenizer, renderer, end)
        except (RowError, SopError) as error:
            unread[error.reason if isinstance(error, RowError) else "template_refuses"] += 1
            continue
        used[kind] += 1
        ids += found[:length]
        rest.append(found[length:])
    for left in rest:
        ids += left if len(ids) < samples * length else []
    if len(ids) < samples * length:
        enough = f"--calib_samples {len(ids) // length}" if len(ids) >= length else "a smaller --calib_seq_len"
        raise SopError(
            f"the calibration text has {len(ids):,} tokens; {samples} samples of {length} need {samples * length:,}",
            where=", ".join(map(str, files)), fix=f"give more of your text (--calib_data), or {enough}", code=errors.DATA,
        )  # fmt: skip
    windows = [ids[at : at + length] for at in range(0, samples * length, length)]
    facts = {
        "samples": samples, "length": length, "tokens": samples * length, "rows": total["rows"], "equal_rows": total["equal"], "unread": dict(sorted(unread.items())),
        "rows_used": used.total(), "passages": used["passages"], "conversations": used["conversations"],
    }  # fmt: skip
    return Calibration(windows, facts)


def _digest(text: str) -> bytes:
    """Equal for texts that differ in white space alone."""
    return hashlib.sha256("".join(text.split()).encode("utf-8", "replace")).digest()


def _digests(heldout: Path | None) -> frozenset[bytes]:
    from ..eval.sets import documents

    return frozenset(map(_digest, documents(heldout).items)) if heldout else frozenset()


def _rows(files: Sequence[Path], seed: int, judged: frozenset[bytes], unread: Counter[str], shared: list[Record], total: Counter[str]) -> Iterator[_Row]:
    """The rows with text, each text once; those of the held-out text go to `shared`."""
    seen: set[bytes] = set()
    for number, record in enumerate(read(files_of(files))):
        total["rows"] += 1
        if record.row is None:
            unread[record.error or "unreadable"] += 1
            continue
        try:
            digest = _digest(to_text(record.row))
        except RowError as error:
            unread[error.reason] += 1
            continue
        if digest in judged:
            shared.append(record)
        if digest in seen:
            total["equal"] += 1
            continue
        seen.add(digest)
        yield _Row(hashlib.sha256(f"{seed}:".encode() + digest).digest(), number, record)


def _encode(record: Record, tokenizer: Any, renderer: Any, end: int) -> tuple[str, list[int]]:
    """(passages or conversations, token ids) of a row."""
    from ..eval.perplexity import encode_plain

    row = record.row or {}
    kind = detect(row)
    if kind == "text" or renderer is None:
        return "passages", [*encode_plain(tokenizer, [to_text(row, kind=kind)])[0], end]
    if kind == "preference":
        prompt, preferred, _ = to_preference(row)
        messages = [*prompt, *preferred]
    else:
        messages = to_messages(row, kind)
    return "conversations", list(renderer.render(messages, tools=tools_of(row)).ids)
