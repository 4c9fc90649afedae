"""sop data fetch: every row and field arrives untouched, from a hub (the real client, a server on loopback) and from local paths."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hub_server import HubServer, jsonl
from self_model_sop.artifact import files_below
from self_model_sop.data import fetch
from self_model_sop.data.fetch import STAGE, Config
from self_model_sop.data.splits import split_of
from self_model_sop.errors import DATA, ENVIRONMENT, NETWORK, USAGE, SopError
from self_model_sop.hub import HubConfig

ROOT = Path(__file__).resolve().parents[2]
NAME = "someone/things"


def config(hub: HubServer, tmp_path: Path, name: str = NAME, **options: Any) -> Config:
    where = HubConfig(endpoint=hub.url, cache_dir=tmp_path / "cache", **options.pop("huggingface", {}))
    return Config(dataset_name=name, output_dir=tmp_path / "out", huggingface=where, **options)


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def made_rows(n: int, size: int = 40) -> list[dict[str, Any]]:
    draw = random.Random(n)
    letters = "血压高低药医院水盐, abc\"\\\n\u2028"
    return [{"id": i, "text": "".join(draw.choices(letters, k=size)), "score": i / 7, "tags": ["a", None], "m": {"深": [{"x": True}]}} for i in range(n)]


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, **options)
    return out.getvalue()


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


# --- from a hub -----------------------------------------------------------------------------------------------------------------------------------


def test_documented_command_runs_verbatim(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    command = "--dataset_name shibing624/medical --data_subdir pretrain --output_dir data_process/fetch_data --sample_limit 1000"
    script = str(ROOT / "data_process" / "fetch_dataset.py")
    done = subprocess.run([sys.executable, script, *command.split()], cwd=tmp_path, env=hub.environment(tmp_path / "home"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data_process" / "fetch_data" / "pretrain"
    files = hub.find("dataset", "shibing624/medical").refs  # type: ignore[union-attr]
    original = hub.find("dataset", "shibing624/medical").commits[files["main"]]  # type: ignore[union-attr]
    expected = (original["pretrain/medical_book_zh.json"] + original["pretrain/train_encyclopedia.json"]).splitlines(keepends=True)[:1000]
    assert (folder / "shibing624_medical__train.jsonl").read_bytes() == b"".join(expected)
    assert (folder / "shibing624_medical__validation.jsonl").read_bytes() == original["pretrain/valid_encyclopedia.json"]
    assert (folder / "shibing624_medical.manifest.json").is_file()
    shown = [line for line in done.stdout.splitlines() if line.startswith("  ") and ': {"text"' in line]
    assert len(shown) == 5
    assert files["main"] in done.stdout


FORMATS: dict[str, Any] = {
    "train.jsonl": jsonl,
    "train.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=2).encode(),
    "rows/train.json": jsonl,
    "data/train-00000-of-00001.parquet": parquet,
    "train.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
}


@pytest.mark.parametrize("path", list(FORMATS))
@pytest.mark.parametrize("limit", [None, 7])
def test_every_format_keeps_every_field(hub: HubServer, tmp_path: Path, path: str, limit: int | None) -> None:
    rows = made_rows(30)
    hub.add("dataset", NAME, {path: FORMATS[path](rows), "README.md": b"# things"})
    done = STAGE.run(config(hub, tmp_path, sample_limit=limit))
    assert rows_of(tmp_path / "out" / "someone_things__train.jsonl") == rows[:limit]
    assert done.stats["total"] == done.stats["kept"] == len(rows[:limit])


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("limit", [None, 4])
def test_tables_become_rows_of_text(hub: HubServer, tmp_path: Path, suffix: str, delimiter: str, limit: int | None) -> None:
    rows = [{"问": f"第{i}行，\"引号\"\n换行", "答": f"{i}.50"} for i in range(9)]
    hub.add("dataset", NAME, {f"train.{suffix}": table(rows, delimiter)})
    STAGE.run(config(hub, tmp_path, sample_limit=limit))
    assert rows_of(tmp_path / "out" / "someone_things__train.jsonl") == rows[:limit]


def test_numbers_and_escapes_of_a_json_array_keep_their_spelling(hub: HubServer, tmp_path: Path) -> None:
    hub.add("dataset", NAME, {"a.json": rb'[ {"x": 1.10, "y": 1E5, "z": 123456789012345678901234567890, "t": "\u4f60 \/ \n  b"} , {"x":-0.0} ]'})
    STAGE.run(config(hub, tmp_path))
    text = (tmp_path / "out" / "someone_things__train.jsonl").read_bytes()
    assert text == rb'{"x":1.10,"y":1E5,"z":123456789012345678901234567890,"t":"\u4f60 \/ \n  b"}' + b'\n{"x":-0.0}\n'


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt", "jsonl.gz"])
def test_a_limit_does_not_download_everything(hub: HubServer, tmp_path: Path, kind: str) -> None:
    draw = random.Random(0)
    rows = [{"id": i, "text": f"{draw.getrandbits(12_000):030x}"} for i in range(4000)]
    made = {
        "jsonl": jsonl, "json": lambda r: json.dumps(r).encode(), "csv": table, "parquet": lambda r: parquet(r, row_group_size=200),
        "txt": lambda r: "\n".join(x["text"] for x in r).encode(), "jsonl.gz": lambda r: gzip.compress(jsonl(r), 1),
    }[kind](rows)  # fmt: skip
    assert len(made) > 6 << 20
    hub.add("dataset", NAME, {f"train.{kind}": made})
    STAGE.run(config(hub, tmp_path, sample_limit=10))
    assert hub.sent < 2.5 * (1 << 20), hub.requests
    out = rows_of(tmp_path / "out" / "someone_things__train.jsonl")
    assert [r["text"] for r in out] == [r["text"] for r in rows[:10]]


def test_limit_counts_over_the_files_of_a_split(hub: HubServer, tmp_path: Path) -> None:
    rows = made_rows(12)
    hub.add("dataset", NAME, {"data/train-0.jsonl": jsonl(rows[:5]), "data/train-1.jsonl": jsonl(rows[5:]), "data/test.jsonl": jsonl(rows[:3])})
    STAGE.run(config(hub, tmp_path, sample_limit=8))
    assert rows_of(tmp_path / "out" / "someone_things__train.jsonl") == rows[:8]
    assert rows_of(tmp_path / "out" / "someone_things__test.jsonl") == rows[:3]


def test_malformed_lines_travel_on_and_files_of_other_encodings_become_utf8(hub: HubServer, tmp_path: Path) -> None:
    good = '{"text": "高血压"}\n'
    files = {
        "train_0.jsonl": b"\xef\xbb\xbf" + good.encode() + b'{"broken": \n',
        "train_1.jsonl": good.encode("gb18030") * 3 + b'{"last": 1}', "train_2.jsonl": good.encode("utf-16"),
    }  # fmt: skip
    hub.add("dataset", NAME, files)
    done = STAGE.run(config(hub, tmp_path))
    text = (tmp_path / "out" / "someone_things__train.jsonl").read_text(encoding="utf-8")
    assert text == good + '{"broken": \n' + good * 3 + '{"last": 1}\n' + good
    assert any("gb18030" in note for note in done.stats["notes"])


def test_what_json_cannot_say_is_converted_and_nothing_is_lost(hub: HubServer, tmp_path: Path) -> None:
    import datetime
    import decimal

    rows = [{"f": float("nan"), "d": decimal.Decimal("1.50"), "b": b"\xff\x00", "s": b"ok", "t": datetime.datetime(2024, 1, 2, 3, 4), "l": [1.5, float("inf")]}]
    hub.add("dataset", NAME, {"x.parquet": parquet(rows)})
    done = STAGE.run(config(hub, tmp_path))
    assert rows_of(tmp_path / "out" / "someone_things__train.jsonl") == [{"f": None, "d": "1.50", "b": "/wA=", "s": "ok", "t": "2024-01-02T03:04:00", "l": [1.5, None]}]
    assert done.stats["quarantined"] == 0


def test_rows_that_are_none_are_set_aside_and_counted(hub: HubServer, tmp_path: Path) -> None:
    hub.add("dataset", NAME, {"a.csv": b"q,a\n1,2\nonly one\n3,4\n", "b.json": b'[{"ok": 1}, 17, {"ok": 2}]'})
    done = STAGE.run(config(hub, tmp_path))
    assert (done.stats["total"], done.stats["kept"], done.stats["quarantined"]) == (6, 4, 2)
    rejected = rows_of(tmp_path / "out" / "someone_things__train.rejected.jsonl")
    assert [(r["file"], r["line"], r["reason"]) for r in rejected] == [("a.csv", 3, "column_count"), ("b.json", 1, "not_an_object")]


# --- which files ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train_encyclopedia.json", "train"), ("valid_zh_0.json", "validation"), ("test.json", "test"), ("dev.csv", "validation"), ("data/train-00000-of-00002.parquet", "train"),
        ("medical_book_zh.json", "train"), ("validation/part1.jsonl", "validation"), ("val.txt", "validation"), ("contest.json", "train"), ("restraint/test-2.jsonl", "test"),
    ],
)  # fmt: skip
def test_split_is_told_by_the_name(path: str, split: str) -> None:
    assert split_of(path) == split


def test_several_folders_ask_for_one(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(SopError, match="several folders") as caught:
        STAGE.run(config(hub, tmp_path, "shibing624/medical"))
    assert "finetune, pretrain, reward" in str(caught.value)
    with pytest.raises(SopError, match="no data files below 'pretrian'") as caught:
        STAGE.run(config(hub, tmp_path, "shibing624/medical", data_subdir="pretrian"))
    assert "pretrain" in str(caught.value)


CARD = b"""---
configs:
- config_name: zh
  data_files:
  - {split: train, path: "zh/part-*.jsonl"}
  - {split: dev, path: [zh/held.jsonl]}
