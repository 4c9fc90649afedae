"""CSV, TSV and Parquet, in and out; a Parquet file that would unpack without bounds is refused before it is read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DATA, ENVIRONMENT, SopError
from .encodings import BOMB, DAMAGED, FREE_BYTES, MAX_RATIO, text_lines
from .records import Record, Source, jsonable, strings


def read_csv(src: Source) -> Iterator[Record]:
    """The records of a CSV or TSV file whose first row names the fields; every value is text."""
    name, delimiter = str(src.path), "\t" if src.kind == "tsv" else ","
    csv.field_size_limit(src.max_line_bytes)
    broken: dict[int, str] = {}

    def lines() -> Iterator[str]:
        for number, text, error in text_lines(src.path, src.encoding, src.max_line_bytes):
            if error or "\0" in text:
                broken[number] = error or "nul"
                text = text.replace("\0", "\ufffd").replace('"', "")
            yield text + "\n"

    reader = csv.reader(lines(), delimiter=delimiter, strict=False)
    header: list[str] | None = None
    at = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:
            yield Record(None, name, at, "bad_csv", "")
            at = reader.line_num + 1
            continue
        if cells is None:
            return
        number, at = at, reader.line_num + 1
        wrong = next((broken[n] for n in range(number, at) if n in broken), None)
        if not cells:
            continue
        if header is None:
            header = [c.strip() for c in cells]
            continue
        if wrong is None and len(cells) != len(header):
            wrong = "column_count"
        raw = delimiter.join(cells)[:1000]
        yield Record(dict(zip(header, cells, strict=True)) if wrong is None else None, name, number, wrong, raw)


def read_parquet(src: Source) -> Iterator[Record]:
    """The records of a Parquet file, streamed; rows that JSON cannot express are records with an error."""
    for number, row in enumerate(parquet_rows(src.path), 1):
        wrong = _table_row_fault(row)
        yield Record(row if wrong is None else None, str(src.path), number, wrong, "" if wrong is None else str(row)[:1000])


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file as Python values, streamed.

    Raises:
        SopError: damaged, or declaring or unpacking to more than MAX_RATIO times its size.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, size = str(path), path.stat().st_size
    limit = max(FREE_BYTES, size * MAX_RATIO)
    bomb = SopError(f"declares more than {MAX_RATIO} times its size", where=name, fix=BOMB, code=DATA)
    try:
        file = pq.ParquetFile(path)
        meta = file.metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        declared = sum(g.total_byte_size for g in groups)
        values = sum(g.column(c).num_values for g in groups for c in range(g.num_columns))
        if declared > limit or values > limit:
            raise bomb
        dictionary = [f.name for f in file.schema_arrow if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        file = pq.ParquetFile(path, read_dictionary=dictionary)
        total = 0
        for batch in file.iter_batches(batch_size=256):
            total += _decoded_bytes(batch)
            if total > limit:
                raise bomb
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise SopError(f"cannot read this Parquet file: {str(error).splitlines()[0]}", where=name, fix=DAMAGED, code=DATA) from None
    except MemoryError:
        raise SopError("too little memory to read this Parquet file", where=name, code=ENVIRONMENT) from None


def _decoded_bytes(batch: Any) -> int:
    """Bytes of a record batch once every dictionary value is written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    total = 0
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            lengths = pc.binary_length(column.dictionary)
            total += pc.sum(pc.take(lengths, column.indices).cast(pa.int64())).as_py() or 0
        else:
            total += column.nbytes
    return total


def _table_row_fault(row: dict[str, Any]) -> str | None:
    try:
        json.dumps(row, allow_nan=False, default=jsonable)
    except ValueError:
        return "not_finite"
    except TypeError:
        return "not_json"
    return "nul" if any("\0" in s for s in strings(row)) else None


# --- writing Parquet ----------------------------------------------------------------------------------------------------------------------

_ROWS = 5000  # rows of a row group


def jsonl_to_parquet(source: Path, target: Path) -> None:
    """A JSONL file as Parquet (zstd), in blocks. Fields whose type differs between rows become JSON text; all fields are nullable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, Any] = {}
    mixed: set[str] = set()
    for rows in _row_blocks(source):
        for name in dict.fromkeys(key for row in rows for key in row):
            try:
                found = pa.array([row.get(name) for row in rows]).type
                types[name] = pa.unify_schemas([pa.schema([(name, types.get(name, pa.null()))]), pa.schema([(name, found)])], promote_options="permissive").field(0).type
            except (pa.ArrowException, OverflowError):
                mixed.add(name)
                types[name] = pa.string()
    schema = pa.schema([(name, pa.string() if name in mixed or pa.types.is_null(kind) else kind) for name, kind in types.items()])
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for rows in _row_blocks(source):
            columns = [pa.array([_as_text(row.get(f.name)) if f.name in mixed else row.get(f.name) for row in rows], f.type) for f in schema]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _as_text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _row_blocks(path: Path) -> Iterator[list[dict[str, Any]]]:
    block: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", newline="\n") as f:
        for line in f:
            block.append(json.loads(line))
            if len(block) == _ROWS:
                yield block
                block = []
    if block:
        yield block
