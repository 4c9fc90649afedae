"""Tokenised text on disk: written once, memory-mapped afterwards, complete only when its `meta.json` is there."""

from __future__ import annotations

import itertools
import json
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..artifact import write_atomic

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Weights = npt.NDArray[np.float16]


class Segment(NamedTuple):
    """A run of tokens that attend to one another and to nothing else.

    Args:
        ids: token ids, `[tokens]`.
        weights: how much each counts in the loss, `[tokens]`, 0 where it is not learned; the first one never is, since nothing before it predicts it.
    """

    ids: Ids
    weights: Weights

    @property
    def supervised(self) -> Mask:
        """Which tokens are learned, `[tokens]`."""
        return self.weights > 0


class Encoded(NamedTuple):
    """One example on its way to disk; weights for all tokens or one for each, `source` is `file:line`, `group` the name of its source for mixing."""

    ids: Sequence[int]
    weights: Sequence[float] | float
    source: str
    group: str = ""


@dataclass(frozen=True)
class TokenSet:
    """Examples as one long memory-mapped array.

    Args:
        ids: `[tokens]` int32.
        weights: `[tokens]` float16, 0 where a token is not learned.
        offsets: `[examples + 1]` int64, where each example begins.
        sources: `file:line` of each example.
        groups: index into `meta["groups"]` for each example, `[examples]`.
        meta: counts and the reasons of what was dropped.
    """

    ids: Ids
    weights: Weights
    offsets: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int32]
    sources: Path
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, `[examples]`."""
        return np.diff(self.offsets)

    def segment(self, index: int, start: int = 0, stop: int | None = None) -> Segment:
        """Example `index`, or a part of it."""
        first, last = int(self.offsets[index]), int(self.offsets[index + 1])
        part = slice(first + start, last if stop is None else first + stop)
        return Segment(self.ids[part], self.weights[part])

    def digests(self) -> Iterator[bytes]:
        """A hash of the tokens of each example."""
        return (blake2b(self.ids[first:last].tobytes(), digest_size=16).digest() for first, last in itertools.pairwise(self.offsets))

    def names(self, indices: Iterable[int]) -> list[str]:
        """Where examples came from; read from disk, since it is asked for in errors only."""
        lines = self.sources.read_text(encoding="utf-8").split("\n")
        return [lines[i] for i in indices]


def write(folder: Path, examples: Iterable[Encoded], meta: dict[str, Any]) -> TokenSet:
    """Write examples below `folder` and open them. `meta` is filled in while `examples` runs and written last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    offsets, groups, names = array("q", [0]), array("i"), dict[str, int]()
    weighted = False
    with (folder / "ids.bin").open("wb") as ids, (folder / "weights.bin").open("wb") as weights, (folder / "sources.txt").open("w", encoding="utf-8") as sources:
        for item in examples:
            row = np.asarray(item.ids, dtype=np.int32)
            each = np.full(len(row), item.weights, np.float16) if isinstance(item.weights, (int, float)) else np.asarray(item.weights, dtype=np.float16)
            each[:1] = 0
            weighted = weighted or bool(((each != 0) & (each != 1)).any())
            ids.write(row.tobytes())
            weights.write(each.tobytes())
            sources.write(item.source.replace("\n", " ") + "\n")
            offsets.append(offsets[-1] + len(row))
            groups.append(names.setdefault(item.group, len(names)))
    np.save(folder / "offsets.npy", np.asarray(offsets, dtype=np.int64))
    np.save(folder / "groups.npy", np.asarray(groups, dtype=np.int32))
    meta |= {"examples": len(groups), "tokens": offsets[-1], "groups": list(names), "weighted": weighted}
    write_atomic(folder / "meta.json", json.dumps(meta, ensure_ascii=False))
    opened = read(folder)
    assert opened is not None
    return opened


def read(folder: Path) -> TokenSet | None:
    """Open a complete set, or None."""
    if not (folder / "meta.json").is_file():
        return None
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    empty = meta["tokens"] == 0  # numpy maps no empty file
    ids: Ids = np.zeros(0, np.int32) if empty else np.memmap(folder / "ids.bin", dtype=np.int32, mode="r")
    weights: Weights = np.zeros(0, np.float16) if empty else np.memmap(folder / "weights.bin", dtype=np.float16, mode="r")
    return TokenSet(ids, weights, np.load(folder / "offsets.npy"), np.load(folder / "groups.npy"), folder / "sources.txt", meta)
