"""Real tokenizers and real text: every gate passes on every base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from self_model_sop.tokenizer import extend, gates, select
from self_model_sop.tokenizer.settings import AuxConfig, CorpusConfig, SelectionConfig, TokenizerConfig
from self_model_sop.train.model import load_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared"
pytestmark = [pytest.mark.shared, pytest.mark.slow, pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")]

# base -> (held-out reduction by 500 tokens of medical text that must be reached, special tokens named one by one)
BASES = {
    "qwen3": (0.05, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]),
    "llama3": (0.10, ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"]),
    "deepseek_v3": (0.02, ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]),
    "llama2": (0.25, ["<s>", "</s>", "<unk>"]),
    "bert_base_chinese": (0.18, ["[PAD]", "[MASK]", "[CLS]"]),
}


def test_the_probe_is_that_of_llama_cpp() -> None:
    """Its converter knows Qwen's pre-tokenizer by this hash (convert_hf_to_gguf.py, `get_vocab_base_pre`: qwen2)."""
    tokenizer = load_tokenizer(SHARED / "tokenizers/qwen3")
    found = hashlib.sha256(str(tokenizer.encode(gates.LLAMA_CPP_PROBE)).encode()).hexdigest()
    assert found == "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea"


@pytest.mark.parametrize("name", BASES)
def test_all_gates_pass_on_the_real_base(tmp_path: Path, name: str) -> None:
    least, special = BASES[name]
    config = TokenizerConfig(
        base_tokenizer=str(SHARED / "tokenizers" / name), work_dir=tmp_path / "work", extended_tokenizer=tmp_path / "extended",
        corpus=CorpusConfig(inputs=(SHARED / "data/medical/infectious_disease.txt", SHARED / "data/medical/medical_sft_1k.sharegpt.jsonl")),
        aux_tokenizer=AuxConfig(vocab_size=4000), selection=SelectionConfig(new_tokens=500),
    )  # fmt: skip
    done = extend.run(config)
    assert set(done.stats["gates"].values()) == {0}
    assert done.stats["reduction"] >= least
    changed = done.stats["changed_regression_lines"]
    assert {k: changed[k] for k in ("english", "code", "numbers", "korean", "cyrillic", "emoji")} == dict.fromkeys(("english", "code", "numbers", "korean", "cyrillic", "emoji"), 0)
    record = json.loads((config.work_dir / "baseline/baseline.json").read_text(encoding="utf-8"))
    grown = json.loads((done.path / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {a["content"]: a["id"] for a in grown["added_tokens"]}
    assert {s: ids[s] for s in special} == {s: record["special_ids"][s] for s in special}
    measured = json.loads((config.below("selection").manifest).read_text(encoding="utf-8"))["stats"]
    assert measured["unused_on_training"] <= 0.01 * 500
    assert measured["reduction_by_gains"] == pytest.approx(measured["reduction"], abs=1e-4)
    assert (config.below("selection").folder / select.PLAN).read_bytes() == (done.path / select.PLAN).read_bytes()
