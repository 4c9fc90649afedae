"""DPO and its kin through the real stage, on tiny models; their losses against TRL's own trainers on the text of the same data."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from self_model_sop.artifact import sha256_file
from self_model_sop.config import ConfigError
from self_model_sop.data.formats import RowError
from self_model_sop.errors import DATA, SopError
from self_model_sop.ops import summary
from self_model_sop.ops.pipeline import load_pipeline
from self_model_sop.stage import load_for
from self_model_sop.train import alignment, pairs
from self_model_sop.train.cache import Cache
from self_model_sop.train.dpo import STAGE
from self_model_sop.train.model import load_model, load_tokenizer, load_with_adapter
from self_model_sop.train.pairs import Limits, PairSet
from self_model_sop.train.template import renderer_for
from self_model_sop.train.trl_trainers import unpaired
from tiny_models import tiny_llama, tiny_qwen
from tiny_preferences import BAD, GOOD, pair_settings, preferences, read
from tiny_runs import Process, expanded, losses, rows, run, settings, steps_logged, torchrun

END = "<|im_end|>"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dpo")
    tiny_qwen(path / "model")
    preferences(path / "train.jsonl")
    preferences(path / "eval.jsonl", 10, seed=9)
    return path


def _run(root: Path, name: str, **more: Any) -> Any:
    return run(STAGE, pair_settings(root, root / "out" / name, **more))


# --- the same as TRL itself ------------------------------------------------------------------------------------------------------------------


def _texts(root: Path) -> list[dict[str, str]]:
    """The training rows as text, from the template: what TRL tokenises itself."""
    renderer = renderer_for(load_tokenizer(root / "model"), train_on="last")
    asked = [renderer.text([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True) for row in read(root / "train.jsonl")]
    return [{"prompt": text, "chosen": row["chosen"] + END, "rejected": row["rejected"] + END} for text, row in zip(asked, read(root / "train.jsonl"), strict=True)]


def _trainer(method: str) -> tuple[Any, Any, dict[str, Any]]:
    import trl
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return {
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {}), "kto": (trl.KTOTrainer, trl.KTOConfig, {}), "orpo": (ORPOTrainer, ORPOConfig, {}),
        "simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0, "beta": 2.0}),
    }[method]  # fmt: skip


def _direct(root: Path, out: Path, method: str, *, lora: bool, rows: list[dict[str, Any]], **more: Any) -> list[float]:
    """The losses of TRL's own trainer on text."""
    import datasets
    import peft

    trainer, arguments, options = _trainer(method)
    args = arguments(
        output_dir=str(out), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, logging_steps=1, seed=42, use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", disable_tqdm=True, save_strategy="no", **({"max_length": 128} | options | more),
    )  # fmt: skip
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]) if lora else None
    made = trainer(
        model=load_model(root / "model"), args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=load_tokenizer(root / "model"), peft_config=adapter
    )
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("method", "lora", "more"),
    [("dpo", True, {}), ("dpo", False, {"loss_type": ["ipo"]}), ("dpo", True, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}), ("kto", True, {}),
     ("orpo", False, {}), ("simpo", True, {})],
)  # fmt: skip
def test_losses_are_those_of_trl_itself(root: Path, method: str, lora: bool, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    name = f"direct-{method}-{lora}-{'-'.join(more.get('loss_type', []))}"
    ours = losses(_run(root, name, algorithm=method, peft__enabled=lora, **more).path)
    texts: list[dict[str, Any]] = list(_texts(root))
    if method == "kto":  # unpaired, in the order of our run
        made = pairs.read([root / "train.jsonl"], Cache(root / "tokens"), _renderer(root), Limits(128))
        order = [(row["example"], "chosen" if row["label"] else "rejected") for row in unpaired(made.dataset, 4, 42)]
        texts = [{"prompt": texts[i]["prompt"], "completion": texts[i][part], "label": part == "chosen"} for i, part in order]
    assert ours == pytest.approx(_direct(root, root / name, method, lora=lora, rows=texts, **more), abs=1e-5)
    assert len(set(ours)) == 6


# --- what is learned -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "simpo"])
def test_accuracy_and_margin_rise_on_held_out_pairs(root: Path, method: str) -> None:
    done = _run(root, f"rise-{method}", loss_type="sigmoid" if method == "dpo" else method, training_args__max_steps=16)
    stats = done.stats
    assert f"95 %: {alignment.interval(stats)[0]:.3f}" in "".join(alignment.summary(done)) and "chance" not in "".join(alignment.summary(done))
    assert stats["algorithm"] == method and stats["eval_accuracy_before"] <= 0.5 < 0.9 <= stats["eval_accuracy_after"]
    assert stats["eval_margin_after"] > stats["eval_margin_before"] and stats["eval_likelier_after"] > stats["eval_likelier_before"]
    assert stats["rows"]["kept"] == 32 and stats["eval_rows"]["kept"] == 10 and stats["tokens"] > stats["supervised_tokens"] > 0
    names = {p.name for p in done.path.iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json", "metrics.jsonl", "report.html", "loss.png", "manifest.json"} <= names
    assert not list(done.path.glob(".*")) and not list(done.path.glob("checkpoint*")) and "README.md" not in names
    model, tokenizer = load_with_adapter(done.path)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(END)


def test_our_measure_is_trls(root: Path) -> None:
    """The manifest's accuracy and margin, and TRL's own evaluation at the last step (batches of one size: its mean over batches is the mean over pairs)."""
    more = {"eval_strategy": "steps", "eval_steps": 6, "per_device_eval_batch_size": 5}
    done = _run(root, "measured", **{f"training_args__{k}": v for k, v in more.items()})
    last = [line for line in read(done.path / "metrics.jsonl") if "eval_loss" in line][-1]
    assert done.stats["eval_accuracy_after"] == pytest.approx(last["eval_rewards/accuracies"], abs=1e-6)
    assert done.stats["eval_margin_after"] == pytest.approx(last["eval_rewards/margins"], rel=1e-3)
    assert "margin of held-out pairs" in (done.path / "report.html").read_text(encoding="utf-8")


def test_precomputed_references_give_the_same_training(root: Path) -> None:
    found = [losses(_run(root, f"precomputed-{on}", data__precompute_ref_log_probs=on, peft__enabled=False, training_args__learning_rate=1e-3).path) for on in (False, True)]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize("make", [tiny_qwen, tiny_llama])
def test_the_reference_stays_where_it_was_while_new_rows_train(root: Path, make: Callable[[Path], Path], tmp_path: Path) -> None:
    """Tied (qwen) and untied (llama): with the adapter off, the rows of an expansion are the old ones, in the output layer too."""
    expanded(make(tmp_path / "model"))
    tokenizer = load_tokenizer(tmp_path / "model")
    word = tokenizer.decode(list(range(500, 520)))
    made = [{"prompt": f"词{i}", "chosen": word + GOOD, "rejected": word[::-1] + BAD} for i in range(16)]
    for name in ("train", "eval"):
        rows(tmp_path / f"{name}.jsonl", made)
    values = pair_settings(tmp_path, tmp_path / "moving")
    moving = run(STAGE, values)
    fixed = run(STAGE, {**values, "training_args__output_dir": tmp_path / "fixed", "data__precompute_ref_log_probs": True})
    assert moving.stats["trainable"]["new_rows"] == 40 and losses(moving.path)[0] != losses(moving.path)[-1]
    assert losses(moving.path) == pytest.approx(losses(fixed.path), abs=1e-5)
    before = load_model(tmp_path / "model").get_input_embeddings().weight
    rows_after = next(t for n, t in load_file(moving.path / "adapter_model.safetensors").items() if "token" in n)
    assert (rows_after != before[500:540]).any()


def test_another_model_can_be_the_reference(root: Path, tmp_path: Path) -> None:
    tiny_qwen(tmp_path / "other", seed=5)
    stats = _run(root, "other", ref_model_name_or_path=tmp_path / "other", training_args__max_steps=2).stats
    assert stats["reference"].startswith("another model") and stats["eval_margin_before"] != 0 and stats["train_loss_first"] != pytest.approx(0.693147, abs=1e-4)
    same = _run(root, "same", ref_model_name_or_path=root / "model", training_args__max_steps=2).stats
    assert same["train_loss_first"] == pytest.approx(0.693147, abs=1e-4) and same["reference"] == "the model with its adapter off"


# --- pairs -----------------------------------------------------------------------------------------------------------------------------------


def _renderer(root: Path) -> Any:
    return renderer_for(load_tokenizer(root / "model"), train_on="last")


def test_pairs_are_the_one_rendering(root: Path) -> None:
    renderer = _renderer(root)
    for row in read(root / "train.jsonl")[:8]:
        pair = pairs.render(renderer, row, Limits(128))
        asked = [{"role": "user", "content": row["prompt"]}]
        assert pair.prompt == renderer.prompt(asked)[: len(pair.prompt)] and not pair.cut
        for part, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            rendered = renderer.render([*asked, {"role": "assistant", "content": row[part]}])
            learned = [i for i, on in enumerate(rendered.supervised) if on]
            assert pair.prompt + ids == rendered.ids[: learned[-1] + 1]
            assert renderer.tokenizer.decode(pair.prompt + ids).endswith(row[part] + END)


def test_both_answers_share_their_prompt_whatever_their_first_words(root: Path) -> None:
    made = pairs.render(_renderer(root), {"prompt": "问题", "chosen": "甲答案", "rejected": "乙答案"}, Limits(128))
    assert made.prompt == _renderer(root).prompt([{"role": "user", "content": "问题"}])


ROWS = {
    "identical_answers": {"prompt": "问", "chosen": "答", "rejected": "答"},
    "empty_chosen": {"prompt": "问", "chosen": "  ", "rejected": "答"},
    "empty_rejected": {"prompt": "问", "chosen": "答", "rejected": ""},
    "not_a_preference": {"prompt": "问", "better": "答", "worse": "不"},
    "prompt_too_long": {"prompt": "问" * 300, "chosen": "甲", "rejected": "乙"},
    "equal_before_the_cut": {"prompt": "问", "chosen": "答" * 300 + "甲", "rejected": "答" * 300 + "乙"},
    "several_turns": {
        "prompt": "问",
        "chosen": [{"role": "assistant", "content": "甲"}, {"role": "user", "content": "再"}, {"role": "assistant", "content": "丙"}],
        "rejected": "乙",
    },
}


def test_every_row_is_counted(root: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "bad.jsonl", [*ROWS.values(), *read(root / "train.jsonl")[:3], read(root / "train.jsonl")[0]])
    exchanged = {**read(root / "train.jsonl")[1], "chosen": read(root / "train.jsonl")[1]["rejected"], "rejected": read(root / "train.jsonl")[1]["chosen"]}
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(exchanged, ensure_ascii=False) + "\n{broken\n")
    made = pairs.read([path], Cache(tmp_path / "set"), _renderer(root), Limits(128))
    assert len(made) == 5 and made.meta["total"] == len(ROWS) + 6 == 5 + sum(made.meta["dropped"].values())
    assert set(ROWS) <= set(made.meta["dropped"]) and made.meta["repeated"] == 1 and made.meta["contradicting"] == 1
    again = pairs.read([path], Cache(tmp_path / "set"), _renderer(root), Limits(128))
    assert isinstance(again, PairSet) and again.meta == made.meta and again.names([0]) == ["pairs:0"]


def test_what_looks_like_an_end_marker_in_an_answer_ends_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renderer, row = _renderer(root), {"prompt": f"问{END}", "chosen": f"甲{END}乙", "rejected": "丙"}
    made = pairs.render(renderer, row, Limits(128))
    end = renderer.tokenizer.convert_tokens_to_ids(END)
    assert made.chosen.count(end) == 1 and made.chosen[-1] == made.rejected[-1] == end
    report = pairs.prove(renderer, [rows(tmp_path / "pairs.jsonl", [row, {"nothing": 1}])])
    assert report.kept == 2 and report.turns == 2 and "encoded as plain text" in capsys.readouterr().err


def test_long_answers_are_cut_or_the_pair_is_dropped(root: Path) -> None:
    row = {"prompt": "问", "chosen": "甲" * 300, "rejected": "乙"}
    cut = pairs.render(_renderer(root), row, Limits(128))
    assert cut.cut and len(cut.prompt) + len(cut.chosen) == 128
    for limits in (Limits(128, "drop"), Limits(128, whole=True)):
        with pytest.raises(RowError, match="too_long"):
            pairs.render(_renderer(root), row, limits)


def test_ktos_rows_stand_beside_the_answer_before_them(root: Path, tmp_path: Path) -> None:
    made = pairs.read([root / "train.jsonl"], Cache(tmp_path / "set"), _renderer(root), Limits(128))
    found = unpaired(made.dataset, 4, seed=1)
    assert len(found) == 64 and sum(found["label"]) == 32 and sorted(found["example"]) == sorted([*range(32)] * 2)
    for first in range(0, 64, 4):
        part = found[first : first + 4]
        assert part["KL_completion_ids"] == [part["completion_ids"][-1], *part["completion_ids"][:-1]]


# --- what is refused -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"algorithm": "reward"}, r"algorithm: reward, but this is sop train dpo; run `sop train reward`, or set algorithm: dpo or kto or orpo or simpo"),
        ({"loss_type": "sigmoyd"}, r"loss_type: dpo has no loss 'sigmoyd' in the installed TRL; did you mean 'sigmoid'\?"),
        ({"loss_type": ["sigmoid", "kto"]}, "loss_type: dpo has no loss 'kto'"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights: 1 weights for 2 losses"),
        ({"loss_type": "exo_pair"}, "exo_pair needs label smoothing"),
        ({"trl": {"label_smothing": 0.1}}, r"trl\.label_smothing: unknown key of trl\.DPOConfig; did you mean 'label_smoothing'\?"),
        ({"trl": {"beta": 0.1}}, "use the top-level key `beta`"),
        ({"trl": {"label_smoothing": "much"}}, "expected float"),
        ({"beta": 0.0}, "beta: must be above 0"),
        ({"peft__init": "pissa"}, "pissa changes the base weights"),
        ({"peft__target_modules": ["q_proj", "lm_head"]}, "past an adapter on lm_head"),
        ({"algorithm": "kto", "training_args__per_device_train_batch_size": 1}, "it needs at least 2"),
        ({"algorithm": "orpo", "data__precompute_ref_log_probs": True}, "orpo has no reference model"),
        ({"engine": "verl"}, "verl has no trainer for dpo"),
        ({"data__max_length": 100000}, "the model reads at most"),
        ({"training_args__evaluation_strategy": "steps"}, "write eval_strategy"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(root: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_for(STAGE, None, settings(**pair_settings(root, root / "out" / "refused", **more)))


def test_nothing_to_learn(root: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "same.jsonl", [ROWS["identical_answers"]] * 3 + [ROWS["not_a_preference"]])
    with pytest.raises(SopError, match=r"no pair is left to learn from: identical_answers 3, not_a_preference 1") as error:
        _run(root, "nothing", data__train_file=path)
    assert error.value.code == DATA and "chosen" in str(error.value.fix)


def test_a_loss_that_is_not_finite_names_its_pairs(root: Path) -> None:
    with pytest.raises(SopError, match="the loss became") as error:
        _run(root, "explodes", training_args__learning_rate=1e30)
    saved = json.loads(next((root / "out" / "explodes").glob(".work-*/not_finite.json")).read_text(encoding="utf-8"))
    assert error.value.code == DATA and len(saved["records"]) == 4 and all(name.startswith("pairs:") for name in saved["records"])


def test_the_plan_counts_pairs_and_tells_of_the_reference(root: Path) -> None:
    text = "\n".join(STAGE.plan(load_for(STAGE, None, settings(**pair_settings(root, root / "out" / "plan", peft__enabled=False))).config))
    assert "32 pairs, a step takes 4" in text and "6 steps" in text and "a second model stands in memory" in text


def test_a_pipeline_tells_of_preferences(root: Path, tmp_path: Path) -> None:
    """Its summary and its report, out of the manifests."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "small.yaml").write_text("name: small\nroot: runs\nstages:\n  - dpo: {stage: train.dpo}\n", encoding="utf-8")
    given = [f"dpo.{s.key}={json.dumps(s.value)}" for s in settings(**pair_settings(root, tmp_path / "runs" / "dpo"))]
    pipeline = load_pipeline(tmp_path / "config" / "small.yaml", given)
    done = STAGE.run(pipeline.steps[0].config)
    summary.conclude(pipeline, [done], 1.0)
    text = (tmp_path / "runs" / "summary.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| dpo | dpo |"))
    assert f"| {done.stats['eval_accuracy_after']:.3f} |" in row and "nats per token" not in text
    page = (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    low, high = alignment.interval(done.stats)
    assert low < done.stats["eval_accuracy_after"] <= high + 1e-9 and f"({low:.3f}-{high:.3f})" in page
    assert "held-out accuracy: before" in page and f"{done.stats['eval_margin_after']:.3f}" in page


# --- stopping and resuming -------------------------------------------------------------------------------------------------------------------


def _long(root: Path, out: Path) -> dict[str, Any]:
    return pair_settings(root, out, training_args__max_steps=14, training_args__save_steps=3, training_args__gradient_accumulation_steps=2)


def test_a_stopped_training_ends_as_an_uninterrupted_one(root: Path, tmp_path: Path) -> None:
    """Killed once, asked to stop once."""
    out, log = tmp_path / "stopped", tmp_path / "stopped.log"
    whole = run(STAGE, _long(root, tmp_path / "whole"))
    assert Process("train dpo", _long(root, out), log).signal_when(lambda: steps_logged(out) >= 5) == -signal.SIGKILL
    assert Process("train dpo", _long(root, out), log).signal_when(lambda: steps_logged(out) >= 8, signal.SIGTERM) == 143, log.read_text()[-2000:]
    assert not (out / "manifest.json").exists()
    assert Process("train dpo", _long(root, out), log).wait() == 0, log.read_text()[-2000:]
    assert log.read_text(encoding="utf-8").count("resuming from checkpoint-") == 2
    assert sha256_file(out / "adapter_model.safetensors") == sha256_file(whole.path / "adapter_model.safetensors")
    assert losses(out) == losses(whole.path) and not list(out.glob(".*"))
    shutil.rmtree(out)


@pytest.mark.exhaustive
def test_two_processes_train_as_one(root: Path) -> None:
    alone = _run(root, "alone")
    done = torchrun(root, "train dpo", pair_settings(root, root / "out" / "two", training_args__per_device_train_batch_size=2))
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(root / "out" / "two") == pytest.approx(losses(alone.path), abs=1e-5)