- config_name: en
  data_dir: en
---
"""


def test_configurations_of_the_card(hub: HubServer, tmp_path: Path) -> None:
    rows = made_rows(6)
    parts = {"zh/part-1.jsonl": rows[:2], "zh/part-2.jsonl": rows[2:4], "zh/held.jsonl": rows[4:], "en/a.jsonl": rows[:1]}
    hub.add("dataset", NAME, {"README.md": CARD, **{name: jsonl(some) for name, some in parts.items()}})
    with pytest.raises(SopError, match="several configurations") as caught:
        STAGE.run(config(hub, tmp_path))
    assert "en, zh" in str(caught.value)
    STAGE.run(config(hub, tmp_path, config_name="zh"))
    assert rows_of(tmp_path / "out" / "someone_things__train.jsonl") == rows[:4]
    assert rows_of(tmp_path / "out" / "someone_things__validation.jsonl") == rows[4:]
    with pytest.raises(SopError, match="no configuration 'fr'"):
        STAGE.run(config(hub, tmp_path / "other", config_name="fr"))


def test_one_split(hub: HubServer, tmp_path: Path) -> None:
    STAGE.run(config(hub, tmp_path, "shibing624/medical", data_subdir="reward", split="valid"))
    assert [p.name for p in files_below(tmp_path / "out")] == ["shibing624_medical__validation.jsonl"]
    with pytest.raises(SopError, match="no split 'extra'") as caught:
        STAGE.run(config(hub, tmp_path / "other", "shibing624/medical", data_subdir="reward", split="extra"))
    assert "test, train, validation" in str(caught.value)


# --- again, offline, moved ----------------------------------------------------------------------------------------------------------------------------


def test_up_to_date_forced_and_moved(hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = made_rows(4)
    first = hub.add("dataset", NAME, {"train.jsonl": jsonl(rows[:2])})
    wanted = config(hub, tmp_path)
    assert STAGE.run(wanted).stats["commit"] == first
    assert STAGE.run(wanted).skipped
    second = hub.add("dataset", NAME, {"train.jsonl": jsonl(rows)})
    again = STAGE.run(wanted)
    assert again.skipped
    assert any(f"upstream moved {first[:12]} -> {second[:12]}" in line for line in STAGE.summary(again))
    forced = STAGE.run(config(hub, tmp_path, force_download=True))
    assert not forced.skipped
    assert forced.stats["commit"] == second
    assert f"upstream moved {first[:12]} -> {second[:12]}" in capfd.readouterr().err
    assert rows_of(tmp_path / "out" / "someone_things__train.jsonl") == rows


def test_a_pinned_revision_is_what_arrives(hub: HubServer, tmp_path: Path) -> None:
    first = hub.add("dataset", NAME, {"train.jsonl": jsonl(made_rows(1))})
    hub.add("dataset", NAME, {"train.jsonl": jsonl(made_rows(2))})
    assert STAGE.run(config(hub, tmp_path, huggingface={"revision": first})).stats["kept"] == 1


def test_other_settings_do_not_silently_replace(hub: HubServer, tmp_path: Path) -> None:
    hub.add("dataset", NAME, {"train.jsonl": jsonl(made_rows(9))})
    STAGE.run(config(hub, tmp_path, sample_limit=3))
    with pytest.raises(SopError, match="sample_limit: 3 -> 5"):
        STAGE.run(config(hub, tmp_path, sample_limit=5))
    assert STAGE.run(config(hub, tmp_path, sample_limit=5), overwrite=True).stats["kept"] == 5


def test_f42_offline_with_a_full_cache_opens_no_socket(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = made_rows(5)
    hub.add("dataset", NAME, {"data/train.jsonl": jsonl(rows), "data/test.parquet": parquet(rows)})
    STAGE.run(config(hub, tmp_path))

    def refuse(*args: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    wanted = Config(dataset_name=NAME, output_dir=tmp_path / "second", huggingface=HubConfig(cache_dir=tmp_path / "cache", offline=True))
    STAGE.run(wanted)
    assert rows_of(tmp_path / "second" / "someone_things__train.jsonl") == rows
    with pytest.raises(SopError, match="not in the local cache") as caught:
        STAGE.run(Config(dataset_name="else/where", output_dir=tmp_path / "third", huggingface=wanted.huggingface))
    assert caught.value.code == NETWORK


def test_f42_offline_with_half_a_cache_says_so(hub: HubServer, tmp_path: Path) -> None:
    hub.add("dataset", NAME, {"train.jsonl": jsonl(made_rows(3)), "test.jsonl": jsonl(made_rows(3))})
    STAGE.run(config(hub, tmp_path, split="train"))
    wanted = Config(dataset_name=NAME, output_dir=tmp_path / "second", huggingface=HubConfig(cache_dir=tmp_path / "cache", offline=True))
    with pytest.raises(SopError, match="not in the local cache") as caught:
        STAGE.run(wanted)
    assert caught.value.code == NETWORK


def test_modelscope_without_its_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(SopError, match="modelscope") as caught:
        STAGE.run(Config(dataset_name=NAME, output_dir=tmp_path / "out", huggingface=HubConfig(source="modelscope")))
    assert caught.value.code == ENVIRONMENT


# --- from local paths -------------------------------------------------------------------------------------------------------------------------------


def test_a_local_folder_keeps_its_shape_and_its_bytes(tmp_path: Path) -> None:
    source = tmp_path / "我的 data"
    files = {
        "pretrain/x.jsonl": b'{"text": "a"}\r\n{broken\n{"text": "\xe2\x80\xa8"}', "pretrain/notes.txt": "第一行\n".encode("gb18030") + b"\xff\xfe\x00",
        "finetune/bom.jsonl": b'\xef\xbb\xbf{"a": 1}\n', "top.jsonl": b"", "deep/er/t.tsv": b"a\tb\n1\t2\n", "pretrain/x.csv": b"a,b\n1,2\n",
    }  # fmt: skip
    for name, data in {**files, ".hidden/y.jsonl": b"{}\n", "README.md": b"#", "manifest.json": b"{}", "planted.json": b"[]"}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    done = STAGE.run(Config(dataset_name=str(source), output_dir=tmp_path / "out", exclude=("planted.json",)))
    out = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in files_below(tmp_path / "out")}
    for name in ("pretrain/x.jsonl", "pretrain/notes.txt", "finetune/bom.jsonl", "top.jsonl"):
        assert out.pop(name) == files[name]
    assert {name: json.loads(data) for name, data in out.items()} == {"deep/er/t.jsonl": {"a": "1", "b": "2"}, "pretrain/x.csv.jsonl": {"a": "1", "b": "2"}}
    assert done.stats["skipped"] == ["README.md", "planted.json"]
    assert (tmp_path / "out" / "我的 data.manifest.json").is_file()
    assert STAGE.run(Config(dataset_name=str(source), output_dir=tmp_path / "out", exclude=("planted.json",))).skipped


def test_sample_data_goes_through(tmp_path: Path) -> None:
    assert fetch.main(["--config", str(ROOT / "config/data_config/fetch.yaml"), "--output_dir", str(tmp_path)]) == 0
    for path in (ROOT / "data_process" / "sample_data").glob("*/*.*"):
        assert (tmp_path / path.relative_to(ROOT / "data_process" / "sample_data")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_local_file(tmp_path: Path, suffix: str) -> None:
    rows = [{"a": "1", "b": "二"}, {"a": "3", "b": "四"}]
    (tmp_path / f"one.{suffix}").write_bytes({"jsonl": jsonl, "json": lambda r: json.dumps(r).encode(), "csv": table, "parquet": parquet}[suffix](rows))
    STAGE.run(Config(dataset_name=str(tmp_path / f"one.{suffix}"), output_dir=tmp_path / "out"))
    assert rows_of(tmp_path / "out" / "one.jsonl") == rows
    STAGE.run(Config(dataset_name=str(tmp_path / f"one.{suffix}"), output_dir=tmp_path / "cut", sample_limit=1))
    assert rows_of(tmp_path / "cut" / "one.jsonl") == rows[:1]


def test_input_inside_output_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw").mkdir()
    assert fetch.main(["--dataset_name", str(tmp_path / "raw"), "--output_dir", str(tmp_path / "raw" / "out")]) == USAGE
    assert "lies inside the dataset" in capfd.readouterr().err
    assert not (tmp_path / "raw" / "out").exists()


def test_f06_a_parquet_bomb_is_refused(hub: HubServer, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000_000, pa.int32()), pa.array(["x" * 5000]))
    pq.write_table(pa.table({"text": column}), out, compression="zstd")
    assert len(out.getvalue()) < 100_000
    hub.add("dataset", NAME, {"train.parquet": out.getvalue()})
    with pytest.raises(SopError, match="200 times") as caught:
        STAGE.run(config(hub, tmp_path))
    assert caught.value.code == DATA
    assert files_below(tmp_path / "out") == []


def test_f06_a_gzip_bomb_is_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.add("dataset", NAME, {"train.jsonl.gz": gzip.compress(b"a" * (200 << 20), 1)})
    for limit in (None, 5):
        with pytest.raises(SopError) as caught:
            STAGE.run(config(hub, tmp_path / str(limit), sample_limit=limit))
        assert caught.value.code == DATA
