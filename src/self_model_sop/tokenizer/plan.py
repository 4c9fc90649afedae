"""`plan.jsonl`: one row for each new token, in creation order; the first N rows are the plan for N tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DATA, SopError

Merge = tuple[str, str]


@dataclass
class Row:
    """A new token and why it is there.

    Args:
        id: its id, behind every id of the base.
        token: its spelling in the vocabulary.
        data: its bytes.
        merge: the two tokens it is made of; None where it needs no merge.
        pieces: the base ids that its text was written in.
        also: merges between existing tokens that come right before it.
        train_count: uses in the training text.
        heldout_count: uses in the held-out text.
        gain: tokens that this row saves on the held-out text, given the rows before it.
        source: where the candidate came from: corpus, auxiliary or lexicon.
    """

    id: int
    token: str
    data: bytes
    merge: Merge | None
    pieces: list[int]
    also: tuple[Merge, ...] = ()
    train_count: float = 0
    heldout_count: float = 0
    gain: float = 0
    source: str = "corpus"

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")

    @property
    def fragment(self) -> bool:
        """True where the token begins or ends inside a character."""
        return "\ufffd" in self.text

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in the file."""
        out: dict[str, Any] = {"id": self.id, "text": self.text, "token": self.token, "bytes": self.data.hex(), "merge": self.merge, "pieces": self.pieces}
        out |= {"train_count": _number(self.train_count), "heldout_count": _number(self.heldout_count), "gain": _number(self.gain), "source": self.source}
        return out | ({"also": self.also} if self.also else {})


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else round(value, 3)


def write_plan(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows, one JSON object per line."""
    path.write_text("".join(json.dumps(r.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n" for r in rows), encoding="utf-8")


def read_plan(path: Path) -> list[Row]:
    """Read the rows.

    Raises:
        SopError: for a broken line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            merge = tuple(row["merge"]) if row["merge"] else None
            also = tuple(tuple(m) for m in row.get("also", ()))
            rows.append(Row(row["id"], row["token"], bytes.fromhex(row["bytes"]), merge, row["pieces"], also, row["train_count"], row["heldout_count"], row["gain"], row["source"]))
        except (ValueError, KeyError, TypeError) as error:
            raise SopError(f"no plan row: {error!r}", where=f"{path}:{number}", fix="run the select stage again", code=DATA) from None
    return rows
