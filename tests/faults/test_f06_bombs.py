"""F06: decompression bombs and wrong magic are refused quickly, in bounded memory, with exit code 3."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from self_model_sop.data.records import read
from self_model_sop.errors import DATA, SopError


def bomb_parquet(path: Path) -> None:
    """Like 42.parquet: one large dictionary value, referred to by a run of indices that takes a few bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    big = pa.DictionaryArray.from_arrays(pa.array([0] * 900_000, pa.int32()), pa.array(["甲" * 300_000]))
    pq.write_table(pa.table({"text": big}), path, compression="zstd", row_group_size=900_000)


def many_values_parquet(path: Path) -> None:
    """Billions of declared values in a few bytes: lists of one repeated number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = pa.ListArray.from_arrays(pa.array([0, 80_000_000], pa.int32()), pa.nulls(80_000_000, pa.int8()))
    pq.write_table(pa.table({"text": lists}), path, compression="zstd")


def bomb_gzip(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=9) as f:
        for _ in range(300):
            f.write(b"\n" * (1 << 20))


def bomb_zstd(path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path.write_bytes(zstandard.ZstdCompressor(level=3).compress(bytes(400 << 20)))


CODE = r"""
import sys, re, json, time
from pathlib import Path
from self_model_sop.data import process
from self_model_sop.errors import SopError
import pyarrow.parquet
start = time.perf_counter()
try:
    process.run(process.Config(input=Path(sys.argv[1]), output_dir=Path(sys.argv[2])))
    code, said = 0, ""
except SopError as error:
    code, said = error.code, str(error)
print(json.dumps([code, said, time.perf_counter() - start, int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])]))
"""


@pytest.mark.parametrize(("name", "make"), [("a.parquet", bomb_parquet), ("b.parquet", many_values_parquet), ("a.jsonl.gz", bomb_gzip), ("a.jsonl.zst", bomb_zstd)])
def test_f06_bombs_are_refused(tmp_path: Path, name: str, make: object) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    assert callable(make)
    make(tmp_path / name)
    assert (tmp_path / name).stat().st_size < 2 << 20
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / name), str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code, said, seconds, kilobytes = json.loads(done.stdout)
    assert code == DATA and "bomb" in said
    assert seconds < 2 * 5  # 2 s on an idle machine
    assert kilobytes < 500_000


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("content", [b"", b"{}\n", b"PAR1 nonsense PAR1", b"\x1f\x8b\x08\x00 nonsense", b"\x28\xb5\x2f\xfd nonsense"])
def test_f06_wrong_magic(tmp_path: Path, name: str, content: bytes) -> None:
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(content)
    start = time.perf_counter()
    try:
        rows = list(read(tmp_path / name))
        assert rows == [] or all(r.error for r in rows)
    except SopError as error:
        assert error.code == DATA and name in str(error)
    assert time.perf_counter() - start < 10


def test_f06_truncated_gzip_is_no_silent_end(tmp_path: Path) -> None:
    data = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(100_000)))
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(SopError, match="cannot unpack"):
        list(read(tmp_path / "a.jsonl.gz"))
