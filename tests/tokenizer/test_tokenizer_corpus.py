from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.errors import DATA, USAGE, SopError
from self_model_sop.tokenizer import corpus
from self_model_sop.tokenizer.settings import CorpusConfig, TokenizerConfig
from tiny_tokenizers import chinese, write_corpus


def config_of(tmp_path: Path, inputs: Sequence[Path], **settings: Any) -> TokenizerConfig:
    return TokenizerConfig(base_tokenizer="none", work_dir=tmp_path / "work", corpus=CorpusConfig(inputs=tuple(inputs), **settings))


def texts(folder: Path, name: str) -> list[str]:
    return [d.text for d in corpus.documents(folder / name)]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_every_format_is_read_and_validation_files_are_held_out_whole(tmp_path: Path) -> None:
    done = corpus.run(config_of(tmp_path, [write_corpus(tmp_path / "final")]))
    train, held = texts(done.path, corpus.TRAIN), texts(done.path, corpus.HELD_OUT)
    validation = set(chinese(20, seed=1))
    assert validation <= set(held) and not validation & set(train)
    assert not set(train) & set(held)
    assert set(done.stats["sources"]) == {"pretrain", "finetune", "reward"}
    assert 0.05 < (len(held) - 20) / (len(train) + len(held) - 20) < 0.2
    rows = done.stats["rows"]
    assert rows["total"] == rows["kept"] + sum(rows["dropped"].values()) + rows["quarantined"] == 300 + 20 + 40 + 10


def test_a_text_that_is_also_in_a_validation_file_is_never_learned_from(tmp_path: Path) -> None:
    shared = chinese(30, seed=8)
    write(tmp_path / "final/pretrain/train.jsonl", [{"text": t} for t in [*shared, *chinese(30, seed=9)]])
    write(tmp_path / "final/pretrain/validation.jsonl", [{"text": t} for t in shared])
    done = corpus.run(config_of(tmp_path, [tmp_path / "final"]))
    assert not set(shared) & set(texts(done.path, corpus.TRAIN))
    assert done.stats["rows"]["dropped"] == {"duplicate": 30}


def test_the_split_goes_by_content_not_by_order(tmp_path: Path) -> None:
    rows = [{"text": t} for t in chinese(200)]
    write(tmp_path / "a/set.jsonl", rows)
    write(tmp_path / "b/other.jsonl", rows[::-1])
    first, second = (corpus.run(config_of(tmp_path / n, [tmp_path / n])) for n in "ab")
    assert sorted(texts(first.path, corpus.HELD_OUT)) == sorted(texts(second.path, corpus.HELD_OUT))


def test_bad_rows_are_counted_with_reasons(tmp_path: Path) -> None:
    write(tmp_path / "mix.jsonl", [{"text": "好的"}, {"text": "坏的"}, "{broken", {"nothing": 1}, {"text": "  "}, {"text": 5}, {"text": "好的"}])
    stats = corpus.run(config_of(tmp_path, [tmp_path / "mix.jsonl"])).stats["rows"]
    assert stats["total"] == 7 and stats["kept"] == 2 and stats["quarantined"] + sum(stats["dropped"].values()) == 5
    assert stats["dropped"]["unknown_format"] == stats["dropped"]["empty"] == stats["dropped"]["duplicate"] == 1


def test_weights_by_source_or_file_name_and_zero_leaves_out(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"in/{name}.jsonl", [{"text": t} for t in chinese(20, seed=ord(name))])
    done = corpus.run(config_of(tmp_path, [tmp_path / "in"], weights={"a": 2.5, "b.jsonl": 3, "c": 0}))
    assert {d.source: d.weight for d in corpus.documents(done.path / corpus.TRAIN)} == {"a": 2.5, "b": 3.0}
    assert done.stats["rows"]["dropped"] == {"weight_zero": 20}


def test_max_chars_samples_evenly_by_content(tmp_path: Path) -> None:
    write(tmp_path / "big.jsonl", [{"text": t} for t in chinese(2000)])
    whole = corpus.run(config_of(tmp_path / "x", [tmp_path / "big.jsonl"]))
    chars = whole.stats["train_chars"] + whole.stats["heldout_chars"]
    part = corpus.run(config_of(tmp_path / "y", [tmp_path / "big.jsonl"], max_chars=chars // 4))
    assert 0.2 < (part.stats["train_chars"] + part.stats["heldout_chars"]) / chars < 0.3
    assert set(texts(part.path, corpus.HELD_OUT)) <= set(texts(whole.path, corpus.HELD_OUT))


def test_a_parquet_file_beside_its_jsonl_is_the_same_data(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": t} for t in chinese(30)]
    write(tmp_path / "in/train.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in/train.parquet")
    assert corpus.run(config_of(tmp_path, [tmp_path / "in"])).stats["rows"]["total"] == 30


def test_a_tiny_corpus_still_holds_one_document_out(tmp_path: Path) -> None:
    write(tmp_path / "two.jsonl", [{"text": "高血压\u2028患者"}, {"text": "定期\u2028测量\x85"}])  # characters that str.splitlines takes for line ends
    done = corpus.run(config_of(tmp_path, [tmp_path / "two.jsonl"], held_out=0.000001))
    train, held = texts(done.path, corpus.TRAIN), texts(done.path, corpus.HELD_OUT)
    assert len(train) == len(held) == 1 and train != held
    assert done.stats["sources"]["two"]["heldout_rows"] == 1


@pytest.mark.parametrize(("rows", "code"), [([], DATA), ([{"text": "只有一篇"}], DATA), (None, USAGE)])
def test_without_text_it_says_what_to_do(tmp_path: Path, rows: list[Any] | None, code: int) -> None:
    path = tmp_path / "in.jsonl"
    if rows is not None:
        write(path, rows)
    with pytest.raises(SopError) as caught:
        corpus.run(config_of(tmp_path, [path]))
    assert caught.value.code == code and "corpus.inputs" in str(caught.value)


def test_evenly_spread_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": str(i), "source": "s", "weight": 1.0} for i in range(100)])
    found = [int(d.text) for d in corpus.documents(path, 10)]
    assert len(found) == 10 and max(b - a for a, b in pairwise(found)) <= 11
    assert len(list(corpus.documents(path, 1000))) == 100
