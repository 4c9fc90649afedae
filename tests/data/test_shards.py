"""Parts of an input, worked on anywhere and merged: the same files as one run leaves."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from self_model_sop.artifact import content_hash
from self_model_sop.data import ngram_index, parts, preference, process
from self_model_sop.data.dedup import near_duplicates
from self_model_sop.data.encodings import Span, text_lines
from self_model_sop.data.ngram_index import add_table, count_up
from self_model_sop.data.ngrams import Grams
from self_model_sop.data.parts import Parts, PartWriter
from self_model_sop.data.process import Config, ProcessConfig
from self_model_sop.data.records import write_jsonl
from self_model_sop.data.rows import Outcome
from self_model_sop.data.sets import find, part_of
from self_model_sop.errors import SopError

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_process" / "sample_data"


def texts(count: int, seed: int = 0) -> list[str]:
    """Natural-looking texts: a few hundred characters, some equal, some nearly equal."""
    draw = random.Random(seed)
    words = ["血压", "血糖", "复查", "用药", "饮食", "运动", "指标", "正常", "升高", "降低", "建议", "患者", "医生", "每天", "一次"]
    out: list[str] = []
    for _ in range(count):
        if out and draw.random() < 0.2:
            base = draw.choice(out)
            out.append(base if draw.random() < 0.4 else base[: draw.randrange(len(base))] + "改" + base[draw.randrange(len(base)) :])
        else:
            out.append("，".join(draw.choice(words) + str(draw.randrange(999)) for _ in range(draw.randrange(3, 30))) + "。")
    return out


def raw(folder: Path, count: int = 300) -> Path:
    """Three sets in files of every kind that is cut, and of two that are not."""
    for name in ("pretrain", "finetune", "reward"):
        (folder / name).mkdir(parents=True)
    found = texts(count)
    write_jsonl(folder / "pretrain" / "a.jsonl", ({"text": t} for t in found[: count // 2]))
    (folder / "pretrain" / "b.txt").write_bytes("\r\n".join([*found[count // 2 :], ""]).encode("gb18030"))
    with gzip.open(folder / "pretrain" / "c.jsonl.gz", "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts(count // 3, 1))
    (folder / "pretrain" / "d.jsonl").write_bytes(b"{broken\n\n" + json.dumps({"text": "短"}).encode())
    write_jsonl(folder / "finetune" / "x.jsonl", ({"instruction": t[:20], "output": t} for t in found))
    write_jsonl(folder / "reward" / "y.jsonl", ({"prompt": t[:20], "chosen": t, "rejected": t[::-1]} for t in found[: count // 3]))
    return folder


def shards(config: Config, of: int, stage: Any = process) -> dict[str, Any]:
    from dataclasses import replace

    for part in random.Random(of).sample(range(1, of + 1), of):
        stage.run(replace(config, shard=f"{part}/{of}"))
    manifest: dict[str, Any] = stage.run(replace(config, merge=of)).manifest
    return manifest


def test_one_hash_for_any_number_of_parts_and_workers(tmp_path: Path) -> None:
    source = raw(tmp_path / "raw")
    options = {"input": source, "process": ProcessConfig(validation_ratio=0.1, max_bad_ratio=0.5)}
    whole = process.run(Config(output_dir=tmp_path / "whole", **options)).manifest
    assert whole["stats"]["sets"]["pretrain"]["dropped"]["near_duplicates"] > 5
    hashes = set()
    for of, workers in ((1, 1), (2, 2), (5, 1), (13, 1)):
        merged = shards(Config(output_dir=tmp_path / f"merged{of}", workers=workers, memory=0.25, **options), of)
        assert merged["stats"] == whole["stats"]
        hashes.add(content_hash(merged))
    assert hashes == {content_hash(whole)}
    assert process.run(Config(output_dir=tmp_path / "merged5", **options)).skipped  # a merge is the same artifact as one run


def test_parts_of_preference_data(tmp_path: Path) -> None:
    source = raw(tmp_path / "raw")
    whole = preference.run(preference.Config(input=source, output_dir=tmp_path / "whole")).manifest
    merged = shards(preference.Config(input=source, output_dir=tmp_path / "merged"), 3, preference)
    assert content_hash(merged) == content_hash(whole) and merged["stats"] == whole["stats"]


def test_a_missing_changed_or_different_part_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", ({"text": t} for t in texts(60)))
    config = Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out", subdir="pretrain")
    with pytest.raises(SopError, match="part 1 of 2 cannot be merged: not there yet") as error:
        process.run(Config(**{**vars(config), "merge": 2}))
    assert "--shard 1/2" in str(error.value)
    shards(config, 2)
    shutil.rmtree(tmp_path / "out" / "pretrain")
    with pytest.raises(SopError, match="jaccard_threshold"):
        process.run(Config(**{**vars(config), "merge": 2, "process": ProcessConfig(jaccard_threshold=0.7)}))
    rows = tmp_path / "out" / "pretrain.shards" / "2-of-2" / "pretrain" / "rows.jsonl"
    rows.write_bytes(rows.read_bytes()[:-9])
    with pytest.raises(SopError, match=r"part 2 of 2 cannot be merged: .*rows.jsonl: changed"):
        process.run(Config(**{**vars(config), "merge": 2}))


@pytest.mark.parametrize("of", [1, 2, 3, 7, 40])
def test_every_line_is_in_exactly_one_part(tmp_path: Path, of: int) -> None:
    raw(tmp_path / "raw", 60)
    members = find([tmp_path / "raw"], "pretrain", "auto", max_line_bytes=1000).files["pretrain"]
    seen: list[tuple[int, int]] = []
    for part in range(1, of + 1):
        for number, span in part_of(members, part, of):
            source = members[number].source
            lines = text_lines(source.path, source.encoding, 1000, span)
            seen += [(number, line) for line, _, _ in lines]
    assert seen == [(i, line) for i, m in enumerate(members) for line, _, _ in text_lines(m.source.path, m.source.encoding, 1000)]


@pytest.mark.parametrize("data", [b"", b"\n", b"a", b"ab\ncd\n", b"ab\n\n\ncd", b"x" * 50 + b"\nshort\n" + b"y" * 60])
def test_any_cut_keeps_lines_whole(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    whole = list(text_lines(path, "utf-8", 20))
    for cut in range(len(data) + 2):
        assert list(text_lines(path, "utf-8", 20, Span(0, cut))) + list(text_lines(path, "utf-8", 20, Span(cut))) == whole


@pytest.mark.parametrize("bad", ["0/2", "3/2", "2", "a/b", "-1/3"])
def test_a_bad_shard_is_a_problem_of_the_configuration(tmp_path: Path, bad: str) -> None:
    assert [key for key, *_ in process.preflight(Config(input=tmp_path, output_dir=tmp_path.parent / "x", shard=bad))] == ["shard"]


# --- what stays on disk -------------------------------------------------------------------------------------------------------------------


def write_parts(folder: Path, found: list[str], of: int, bits: int = 0) -> list[Path]:
    folders = []
    for i in range(of):
        part = folder / str(i)
        part.mkdir(parents=True)
        with PartWriter(part, ("f",), bits) as out:
            for line in range(len(found) * i // of, len(found) * (i + 1) // of):
                out.take(Outcome(0, line + 1, 0, None, False, found[line], "{}", line.to_bytes(16, "little")))
        folders.append(part)
    return folders


def test_texts_on_disk_are_the_texts(tmp_path: Path) -> None:
    found = [*texts(50), "", "😀一二三", "a\nb", *texts(20, 3)]
    with Parts(write_parts(tmp_path, found, 3), ("f",)) as stored:
        assert list(stored.texts) == found and stored.texts.lengths.tolist() == list(map(len, found))
        assert [stored.texts.joined(a, b) for a, b in ((0, 73), (5, 60), (30, 31))] == ["".join(found[a:b]) for a, b in ((0, 73), (5, 60), (30, 31))]
        some = np.array([0, 2, 3, 40, 41, 60])
        for memory in (0, 1 << 20):
            assert list(stored.texts.pick(some, memory)) == [found[i] for i in some]


@pytest.mark.parametrize("memory", [1 << 12, 1 << 28])
def test_near_duplicates_from_disk_equal_those_in_memory(tmp_path: Path, memory: int) -> None:
    found = texts(400, 5)
    wanted = near_duplicates(found).tolist()
    bits = 14
    with Parts(write_parts(tmp_path, found, 4, bits), ("f",)) as stored:
        assert near_duplicates(stored.texts, memory=memory).tolist() == wanted
        assert near_duplicates(stored.texts, memory=memory, table=stored.table(memory)).tolist() == wanted


def test_tables_of_parts_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_OPEN_TEXTS", 500)
    found = [t for t in texts(200) if len(t) >= 5]
    whole = np.zeros(1 << 12, np.uint8)
    for _, _, hashes in Grams(found, 5):
        count_up(whole, 12, hashes)
    with Parts(write_parts(tmp_path, found, 3, 12), ("f",)) as stored:
        assert (stored.table(1 << 20) == whole).all() and set(whole.tolist()) == {0, 1, 2}
        smaller = stored.table(1 << 10)
        assert smaller is not None and smaller.tolist() == np.minimum(whole.reshape(-1, 4).sum(axis=1), 2).tolist()
    with Parts([*write_parts(tmp_path / "a", found[:90], 1, 13), *write_parts(tmp_path / "b", found[90:], 1, 12)], ("f",)) as mixed:  # parts made with another --memory
        assert (mixed.table(1 << 20) == whole).all()


@pytest.mark.parametrize("read", [1, 4, 1 << 20])
def test_adding_a_table_piece_by_piece(read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_index, "_READ", read)
    total = np.array([0, 1, 2, 1], np.uint8)
    add_table(total, io.BytesIO(bytes([0, 0, 1, 0, 2, 2, 1, 1])), 8)
    assert total.tolist() == [0, 2, 2, 2]
    add_table(total, io.BytesIO(bytes([1, 0, 0, 0])), 4)
    assert total.tolist() == [1, 2, 2, 2]
