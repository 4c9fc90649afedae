"""The life of an expanded model: choose, append, grow, train the rows and an adapter, merge, load again, generate. What is special stays so at each step."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from self_model_sop.tokenizer import resize
from self_model_sop.tokenizer.baseline import special_ids
from self_model_sop.tokenizer.settings import CorpusConfig, SelectionConfig, TokenizerConfig
from self_model_sop.train import merge, pretrain, sft
from self_model_sop.train.model import load_model, load_tokenizer
from tiny_models import tiny_llama, tiny_qwen
from tiny_runs import chats, losses, pretrain_settings, run, sft_settings
from tiny_tokenizers import chinese, write_corpus


def marks(folder: Path) -> tuple[dict[str, int], str, str]:
    """Special ids by name, the template's hash, and what it renders."""
    tokenizer = load_tokenizer(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "高血压？"}], tokenize=False, add_generation_prompt=True)
    return special_ids(tokenizer), hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(), text


def live(folder: Path, base: Path, **training: Any) -> None:
    """Every step, and what holds after it."""
    config = TokenizerConfig(
        base_tokenizer=str(base), work_dir=folder / "work", extended_tokenizer=folder / "extended", extended_model=folder / "expanded",
        corpus=CorpusConfig(inputs=(write_corpus(folder / "final"),)), selection=SelectionConfig(new_tokens=60, min_freq=3),
    )  # fmt: skip
    grown = resize.run(config).path
    first, last = load_model(base).get_input_embeddings().weight.shape[0], load_model(grown).get_input_embeddings().weight.shape[0]
    texts = folder / "texts.txt"
    texts.write_text("\n".join(chinese(60, seed=8)), encoding="utf-8")
    rows = {"phases": [{"name": "rows", "train": "new_rows", "max_steps": 6}]}
    trained = run(pretrain.STAGE, pretrain_settings(grown, texts, folder / "rows", **rows, **training)).path
    adapter = run(sft.STAGE, sft_settings(trained, chats(folder / "chats.jsonl"), folder / "adapter", **training)).path
    merged = run(merge.STAGE, {"adapter": adapter, "output_dir": folder / "merged"}).path

    expected = marks(base)
    for step in (config.extended_tokenizer, grown, trained, adapter, merged):
        own = marks(step)
        assert expected[0].items() <= own[0].items() and own[1:] == expected[1:], step.name
    tables = {f: load_model(f).get_input_embeddings().weight.detach() for f in (base, grown, trained, merged)}
    for table in (tables[grown], tables[trained], tables[merged]):  # LoRA with new rows: no old row moves
        assert table.shape[0] == last and torch.equal(table[:first], tables[base][:first])
    assert not torch.equal(tables[trained][first:], tables[grown][first:]) and not torch.equal(tables[merged][first:], tables[trained][first:])
    assert losses(folder / "rows")[-1] < losses(folder / "rows")[0]
    model, tokenizer = load_model(merged), load_tokenizer(merged)
    assert resize.is_tied(model) == resize.is_tied(load_model(base))
    ids = tokenizer(chinese(1, seed=9)[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert (ids >= first).any() and model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] > ids.shape[1]


@pytest.mark.parametrize("make", [tiny_qwen, tiny_llama])
def test_on_a_tiny_model(tmp_path: Path, make: Any) -> None:
    live(tmp_path, make(tmp_path / "base"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_with_a_model_of_qwens_shape(tmp_path: Path) -> None:
    live(tmp_path, tiny_qwen(tmp_path / "base", hidden_size=896, layers=4), precision="bf16")
