from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from self_model_sop.tokenizer import mlm_loss
from self_model_sop.tokenizer.mlm_loss import Chunk, chunks, masked_loss, span_masks, token_masks
from self_model_sop.train.model import load_model, load_tokenizer
from tiny_extensions import WORDS, extend_wordpiece
from tiny_models import sentences, tiny_bert, tiny_qwen

TEXTS = [t for t in sentences() if "\u4e00" <= t[0] <= "\u9fff"][:8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlm")
    extend_wordpiece(tiny_bert(folder / "bert"), WORDS, folder / "extended")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS), encoding="utf-8")
    return folder


def test_chunks_carry_special_tokens_and_the_characters_of_each_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "bert")
    text = "高血压患者 [MASK] 应当"
    (whole,) = chunks(tokenizer, [text], 64)
    assert whole.ids[0] == tokenizer.cls_token_id and whole.ids[-1] == tokenizer.sep_token_id and whole.spans[0] == whole.spans[-1] == (0, 0)
    assert tokenizer.mask_token_id not in whole.ids  # what looks like a special token is text
    assert "".join(text[a:b] for a, b in whole.spans).replace(" ", "") == text.replace(" ", "")
    cut = chunks(tokenizer, [text], 6)
    assert [i for c in cut for i in c.ids[1:-1]] == whole.ids[1:-1] and all(len(c.ids) <= 6 for c in cut)


def test_loss_is_the_mean_over_masked_tokens(folder: Path) -> None:
    tokenizer, model = load_tokenizer(folder / "bert"), load_model(folder / "bert", kind="masked")
    pieces = chunks(tokenizer, TEXTS, 64)
    masks = token_masks(0.3, 7)
    found = masked_loss(model, tokenizer, pieces, masks, batch_size=3)
    nats, count = 0.0, 0
    for i, piece in enumerate(pieces):
        where = masks(i, piece)
        ids = torch.tensor([[tokenizer.mask_token_id if k in where else t for k, t in enumerate(piece.ids)]])
        with torch.inference_mode():
            logs = torch.log_softmax(model(ids).logits[0], -1)
        nats, count = nats - sum(float(logs[k, piece.ids[k]]) for k in where), count + len(where)
    assert found.tokens == count and found.per_token == pytest.approx(nats / count, rel=1e-5)
    again = masked_loss(model, tokenizer, pieces, masks, batch_size=100)
    assert again.tokens == count and again.nats == pytest.approx(found.nats, rel=1e-6)
    other = masked_loss(model, tokenizer, pieces, token_masks(0.3, 8), batch_size=3)
    assert other.nats != found.nats


def test_the_same_characters_are_hidden_from_any_vocabulary(folder: Path) -> None:
    hidden = []
    for name in ("bert", "extended"):
        tokenizer = load_tokenizer(folder / name)
        draw = span_masks(0.3, 4, 1)
        covered = set()
        for i, piece in enumerate(chunks(tokenizer, TEXTS, 64)):
            covered |= {(piece.document, c) for k in draw(i, piece) for c in range(*piece.spans[k])}
        hidden.append(covered)
    small, large = hidden
    assert small and small <= large and len(large) < 1.4 * len(small)  # longer tokens may reach beyond a stretch


def test_masks_take_at_least_one_token_and_never_a_special_one() -> None:
    piece = Chunk(0, [2, 10, 11, 3], [(0, 0), (0, 1), (1, 2), (0, 0)])
    for seed in range(50):
        drawn = token_masks(0.01, seed)(0, piece)
        assert len(drawn) == 1 and drawn[0] in (1, 2)
        assert set(span_masks(1.0, 4, seed)(0, piece)) == {1, 2}
    assert token_masks(0.5, 0)(0, Chunk(0, [2, 3], [(0, 0), (0, 0)])) == []


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sub" / "result.json"
    given = ["--model_path", str(folder / "bert"), "--test_data", str(folder / "text.jsonl"), "--mask_ratio", "0.2"]
    assert mlm_loss.main([*given, "--output", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"])) and result["documents"] == len(TEXTS) and result["unknown_tokens"] == 0
    assert f"{result['bits_per_char']:.4f}" in capsys.readouterr().out
    assert mlm_loss.main([*given, "--batch-size", "1", "--output", str(out)]) == 0
    assert json.loads(out.read_text())["bits_per_char"] == pytest.approx(result["bits_per_char"], rel=1e-6)


def test_what_has_no_masked_loss(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(folder / "text.jsonl")
    assert mlm_loss.main(["--model_path", str(tiny_qwen(tmp_path / "qwen")), "--test_data", text]) == 2
    assert "this is a causal model" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("")
    assert mlm_loss.main(["--model_path", str(folder / "bert"), "--test_data", str(tmp_path / "empty.txt")]) == 3
    assert mlm_loss.main(["--model_path", str(folder / "bert"), "--test_data", text, "--mask_ratio", "0"]) == 2
    assert mlm_loss.main(["--model_path", str(folder / "bert"), "--test_data", str(tmp_path / "missing.jsonl")]) == 2
    assert mlm_loss.main(["--model_path", str(folder / "bert"), "--test_data", text, "--max_length", "2"]) == 2
