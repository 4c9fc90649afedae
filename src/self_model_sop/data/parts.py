"""What a pass over a set, or over one of n parts of its input, leaves on disk for the decisions that need all rows.

A part is a folder: rows that may be kept (`rows.jsonl`), the texts to compare (`texts.bin`), fixed-size columns about them (`columns.bin`), what was dropped and quarantined, a
table of n-gram counts that adds up over parts (`table.bin`, only of parts that will be merged), and totals (`part.json`). In memory stay the columns, 52 bytes a row.
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .records import dumps
from .rows import Outcome, Tally

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .ngrams import Ints

_ROW = struct.Struct("<16sIIQQQI")
COLUMNS = [("high", "<u8"), ("low", "<u8"), ("file", "<u4"), ("piece", "<u4"), ("line", "<u8"), ("row", "<u8"), ("text", "<u8"), ("chars", "<u4")]
_AT = struct.Struct("<IQI")  # file, line, piece
_OPEN_TEXTS = 1 << 20  # characters of texts that are counted together


@dataclass
class Totals:
    """Counts of a pass; those of parts add up. Keys are file numbers, reasons, or `<file>:<format>`."""

    rows: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    undecodable: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    pii: Counter[str] = field(default_factory=Counter)
    perplexity: Counter[str] = field(default_factory=Counter)
    first_bad: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    pieces: int = 0
    changed: int = 0
    characters: int = 0

    def add(self, other: Totals) -> None:
        """Add the counts of a later part."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, Counter):
                mine.update(value)
            elif isinstance(value, dict):
                setattr(self, name, {**value, **mine})
            else:
                setattr(self, name, mine + value)

    def tally(self, tally: Tally) -> None:
        """Add what a block saw."""
        self.pii.update(tally.pii)
        self.perplexity.update(tally.perplexity)
        self.formats.update({f"{file}:{kind}": n for (file, kind), n in tally.formats.items()})
        self.changed += tally.changed
        self.characters += tally.characters

    @classmethod
    def load(cls, path: Path) -> Totals:
        """Read `part.json`."""
        out = cls()
        for name, value in json.loads(path.read_text(encoding="utf-8")).items():
            setattr(out, name, Counter(value) if isinstance(getattr(out, name), Counter) else value)
        return out


class PartWriter:
    """Takes outcomes in the order of the rows and writes a part.

    Args:
        folder: an empty folder.
        names: file number -> name in `_source` and reports.
        table_bits: size of the n-gram table, as a power of two; 0: none.
        n: characters of an n-gram.
    """

    def __init__(self, folder: Path, names: Sequence[str], table_bits: int = 0, n: int = 5) -> None:
        self.totals = Totals()
        self._folder, self._names = folder, names
        self._rows, self._texts, self._columns, self._dropped, self._at, self._rejected = (
            (folder / name).open("wb") for name in ("rows.jsonl", "texts.bin", "columns.bin", "dropped.jsonl", "dropped.bin", "rejected.jsonl")
        )
        self._row_end = self._text_end = 0
        self._bits, self._n = table_bits, n
        self._table: NDArray[np.uint8] | None = None
        self._uncounted: list[str] = []
        self._size = 0

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        for f in (self._rows, self._texts, self._columns, self._dropped, self._at, self._rejected):
            f.close()
        if kind is None:
            if self._bits:
                self._count()
                with (self._folder / "table.bin").open("wb") as f:
                    f.write(self._counts().data)
            (self._folder / "part.json").write_text(json.dumps(vars(self.totals), ensure_ascii=False), encoding="utf-8")

    def take(self, outcome: Outcome) -> None:
        """Count one outcome and put it where it belongs."""
        totals, file = self.totals, str(outcome.file)
        if outcome.piece:
            totals.pieces += 1
        else:
            totals.rows[file] += 1
        reason = outcome.reason
        if reason is None:
            self._keep(outcome)
        elif outcome.fault:
            totals.quarantined[reason] += 1
            totals.undecodable[file] += reason == "undecodable"
            totals.first_bad.setdefault(file, f"{self._names[outcome.file]}:{outcome.line} {reason}")
            self._rejected.write(_line({"file": self._names[outcome.file], "line": outcome.line, "reason": reason, "text": outcome.text}))
        else:
            totals.dropped[reason] += 1
            self._at.write(_AT.pack(outcome.file, outcome.line, outcome.piece))
            source = source_of(self._names, outcome.file, outcome.line, outcome.piece)
            value = {} if outcome.perplexity is None else {"perplexity": outcome.perplexity}
            self._dropped.write(_line({"_source": source, "reason": reason, **value, "text": outcome.text}))

    def _keep(self, outcome: Outcome) -> None:
        row, text = outcome.row.encode() + b"\n", outcome.text.encode("utf-8", "surrogatepass")
        self._row_end += len(row)
        self._text_end += len(text)
        self._rows.write(row)
        self._texts.write(text)
        self._columns.write(_ROW.pack(outcome.key, outcome.file, outcome.piece, outcome.line, self._row_end, self._text_end, len(outcome.text)))
        if self._bits and len(outcome.text) >= self._n:
            self._uncounted.append(outcome.text)
            self._size += len(outcome.text)
            if self._size >= _OPEN_TEXTS:
                self._count()

    def _counts(self) -> NDArray[np.uint8]:
        import numpy as np

        if self._table is None:
            self._table = np.zeros(1 << self._bits, np.uint8)
        return self._table

    def _count(self) -> None:
        from .ngram_index import count_up
        from .ngrams import Grams

        for _, _, hashes in Grams(self._uncounted, self._n):
            count_up(self._counts(), self._bits, hashes)
        self._uncounted, self._size = [], 0


