"""The same data must give the same training, however it is laid into batches: fp32, tiny models, through the real stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.train import pretrain, sft
from tiny_models import tiny_bert, tiny_llama, tiny_qwen
from tiny_runs import chats, losses, pretrain_settings, run, sft_settings, texts

BOUND = 1e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("invariant")
    tiny_qwen(path / "qwen")
    tiny_llama(path / "llama")
    chats(path / "chats.jsonl", 64)
    texts(path / "texts.jsonl", 60)
    return path


def _sft(root: Path, name: str, model: str = "qwen", **more: Any) -> list[float]:
    values = sft_settings(root / model, root / "chats.jsonl", root / "out" / f"{model}-{name}", training_args__max_steps=6, training_args__lr_scheduler_type="constant", **more)
    return losses(run(sft.STAGE, values).path)


def _close(found: list[float], wanted: list[float]) -> None:
    assert len(found) == len(wanted) == 6
    differences = [a - b for a, b in zip(found, wanted, strict=True)]
    assert max(map(abs, differences)) <= BOUND, differences
    assert abs(sum(differences) / len(differences)) <= 1e-6 + BOUND / 10, f"one-sided drift: {differences}"


@pytest.fixture(scope="module")
def reference(root: Path) -> dict[str, list[float]]:
    return {m: _sft(root, "8x1", m, training_args__per_device_train_batch_size=8, data__batching="padded") for m in ("qwen", "llama")}


@pytest.mark.parametrize("model", ["qwen", "llama"])
@pytest.mark.parametrize("batching", ["compact", "padding_free"])
def test_layouts_give_the_same_losses(root: Path, reference: dict[str, list[float]], model: str, batching: str) -> None:
    _close(_sft(root, batching, model, training_args__per_device_train_batch_size=8, data__batching=batching), reference[model])


@pytest.mark.parametrize("each", [1, 2])
def test_accumulation_gives_the_same_losses(root: Path, reference: dict[str, list[float]], each: int) -> None:
    """8x1 = 1x8 although the eight conversations have different numbers of learned tokens."""
    found = _sft(root, f"{each}x{8 // each}", training_args__per_device_train_batch_size=each, training_args__gradient_accumulation_steps=8 // each)
    _close(found, reference["qwen"])


def test_eager_attention_gives_the_same_losses(root: Path, reference: dict[str, list[float]]) -> None:
    _close(_sft(root, "eager", training_args__per_device_train_batch_size=8, attn_implementation="eager"), reference["qwen"])


@pytest.mark.parametrize("batching", ["padded", "padding_free"])
def test_computing_activations_again_gives_the_same_losses(root: Path, reference: dict[str, list[float]], batching: str) -> None:
    more = {"training_args__gradient_checkpointing": True, "data__batching": batching}
    _close(_sft(root, f"checkpointing-{batching}", training_args__per_device_train_batch_size=8, **more), reference["qwen"])


@pytest.mark.parametrize("model", ["qwen", "llama"])
def test_packing_gives_the_losses_of_one_row_each(root: Path, model: str) -> None:
    """Steps over the whole set, since packing changes the order: packed into bins, each conversation in a row of its own, and all in one row."""
    whole: dict[str, Any] = {"training_args__per_device_train_batch_size": 64}
    padded = _sft(root, "whole", model, data__batching="padded", **whole)
    _close(_sft(root, "packed", model, data__packing=True, **whole), padded)
    _close(_sft(root, "one-row", model, data__batching="padding_free", **whole), padded)


def test_blocks_in_one_row_or_several_give_the_same_losses(root: Path) -> None:
    found = []
    for each, steps in ((4, 1), (1, 4)):
        out = root / "out" / f"pretrain-{each}"
        values = pretrain_settings(root / "llama", root / "texts.jsonl", out, training_args__per_device_train_batch_size=each, training_args__gradient_accumulation_steps=steps)
        found.append(losses(run(pretrain.STAGE, values).path))
    _close(found[0], found[1])


def test_a_masked_model_trains_the_same_whatever_its_batches(root: Path) -> None:
    """8x1 = 4x2 = 1x8: the masks belong to a document's place in the training, and every masked token of a step weighs the same."""
    model = tiny_bert(root / "bert")
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**described, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))  # dropout is drawn batch by batch
    found = []
    for each in (8, 4, 1):
        batch = {"training_args__per_device_train_batch_size": each, "training_args__gradient_accumulation_steps": 8 // each}
        done = run(pretrain.STAGE, pretrain_settings(model, root / "texts.jsonl", root / "out" / f"bert-{each}", data__eval_file=root / "texts.jsonl", **batch))
        found.append((losses(done.path), done.stats["eval_loss_after"], done.stats["supervised_tokens"]))
    for other, evaluation, learned in found[1:]:
        _close(other, found[0][0])
        assert evaluation == pytest.approx(found[0][1], abs=BOUND) and learned == found[0][2]
    assert found[0][0][-1] < found[0][0][0]


def test_the_same_run_twice_is_the_same_to_the_last_byte(root: Path) -> None:
    values = sft_settings(root / "qwen", root / "chats.jsonl", root / "out" / "once", peft__lora_dropout=0.1)
    first = run(sft.STAGE, values)
    again = run(sft.STAGE, {**values, "training_args__output_dir": root / "out" / "twice"})
    digests = [{o["path"]: o["sha256"] for o in a.manifest["outputs"] if o["path"].endswith((".safetensors", "tokenizer.json"))} for a in (first, again)]
    assert digests[0] == digests[1] and len(digests[0]) == 2
    assert json.loads((first.path / "manifest.json").read_text())["fingerprint"] == again.manifest["fingerprint"]
