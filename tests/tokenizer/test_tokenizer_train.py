from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from self_model_sop.errors import DATA, SopError
from self_model_sop.tokenizer import corpus, train
from self_model_sop.tokenizer.settings import AuxConfig, CorpusConfig, TokenizerConfig
from tiny_tokenizers import write_corpus


def config_of(tmp_path: Path, **aux: object) -> TokenizerConfig:
    final = tmp_path / "final"
    if not final.exists():
        write_corpus(final)
    return TokenizerConfig(base_tokenizer="none", work_dir=tmp_path / "work", corpus=CorpusConfig(inputs=(final,)), aux_tokenizer=AuxConfig(**aux))  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_vocabulary_above_what_the_corpus_supports_is_reduced_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str) -> None:
    done = train.run(config_of(tmp_path, vocab_size=20_000, model_type=model_type))
    assert 300 < done.stats["vocab_size"] < 20_000 == done.stats["asked_for"]
    assert f"supports a vocabulary of {done.stats['vocab_size']}, not 20000" in capsys.readouterr().err
    assert {p.name for p in done.path.iterdir()} >= {train.MODEL, train.VOCAB, "manifest.json"}


def test_the_documented_keys_reach_the_trainer(tmp_path: Path) -> None:
    import sentencepiece

    done = train.run(config_of(tmp_path, vocab_size=500, byte_fallback=False))
    plain = sentencepiece.SentencePieceProcessor(model_file=str(done.path / train.MODEL))
    assert plain.get_piece_size() == done.stats["vocab_size"] <= 500
    assert plain.piece_to_id("<0x41>") == plain.unk_id()
    again = train.STAGE.run(config_of(tmp_path, vocab_size=500), overwrite=True)
    fallback = sentencepiece.SentencePieceProcessor(model_file=str(again.path / train.MODEL))
    assert fallback.is_byte(fallback.piece_to_id("<0x41>"))


def test_the_corpus_is_made_first_where_it_is_absent(tmp_path: Path) -> None:
    config = config_of(tmp_path, vocab_size=400)
    assert not config.below("corpus").folder.exists()
    train.run(config)
    assert (config.below("corpus").folder / corpus.TRAIN).is_file()
    assert train.run(config).skipped


def test_the_same_corpus_gives_the_same_model(tmp_path: Path) -> None:
    first, second = (train.run(config_of(tmp_path / n, vocab_size=400)) for n in "ab")
    assert (first.path / train.MODEL).read_bytes() == (second.path / train.MODEL).read_bytes()


def test_a_vocabulary_below_the_characters_of_the_corpus_is_refused_with_a_number(tmp_path: Path) -> None:
    with pytest.raises(SopError, match=r"vocab_size 40 is below the \d+ single characters") as caught:
        train.run(config_of(tmp_path, vocab_size=40))
    assert caught.value.code == DATA and not (tmp_path / "work/aux/manifest.json").exists()


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="患者，。！a é😀\u3000", max_size=120), st.integers(4, 40))
def test_long_lines_are_split_not_dropped(line: str, limit: int) -> None:
    parts = list(train.split(line, limit))
    assert "".join(parts) == line
    assert all(0 < len(p.encode()) <= limit for p in parts)


def test_a_line_above_the_limit_is_learned_from(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    long = "高血压患者应当定期测量血压。" * 500
    rows = [{"text": long + t} for t in ("好", "坏", "中")] + [{"text": "短文" + t} for t in "甲乙丙丁"]
    (final / "a.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    done = train.run(config_of(tmp_path, vocab_size=400, max_sentence_length=200))
    assert any("血压" in piece for piece, _ in train.pieces(done.path / train.MODEL))
