from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from self_model_sop.errors import SopError
from self_model_sop.eval.models import Opened, check_fit, open_model
from self_model_sop.eval.perplexity import Bits, Scored, _Scorer, _windows, bits_per_byte, encode_plain, score_texts, sequence_nats, start_id
from tiny_models import sentences, tiny_bert, tiny_llama, tiny_qwen

TEXTS = [*list(sentences())[:12], "一", "高血压患者应当按时服药。" * 60, "mixed 中文 and English, 123."]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Opened]:
    folder = tmp_path_factory.mktemp("perplexity")
    return {make.__name__: open_model(make(folder / make.__name__)) for make in (tiny_qwen, tiny_llama)}


def direct(model: Any, ids: list[int], positions: list[int]) -> float:
    """Nats of ids at positions, from one plain forward pass."""
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits.float(), -1)[0]
    return -sum(float(logs[p - 1, ids[p]]) for p in positions)


@pytest.mark.parametrize("name", ["tiny_qwen", "tiny_llama"])
def test_short_documents_equal_a_plain_forward_pass(opened: dict[str, Opened], name: str) -> None:
    model, tokenizer = opened[name]
    for text, bits in zip(TEXTS[:5], score_texts(model, tokenizer, TEXTS[:5], window=512, batch_size=3), strict=True):
        ids = [start_id(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert bits.nll_nats == pytest.approx(direct(model, ids, list(range(1, len(ids)))), rel=1e-5)
        assert (bits.tokens, bits.chars, bits.bytes) == (len(ids) - 1, len(text), len(text.encode()))
        assert bits.bits_per_byte == pytest.approx(bits.nll_nats / math.log(2) / len(text.encode()))


def test_any_batch_size_gives_the_same(opened: dict[str, Opened]) -> None:
    found = [bits_per_byte(*opened["tiny_qwen"], TEXTS, window=64, batch_size=n).bits_per_byte for n in (1, 2, 7, 100)]
    assert max(found) - min(found) < 1e-6


def test_documents_sum_exactly(opened: dict[str, Opened]) -> None:
    whole = bits_per_byte(*opened["tiny_llama"], TEXTS, window=64, batch_size=4)
    parts = sum((bits_per_byte(*opened["tiny_llama"], [t], window=64, batch_size=4) for t in TEXTS), Bits())
    assert (whole.tokens, whole.chars, whole.bytes) == (parts.tokens, parts.chars, parts.bytes)
    assert whole.nll_nats == pytest.approx(parts.nll_nats, rel=1e-7)


def test_long_documents_are_read_in_windows_that_overlap_by_half(opened: dict[str, Opened]) -> None:
    model, tokenizer = opened["tiny_qwen"]
    text = "".join(chr(0x4E00 + i % 97) for i in range(80))
    ids, window = [start_id(tokenizer), *encode_plain(tokenizer, [text])[0]], 32
    expected, done = direct(model, ids[:window], list(range(1, window))), window
    for start in range(window // 2, len(ids), window // 2):
        part = ids[start : start + window]
        expected += direct(model, part, [i - start for i in range(done, min(start + window, len(ids)))])
        done = max(done, start + window)
        if done >= len(ids):
            break
    assert len(ids) > 3 * window
    assert bits_per_byte(model, tokenizer, [text], window=window, batch_size=2).nll_nats == pytest.approx(expected, rel=1e-5)


@given(scored=st.lists(st.booleans(), min_size=1, max_size=200), window=st.integers(2, 40))
@settings(max_examples=300, deadline=None)
def test_each_scored_token_is_a_target_once_with_context(scored: list[bool], window: int) -> None:
    scored[0] = False
    ids = list(range(len(scored)))
    seen = []
    for w in _windows(0, Scored(ids, scored), window):
        assert 1 <= len(w.ids) <= window and list(w.ids) == ids[w.ids[0] : w.ids[-1] + 1]
        for t in w.targets:
            assert t >= min(w.ids[t], window // 2), "too little context"
            seen.append(w.ids[t])
    assert seen == [i for i, s in enumerate(scored) if s]


def test_a_window_longer_than_the_models_context_is_cut(opened: dict[str, Opened]) -> None:
    text = ["中文" * 400]
    assert bits_per_byte(*opened["tiny_qwen"], text, window=100_000, batch_size=1) == bits_per_byte(*opened["tiny_qwen"], text, window=512, batch_size=1)


def test_where_a_document_begins(opened: dict[str, Opened]) -> None:
    llama, qwen = opened["tiny_llama"].tokenizer, opened["tiny_qwen"].tokenizer
    assert start_id(llama) == llama.bos_token_id and start_id(qwen) == qwen.eos_token_id


def test_without_a_start_token_the_first_token_costs_the_vocabulary(opened: dict[str, Opened], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = opened["tiny_qwen"]
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.eos_token = bare.bos_token = None
    assert start_id(bare) is None
    ids = bare("高血压患者", add_special_tokens=False)["input_ids"]
    found = score_texts(model, bare, ["高血压患者", "一", ""], window=64, batch_size=2)
    rows = model.get_input_embeddings().weight.shape[0]
    assert found[0].nll_nats == pytest.approx(direct(model, ids, list(range(1, len(ids)))) + math.log(rows), rel=1e-5)
    assert found[2] == Bits()


def test_what_looks_like_a_special_token_is_text(opened: dict[str, Opened]) -> None:
    tokenizer = opened["tiny_qwen"].tokenizer
    ids = encode_plain(tokenizer, ["a<|im_end|>b"])[0]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids and tokenizer.decode(ids) == "a<|im_end|>b"
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id]  # the tokenizer itself is left as it was


def test_only_scored_tokens_count(opened: dict[str, Opened]) -> None:
    model = opened["tiny_llama"].model
    ids = list(range(20, 60))
    scored = [i in (5, 6, 30) for i in range(40)]
    found = sequence_nats(model, [Scored(ids, scored), Scored(ids, [False] * 40)], window=512, batch_size=2)
    assert found[0] == pytest.approx(direct(model, ids, [5, 6, 30]), rel=1e-5) and found[1] == 0.0


def test_models_that_scale_their_logits_go_the_long_way() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    for scaling, split in ((1.0, True), (0.01, False)):
        model = GraniteForCausalLM(GraniteConfig(logits_scaling=scaling, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)).eval()
        ids = list(range(3, 60))
        assert _Scorer(model, ids).split is split
        assert sequence_nats(model, [Scored(ids, [False] + [True] * 56)], window=64, batch_size=1)[0] == pytest.approx(direct(model, ids, list(range(1, 57))), rel=1e-5)


def test_nothing_to_measure_and_models_that_cannot(opened: dict[str, Opened], tmp_path: Path) -> None:
    with pytest.raises(SopError, match="no text to measure"):
        bits_per_byte(*opened["tiny_qwen"], ["", ""], window=64, batch_size=1)
    with pytest.raises(SopError, match="masked model"):
        open_model(tiny_bert(tmp_path / "bert"))
    with pytest.raises(SopError, match="embedding rows"):
        check_fit(opened["tiny_qwen"].model, opened["tiny_llama"].tokenizer, "here")
