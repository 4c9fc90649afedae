"""F64: tokenizer and model that do not belong together, and new tokens that would stay untrained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from self_model_sop.errors import DATA, SopError
from self_model_sop.train import pretrain, sft
from tiny_models import tiny_qwen
from tiny_runs import chats, expanded, pretrain_settings, run, sft_settings, texts


def test_an_expansion_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    model = expanded(tiny_qwen(tmp_path / "model"), 540, 600)
    for stage, values in (
        (sft.STAGE, sft_settings(model, chats(tmp_path / "chats.jsonl"), tmp_path / "sft")),
        (pretrain.STAGE, pretrain_settings(model, texts(tmp_path / "texts.jsonl"), tmp_path / "pretrain")),
    ):
        with pytest.raises(SopError, match=r"id 599, the model's embedding only 555 rows"):
            run(stage, values)


def test_a_damaged_expansion_record_is_named(tmp_path: Path) -> None:
    model = tiny_qwen(tmp_path / "model")
    (model / "expansion.json").write_text('{"new_ids": "many"}')
    with pytest.raises(SopError, match="not an expansion record") as error:
        run(sft.STAGE, sft_settings(model, chats(tmp_path / "chats.jsonl"), tmp_path / "out"))
    assert error.value.code == DATA


def test_padding_that_is_the_end_marker_does_not_hide_the_end(tmp_path: Path) -> None:
    """The tokenizer says pad = eos; the end of every answer is learned all the same."""
    from safetensors.numpy import load_file

    model = tiny_qwen(tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<|im_end|>"}, ensure_ascii=False), encoding="utf-8")
    done = run(sft.STAGE, sft_settings(model, chats(tmp_path / "chats.jsonl", 8), tmp_path / "out", data__max_length=256, training_args__max_steps=1))
    assert done.stats["rows"]["kept"] == 8 and load_file(done.path / "adapter_model.safetensors")
    saved = json.loads((done.path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["pad_token"] != saved["eos_token"]


def test_the_end_marker_of_every_answer_is_supervised(tmp_path: Path) -> None:
    from self_model_sop.train import corpus
    from self_model_sop.train.cache import Cache
    from self_model_sop.train.model import load_tokenizer
    from self_model_sop.train.template import renderer_for

    tokenizer = load_tokenizer(tiny_qwen(tmp_path / "model"))
    made = corpus.conversations([chats(tmp_path / "chats.jsonl", 12)], Cache(tmp_path / "tokens"), renderer_for(tokenizer), max_length=512, overlong="truncate")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for i in range(len(made)):
        segment = made.segment(i)
        assert end in segment.ids[segment.supervised].tolist()
