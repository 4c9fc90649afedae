"""Reward models through the real stage, on tiny models; their losses against TRL's own trainer on the text of the same data."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from self_model_sop.artifact import sha256_file
from self_model_sop.config import ConfigError
from self_model_sop.errors import DATA, SopError
from self_model_sop.stage import load_for
from self_model_sop.train import merge
from self_model_sop.train.model import load_tokenizer
from self_model_sop.train.reward import STAGE, load_judge
from self_model_sop.train.template import renderer_for
from tiny_models import tiny_qwen
from tiny_preferences import BAD, GOOD, pair_settings, preferences, read
from tiny_runs import Process, expanded, losses, rows, run, settings, steps_logged

END = "<|im_end|>"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward")
    tiny_qwen(path / "model")
    preferences(path / "train.jsonl")
    preferences(path / "eval.jsonl", 10, seed=9)
    return path


def _values(root: Path, name: str, **more: Any) -> dict[str, Any]:
    return pair_settings(root, root / "out" / name, algorithm="reward", **more)


def _answers(*endings: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": "第1个问题是什么？"}, {"role": "assistant", "content": "多喝水" + ending}] for ending in endings]


@pytest.mark.parametrize("lora", [True, False])
def test_losses_are_those_of_trl_itself(root: Path, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import peft
    import transformers
    import trl

    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    ours = losses(run(STAGE, _values(root, f"direct-{lora}", peft__enabled=lora, training_args__learning_rate=1e-3)).path)
    renderer = renderer_for(load_tokenizer(root / "model"))
    pairs = read(root / "train.jsonl")
    asked = [renderer.text([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True) for row in pairs]
    texts = [{"chosen": text + row["chosen"] + END, "rejected": text + row["rejected"] + END} for text, row in zip(asked, pairs, strict=True)]
    args = trl.RewardConfig(
        output_dir=str(root / f"direct-{lora}"), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-3, logging_steps=1, seed=42, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", disable_tqdm=True, save_strategy="no", max_length=128,
    )  # fmt: skip
    adapter = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]) if lora else None
    transformers.set_seed(42)  # the scoring head starts at random
    model, tokenizer = transformers.AutoModelForSequenceClassification.from_pretrained(root / "model", num_labels=1, dtype=torch.float32), load_tokenizer(root / "model")
    trainer = trl.RewardTrainer(model=model, args=args, train_dataset=datasets.Dataset.from_list(texts), processing_class=tokenizer, peft_config=adapter)
    trainer.train()
    assert ours == pytest.approx([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], abs=1e-5) and len(set(ours)) == 6


@pytest.fixture(scope="module")
def done(root: Path) -> Any:
    return run(STAGE, _values(root, "judge", training_args__max_steps=12, training_args__eval_strategy="steps", training_args__eval_steps=12))


def test_it_learns_to_tell_answers_apart(done: Any) -> None:
    stats = done.stats
    assert stats["eval_accuracy_before"] < 0.9 <= stats["eval_accuracy_after"] and stats["eval_margin_after"] > 1 > stats["eval_margin_before"]
    last = next(line for line in read(done.path / "metrics.jsonl") if "eval_loss" in line)
    assert last["eval_accuracy"] == pytest.approx(stats["eval_accuracy_after"], abs=0.11)
    good, bad = load_judge(done.path).score(_answers(GOOD, BAD))
    assert good > bad + 1


def test_a_score_does_not_hang_on_what_stands_beside_it(done: Any) -> None:
    judge = load_judge(done.path)
    talks = [*_answers(GOOD, BAD), [{"role": "user", "content": "问" * 30}, {"role": "assistant", "content": "很长的回答" * 6}]]
    together, alone = judge.score(talks), [judge.score([talk])[0] for talk in talks]
    assert together == pytest.approx(alone, abs=1e-5)
    with pytest.raises(SopError, match="must end with an assistant turn"):
        judge.score([[{"role": "user", "content": "问"}]])


def test_other_libraries_load_it(done: Any) -> None:
    """As transformers does for judges, and with the class by which verl puts a value on every token: the last one's is the score."""
    import transformers

    config = json.loads((done.path / "config.json").read_text(encoding="utf-8"))
    assert (
        config["architectures"] == ["Qwen2ForSequenceClassification"] and config["pad_token_id"] == load_tokenizer(done.path).pad_token_id != load_tokenizer(done.path).eos_token_id
    )
    judge = load_judge(done.path)
    talk = _answers(GOOD)[0]
    text = judge.tokenizer.apply_chat_template(talk, tokenize=False).rstrip("\n")
    assert text.endswith(GOOD + END)
    ids = torch.tensor([judge.tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        single = transformers.AutoModelForSequenceClassification.from_pretrained(done.path, dtype=torch.float32).eval()(ids).logits[0, 0]
        every = transformers.AutoModelForTokenClassification.from_pretrained(done.path, dtype=torch.float32, num_labels=1).eval()(ids).logits[0, -1, 0]
    assert float(single) == pytest.approx(judge.score([talk])[0], abs=1e-5)
    assert float(every) == pytest.approx(float(single), abs=1e-5)


def test_an_adapter_apart_scores_as_the_merged_model(root: Path, done: Any) -> None:
    apart = run(STAGE, _values(root, "apart", training_args__max_steps=12, training_args__eval_strategy="steps", training_args__eval_steps=12, merge=False))
    assert (apart.path / "adapter_config.json").is_file() and not (apart.path / "config.json").exists() and not (done.path / "adapter_config.json").exists()
    with pytest.raises(ConfigError, match="the adapter of a reward model"):
        load_for(merge.STAGE, None, settings(adapter=apart.path, output_dir=root / "out" / "lost"))
    assert load_judge(apart.path).score(_answers(GOOD, BAD)) == pytest.approx(load_judge(done.path).score(_answers(GOOD, BAD)), abs=1e-4)


def test_every_weight_and_new_rows(root: Path, tmp_path: Path) -> None:
    full = run(STAGE, _values(root, "full", peft__enabled=False, training_args__learning_rate=1e-3, training_args__max_steps=8))
    assert full.stats["trainable"]["trainable"] == full.stats["trainable"]["total"] and full.stats["eval_accuracy_after"] >= 0.9
    expanded(tiny_qwen(tmp_path / "model"))
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_bytes((root / f"{name}.jsonl").read_bytes())
    new = run(STAGE, pair_settings(tmp_path, tmp_path / "out", algorithm="reward", training_args__max_steps=2))
    assert new.stats["trainable"]["new_rows"] == 40 and (new.path / "expansion.json").is_file()


def test_in_half_precision_too_it_is_merged_as_it_scores(root: Path) -> None:
    """The trainer computes under autocast, which must not colour the comparison of model and merged model."""
    done = run(STAGE, _values(root, "half", precision="bf16", training_args__max_steps=8))
    assert done.stats["precision"] == "bf16" and (done.path / "config.json").is_file() and done.stats["eval_accuracy_after"] >= 0.9


def test_what_is_no_reward_model_is_refused(root: Path) -> None:
    with pytest.raises(SopError, match="this is no reward model"):
        load_judge(root / "model")


def test_long_answers_are_never_cut(root: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "long.jsonl", [*read(root / "train.jsonl")[:4], {"prompt": "问", "chosen": "甲" * 300, "rejected": "乙"}])
    counts = run(STAGE, _values(root, "long", data__train_file=path, training_args__max_steps=1)).stats["rows"]
    assert counts["dropped"] == {"too_long": 1} and counts["truncated"] == 0 and counts["kept"] == 4


def test_the_command_must_fit_the_algorithm(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"algorithm: dpo, but this is sop train reward; run `sop train dpo`, or set algorithm: reward"):
        load_for(STAGE, None, settings(**{**_values(root, "refused"), "algorithm": "dpo"}))


def test_nothing_to_learn(root: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "same.jsonl", [{"prompt": "问", "chosen": "答", "rejected": "答"}] * 3)
    with pytest.raises(SopError, match="no pair is left to learn from: identical_answers 3") as error:
        run(STAGE, _values(root, "nothing", data__train_file=path))
    assert error.value.code == DATA


def test_a_killed_training_ends_as_an_uninterrupted_one(root: Path, tmp_path: Path) -> None:
    def values(name: str) -> dict[str, Any]:
        return pair_settings(root, tmp_path / name, algorithm="reward", training_args__max_steps=12, training_args__save_steps=3, training_args__learning_rate=1e-3)

    whole, out, log = run(STAGE, values("whole")), tmp_path / "killed", tmp_path / "killed.log"
    assert Process("train reward", values("killed"), log).signal_when(lambda: steps_logged(out) >= 5) == -signal.SIGKILL
    assert Process("train reward", values("killed"), log).wait() == 0, log.read_text()[-2000:]
    assert "resuming from checkpoint-" in log.read_text(encoding="utf-8")
    assert sha256_file(out / "model.safetensors") == sha256_file(whole.path / "model.safetensors") and losses(out) == losses(whole.path)
