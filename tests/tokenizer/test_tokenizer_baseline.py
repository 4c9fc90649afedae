from __future__ import annotations

import json
from pathlib import Path

import pytest

from hub_server import HubServer
from self_model_sop.errors import DATA, SopError
from self_model_sop.hub import HubConfig
from self_model_sop.tokenizer import baseline
from self_model_sop.tokenizer.base import BYTE_TO_CHARACTER, kind_of, open_base, spell, unspell
from self_model_sop.tokenizer.settings import TokenizerConfig
from tiny_tokenizers import SPECIALS, make

KINDS = {"qwen": "byte_bpe", "smollm2": "byte_bpe", "llama2": "sentencepiece_bpe", "t5": "unigram", "bert": "wordpiece"}


@pytest.mark.parametrize("name", KINDS)
def test_the_record_is_the_contract(tmp_path: Path, name: str) -> None:
    done = baseline.run(TokenizerConfig(base_tokenizer=str(make(name, tmp_path)), work_dir=tmp_path / "work"))
    record = json.loads((done.path / baseline.RECORD).read_text(encoding="utf-8"))
    assert record["kind"] == KINDS[name]
    assert {"class", "tokens", "special_ids", "special_roles", "normalizer", "pre_tokenizer", "decoder", "chat_template_sha256", "vocab_sha256", "files"} <= record.keys()
    base = open_base(done.path / baseline.TOKENIZER)
    assert record["tokens"] == base.size and record["highest_id"] == base.next_id - 1
    if name in ("qwen", "smollm2"):
        assert set(SPECIALS) <= record["special_ids"].keys() and record["chat_template_sha256"]


def test_weights_beside_the_tokenizer_do_not_make_it_stale(tmp_path: Path) -> None:
    config = TokenizerConfig(base_tokenizer=str(make("qwen", tmp_path)), work_dir=tmp_path / "work")
    baseline.run(config)
    (tmp_path / "qwen/model.safetensors").write_bytes(b"weights")
    assert baseline.run(config).skipped
    (tmp_path / "qwen/chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(SopError, match=r"chat_template\.jinja"):
        baseline.run(config)


def test_a_hub_id_goes_through_the_hub(tmp_path: Path, hub: HubServer) -> None:
    where = HubConfig(endpoint=hub.url, cache_dir=tmp_path / "cache")
    done = baseline.run(TokenizerConfig(base_tokenizer="bert-base-chinese", work_dir=tmp_path / "work", huggingface=where))
    assert done.stats["kind"] == "wordpiece"


def test_byte_alphabet_is_a_bijection() -> None:
    assert len(set(BYTE_TO_CHARACTER.values())) == 256
    assert unspell(spell(bytes(range(256)))) == bytes(range(256))
    assert unspell("<｜x｜>") == "<｜x｜>".encode()


@pytest.mark.parametrize(("text", "what"), [(None, "no tokenizer.json"), ("{", "no tokenizer"), ('{"a": 1}', "no model")])
def test_a_broken_tokenizer_is_one_clear_error(tmp_path: Path, text: str | None, what: str) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(SopError, match=what):
        open_base(tmp_path)


def test_a_kind_that_cannot_be_extended_is_refused() -> None:
    with pytest.raises(SopError, match="WordLevel") as caught:
        kind_of({"model": {"type": "WordLevel", "vocab": {}}}, "here")
    assert caught.value.code == DATA