def _line(row: dict[str, Any]) -> bytes:
    return dumps(row).encode() + b"\n"


def source_of(names: Sequence[str], file: int, line: int, piece: int) -> str:
    """`<file>:<line>`, and `#<piece>` for the second and later pieces of a split document."""
    return f"{names[file]}:{line}" + (f"#{piece}" if piece else "")


# --- reading ------------------------------------------------------------------------------------------------------------------------------


class Texts(Sequence[str]):
    """Texts that stay in their files until they are asked for.

    Attributes:
        lengths: characters of each, [texts].
    """

    def __init__(self, files: Sequence[IO[bytes]], file: Ints, begin: Ints, size: Ints, lengths: Ints) -> None:
        self._files, self._file, self._begin, self._size, self.lengths = files, file, begin, size, lengths

    def __len__(self) -> int:
        return len(self._begin)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return self._read(int(self._file[at]), int(self._begin[at]), int(self._size[at])).decode("utf-8", "surrogatepass")

    def _read(self, file: int, begin: int, size: int) -> bytes:
        return os.pread(self._files[file].fileno(), size, begin)

    def joined(self, low: int, high: int) -> str:
        """The texts low .. high - 1 one after the other; neighbours in a file are read at once."""
        import numpy as np

        file, begin = self._file[low:high], self._begin[low:high]
        end = begin + self._size[low:high]
        first = np.flatnonzero(np.concatenate([[True], (begin[1:] != end[:-1]) | (file[1:] != file[:-1])]))
        last = np.append(first[1:], len(begin)) - 1
        parts = [self._read(f, b, e - b) for f, b, e in zip(file[first].tolist(), begin[first].tolist(), end[last].tolist(), strict=True)]
        return b"".join(parts).decode("utf-8", "surrogatepass")

    def pick(self, indices: Ints, memory: int) -> Sequence[str]:
        """Some of the texts: in memory where they fit into `memory` bytes, else again from the files."""
        chosen = Texts(self._files, self._file[indices], self._begin[indices], self._size[indices], self.lengths[indices])
        return list(chosen) if int(chosen.lengths.sum()) * 2 + 100 * len(chosen) <= memory else chosen


class Parts:
    """The parts of a set in their order, as one.

    Attributes:
        columns: structured array (`COLUMNS`), [rows].
        totals: sums of the parts.
        texts: the texts to compare.
    """

    def __init__(self, folders: Sequence[Path], names: Sequence[str]) -> None:
        import numpy as np

        self._folders, self._names = folders, names
        self.totals = Totals()
        loaded = []
        for folder in folders:
            self.totals.add(Totals.load(folder / "part.json"))
            loaded.append(np.fromfile(folder / "columns.bin", np.dtype(COLUMNS)))
        self.columns = np.concatenate(loaded)
        self._counts = [len(x) for x in loaded]
        self._files = [(folder / "texts.bin").open("rb") for folder in folders]
        begin = np.concatenate([np.concatenate([[0], x["text"][:-1]])[: len(x)] for x in loaded]).astype(np.int64)
        size = self.columns["text"].astype(np.int64) - begin
        self.texts = Texts(self._files, np.repeat(np.arange(len(folders)), self._counts), begin, size, self.columns["chars"].astype(np.int64))

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *error: object) -> None:
        for f in self._files:
            f.close()

    def source(self, i: int) -> str:
        """`<file>:<line>[#<piece>]` of a row."""
        at = self.columns[i]
        return source_of(self._names, int(at["file"]), int(at["line"]), int(at["piece"]))

    def at(self, i: int) -> tuple[int, int, int]:
        """What rows are ordered by: file, line, piece."""
        at = self.columns[i]
        return int(at["file"]), int(at["line"]), int(at["piece"])

    def rows(self) -> Iterator[bytes]:
        """The rows that may be kept, as lines of JSON."""
        for folder in self._folders:
            with (folder / "rows.jsonl").open("rb") as f:
                yield from f

    def rejected(self) -> Iterator[bytes]:
        """The reports of quarantined rows."""
        for folder in self._folders:
            with (folder / "rejected.jsonl").open("rb") as f:
                yield from f

    def dropped(self) -> Iterator[tuple[tuple[int, int, int], bytes]]:
        """What was dropped already: where, and its report."""
        for folder in self._folders:
            with (folder / "dropped.jsonl").open("rb") as lines, (folder / "dropped.bin").open("rb") as places:
                for line in lines:
                    yield _AT.unpack(places.read(_AT.size)), line

    def table(self, memory: int) -> NDArray[np.uint8] | None:
        """The n-gram tables of all parts added up, or None where a part has none.

        It has at most `memory` entries of a byte (but 1,024 at least): where the parts' tables are larger, entries that share their top bits are added up.
        """
        import numpy as np

        from .ngram_index import add_table

        paths = [folder / "table.bin" for folder in self._folders]
        if not all(p.exists() for p in paths):
            return None
        entries = min(p.stat().st_size for p in paths)
        while entries > max(1024, memory):
            entries //= 2
        total = np.zeros(entries, np.uint8)
        for path in paths:
            with path.open("rb") as f:
                add_table(total, f, path.stat().st_size)
        return total
