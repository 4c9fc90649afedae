"""Continued pretraining through the real stage, on tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from self_model_sop.config import ConfigError, load
from self_model_sop.errors import SopError
from self_model_sop.stage import load_for
from self_model_sop.train import corpus
from self_model_sop.train.cache import Cache
from self_model_sop.train.model import load_model, load_tokenizer
from self_model_sop.train.packing import Blocks
from self_model_sop.train.pretrain import STAGE, PretrainConfig, PretrainData
from self_model_sop.train.textdata import document_end, reading_order
from tiny_models import tiny_bert, tiny_llama, tiny_qwen
from tiny_runs import expanded, losses, pretrain_settings, rows, run, settings, texts

ROOT = Path(__file__).resolve().parents[2]
TWO = [{"name": "rows", "train": "new_rows", "max_steps": 4}, {"name": "full", "max_steps": 4}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrain")
    tiny_qwen(path / "qwen")
    tiny_llama(path / "llama")
    tiny_bert(path / "bert")
    for name in ("qwen", "llama"):
        expanded(shutil.copytree(path / name, path / f"{name}_expanded"))
    texts(path / "train.jsonl", 60)
    texts(path / "eval.jsonl", 10, seed=3)
    return path


def _values(root: Path, name: str, model: str = "qwen", **more: Any) -> dict[str, Any]:
    return pretrain_settings(root / model, root / "train.jsonl", root / "out" / name, **more)


def test_the_shipped_file_loads() -> None:
    shipped = load(PretrainConfig, ROOT / "config/self_model_config/pretrain.yaml", check_paths=False).config
    assert [(p.name, p.train) for p in shipped.phases] == [("rows", "new_rows"), ("full", "all")]


@pytest.mark.parametrize("model", ["qwen_expanded", "llama_expanded"])
def test_the_first_phase_moves_the_new_rows_alone(root: Path, model: str) -> None:
    done = run(STAGE, _values(root, f"rows-{model}", model, phases=TWO[:1]))
    before, after = load_model(root / model), load_model(done.path)
    trained = {"embed_tokens.weight", "lm_head.weight"}
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        changed = (old != new).reshape(len(old), -1).any(dim=1).nonzero()[:, 0].tolist()
        assert set(changed) <= set(range(500, 540)) if any(t in name for t in trained) else not changed, name
        assert changed or not any(t in name for t in trained), name
    assert (after.get_output_embeddings().weight is after.get_input_embeddings().weight) == model.startswith("qwen")
    assert done.stats["phases"][0]["trainable"] == 40 * 64 * (1 if model.startswith("qwen") else 2)


def test_two_phases_run_one_after_the_other_on_fresh_data(root: Path) -> None:
    done = run(STAGE, _values(root, "two", "qwen_expanded", phases=TWO, data__eval_file=root / "eval.jsonl"))
    lines = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [("rows", s) for s in range(1, 5)] + [("full", s) for s in range(1, 5)]
    assert done.stats["eval_loss_after"] < done.stats["eval_loss_before"] and done.stats["steps"] == 8
    assert 15 * 64 < done.stats["tokens"] <= 16 * 64  # the last block of a pass is shorter
    assert {"model.safetensors", "config.json", "tokenizer.json", "expansion.json", "loss.png", "report.html"} <= {p.name for p in done.path.iterdir()}
    assert not (done.path / "checkpoints").exists() and not list(done.path.glob(".*"))


def test_a_phase_without_an_expansion_is_skipped_and_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(STAGE, _values(root, "plain", phases=TWO))
    assert [p["name"] for p in done.stats["phases"]] == ["full"] and "not expanded" in capsys.readouterr().err
    with pytest.raises(SopError, match="no phase has anything to train"):
        run(STAGE, _values(root, "nothing", phases=TWO[:1]))


def test_embeddings_have_their_own_learning_rate(root: Path) -> None:
    done = run(STAGE, _values(root, "rate", "llama", phases=[{"name": "full", "max_steps": 3, "embedding_learning_rate": 0.0}]))
    before, after = load_model(root / "llama"), load_model(done.path)
    assert torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    assert not torch.equal(before.model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight)


def test_the_epsilon_of_new_rows_is_one_by_the_learned_tokens_of_a_step(root: Path) -> None:
    """A row that no text uses is pushed away at the learning rate by Adam as usual, and next to nothing moves it with the default."""
    few = rows(root / "few.jsonl", [{"text": "多喝水。" * 12}] * 8)
    tokenizer = load_tokenizer(root / "qwen_expanded")
    tokens = corpus.documents([few], Cache(root / "tokens"), tokenizer, end=document_end(tokenizer, "auto"))
    unused = [i for i in range(500, 540) if i not in tokens.ids]
    size = int(tokens.lengths[0])  # a document is a block; its first token is not learned
    before = load_model(root / "qwen_expanded").get_input_embeddings().weight.detach()

    def rows_phase(name: str, **more: Any) -> tuple[list[float], float]:
        values = _values(root, name, "qwen_expanded", data__train_file=few, data__block_size=size, training_args__per_device_train_batch_size=1, phases=[{**TWO[0], **more}])
        done = run(STAGE, values)
        return losses(done.path), float((load_model(done.path).get_input_embeddings().weight.detach() - before)[unused].abs().mean())

    (auto, rested), (given, _), (_, pushed) = rows_phase("eps-auto"), rows_phase("eps-given", new_rows_epsilon=1 / (size - 1)), rows_phase("eps-usual", new_rows_epsilon=1e-8)
    assert len(unused) > 20 and auto == given
    assert pushed > 20 * rested > 0


def test_an_epsilon_for_an_optimizer_without_one_is_refused(root: Path) -> None:
    run(STAGE, _values(root, "adafactor", "qwen_expanded", phases=TWO[:1], training_args__optim="adafactor"))
    with pytest.raises(SopError, match="optim adafactor has no epsilon"):
        run(STAGE, _values(root, "adafactor-eps", "qwen_expanded", phases=[{**TWO[0], "new_rows_epsilon": 1e-3}], training_args__optim="adafactor"))
    with pytest.raises(ConfigError, match="new_rows_epsilon must be above 0"):
        run(STAGE, _values(root, "eps-zero", phases=[{**TWO[0], "new_rows_epsilon": 0}]))


def test_a_masked_model_is_trained_on_masked_tokens(root: Path) -> None:
    values = _values(root, "bert", "bert", phases=[{"name": "full", "max_steps": 40}], data__eval_file=root / "eval.jsonl", training_args__per_device_train_batch_size=8)
    done = run(STAGE, values)
    assert done.stats["objective"] == "mlm" and done.stats["eval_loss_after"] < done.stats["eval_loss_before"]
    rows_of_model = load_model(root / "bert", kind="masked").config.vocab_size
    assert done.stats["eval_loss_before"] == pytest.approx(np.log(rows_of_model), rel=0.05)  # a random model knows nothing
    again = run(STAGE, {**values, "training_args__output_dir": root / "out" / "bert2"})
    assert losses(again.path) == losses(done.path)


# --- data ---------------------------------------------------------------------------------------------------------------------------------


def _documents(root: Path, model: str, lines: list[dict[str, Any]], folder: Path) -> Any:
    tokenizer = load_tokenizer(root / model)
    return tokenizer, corpus.documents([rows(folder / "t.jsonl", lines)], Cache(folder / "tokens"), tokenizer, end=document_end(tokenizer, "auto"))


def test_documents_end_with_the_document_token_and_control_tokens_in_text_stay_text(root: Path, tmp_path: Path) -> None:
    injected = "先说<|im_end|>再说<|endoftext|>"
    tokenizer, made = _documents(root, "qwen", [{"text": "多喝水。"}, {"text": injected}], tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end != tokenizer.eos_token_id  # <|im_end|> ends turns, not documents
    for i, text in enumerate(["多喝水。", injected]):
        ids = made.segment(i).ids.tolist()
        assert ids[-1] == end and not set(ids[:-1]) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids[:-1]) == text
    tokenizer, made = _documents(root, "llama", [{"text": "多喝水。"}], tmp_path / "llama")
    assert made.segment(0).ids[0] == tokenizer.bos_token_id and made.segment(0).ids[-1] == tokenizer.convert_tokens_to_ids("<|end_of_text|>")


def test_every_row_is_counted(root: Path, tmp_path: Path) -> None:
    _, made = _documents(root, "qwen", [{"text": "一"}, {"text": "  "}, {"number": 1}, {"text": 5}], tmp_path)
    meta = made.meta
    assert meta["total"] == 4 and len(made) + sum(meta["dropped"].values()) == 4 and len(made) == 1


def test_mixing_weights_and_replay_set_the_shares(root: Path, tmp_path: Path) -> None:
    files = [texts(tmp_path / f"{name}.jsonl", 40, seed=i) for i, name in enumerate(("domain", "rare", "general"))]
    tokenizer = load_tokenizer(root / "qwen")
    made = corpus.documents(files, Cache(tmp_path / "tokens"), tokenizer, end=0)
    data = PretrainData(train_file=(files[0], files[1]), mix={"domain.jsonl": 2.5, "rare.jsonl": 0.5}, replay_file=files[2], replay_share=0.25)
    order = reading_order(made, data, seed=0)
    times = np.bincount(made.groups[order], minlength=3) / 40
    assert times[0] == pytest.approx(2.5, abs=0.2) and times[1] == pytest.approx(0.5, abs=0.2)
    tokens = np.bincount(made.groups[order], weights=made.lengths[order], minlength=3)
    assert tokens[2] / tokens.sum() == pytest.approx(0.25, abs=0.06)
    assert np.array_equal(order, reading_order(made, data, seed=0)) and not np.array_equal(order, reading_order(made, data, seed=1))
    with pytest.raises(SopError, match="names files that are not read: other"):
        reading_order(made, PretrainData(mix={"other": 1.0}), seed=0)
    capped = reading_order(made, PretrainData(max_tokens=500), seed=0)
    assert 500 <= Blocks(made, capped, 64).total < 500 + made.lengths.max()


def test_problems_are_found_before_anything_is_loaded(root: Path) -> None:
    from self_model_sop.config import ConfigError

    with pytest.raises(ConfigError) as error:
        load_for(STAGE, None, settings(**_values(
            root, "bad", data__block_size=4096, data__replay_share=0.1, objective="mlm", phases=[{"name": "a", "max_steps": 1}, {"name": "a", "max_steps": 1}],
            training_args__eval_strategy="steps",
        )))  # fmt: skip
    text = str(error.value)
    assert all(word in text for word in ("reads at most 512", "no data.replay_file", "mlm does not fit", "same name", "there is no data.eval_file"))


def test_a_typo_in_a_phase_is_answered_with_the_right_key(root: Path) -> None:
    from self_model_sop.config import ConfigError

    with pytest.raises(ConfigError, match=r"unknown key 'phases\.0\.max_step'.*did you mean 'max_steps'"):
        load_for(STAGE, None, settings(**_values(root, "typo", phases=[{"name": "a", "max_step": 1}])))


def test_the_new_rows_of_a_masked_model_train_alone(root: Path) -> None:
    model = expanded(shutil.copytree(root / "bert", root / "bert_expanded"), 300, 420)
    done = run(STAGE, _values(root, "bert-rows", "bert_expanded", phases=[{"name": "rows", "train": "new_rows", "max_steps": 6}], training_args__per_device_train_batch_size=8))
    before, after = load_model(model, kind="masked"), load_model(done.path, kind="masked")
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        changed = set((old != new).reshape(len(old), -1).any(dim=1).nonzero()[:, 0].tolist())
        assert changed and changed <= set(range(300, 420)) if "word_embeddings" in name else not changed, name
    assert after.get_output_embeddings().weight is after.get_input_embeddings().weight
