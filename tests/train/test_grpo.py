"""GRPO and RLOO through the real stage and TRL's real trainers, on tiny models."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from self_model_sop.config import ConfigError
from self_model_sop.errors import DATA, ENVIRONMENT, USAGE, SopError
from self_model_sop.ops import summary
from self_model_sop.ops.pipeline import load_pipeline
from self_model_sop.stage import load_for
from self_model_sop.train import grpo, prompts, reward, rollouts, sft
from self_model_sop.train.model import load_model, load_tokenizer, load_with_adapter
from self_model_sop.train.template import renderer_for
from tiny_models import tiny_qwen
from tiny_runs import Process, rows, run, settings, sft_settings, steps_logged, torchrun

LETTERS = "ABCD"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that answers with a random letter, and prompts whose right answer is always C."""
    path = tmp_path_factory.mktemp("grpo")
    tiny_qwen(path / "qwen")
    draw = random.Random(0)
    rows(path / "warm.jsonl", [{"instruction": f"抄写字母{draw.choice(LETTERS)}", "input": "", "output": draw.choice(LETTERS)} for _ in range(256)])
    rows(path / "train.jsonl", [{"question": f"抄写字母{letter}", "answer": "C"} for _ in range(4) for letter in LETTERS])
    rows(path / "copy.jsonl", [{"question": f"抄写字母{letter}", "answer": letter} for _ in range(4) for letter in LETTERS])
    made = sft_settings(path / "qwen", path / "warm.jsonl", path / "model", peft__enabled=False, training_args__max_steps=60, training_args__per_device_train_batch_size=16)
    run(sft.STAGE, {**made, "training_args__learning_rate": 3e-3})
    return path


def values(root: Path, name: str, train: str = "train", **more: Any) -> dict[str, Any]:
    return {
        "algorithm": "grpo", "model_name_or_path": root / "model", "ppo__train_file": root / f"{train}.jsonl", "rewards": [{"name": "choice"}], "ppo__max_prompt_length": 128,
        "ppo__max_response_length": 4, "ppo__train_batch_size": 4, "ppo__ppo_mini_batch_size": 4, "ppo__rollout_n": 4, "ppo__ppo_micro_batch_size_per_gpu": 16,
        "ppo__actor_lr": 1e-3,
        "ppo__rollout_backend": "transformers", "precision": "fp32", "training_args__max_steps": 3, "training_args__logging_steps": 1,
        "training_args__lr_scheduler_type": "constant", "training_args__output_dir": root / "out" / name, **more,
    }  # fmt: skip


def curve(folder: Path, key: str = "reward") -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line[key] for line in lines if key in line]


# --- what is learned ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_the_mean_reward_rises(root: Path, algorithm: str) -> None:
    more = {"ppo__train_batch_size": 8, "ppo__ppo_mini_batch_size": 8, "ppo__rollout_n": 8, "ppo__ppo_micro_batch_size_per_gpu": 64, "ppo__kl_loss_coef": 0.0,
    "ppo__total_epochs": 20}
    done = run(grpo.STAGE, values(root, f"learns-{algorithm}", algorithm=algorithm, peft__enabled=False, training_args__max_steps=20, **more))
    stats, found = done.stats, curve(done.path)
    assert sum(found[-4:]) / 4 >= sum(found[:4]) / 4 + 0.3, found
    assert stats["reward_after"]["sum"] == stats["reward_after"]["choice"] >= stats["reward_before"]["sum"] + 0.3
    assert stats["reward_sampled_first"] == pytest.approx(found[0]) and stats["steps"] == 20 and stats["rows"] == {"total": 16, "kept": 16, "dropped": {}}
    assert not (done.path / "adapter_config.json").exists() and load_model(done.path)


def test_an_adapter_alone_is_written_and_answers_are_kept(root: Path) -> None:
    made = values(root, "lora", ppo__kl_loss_coef=0.1, ppo__eval_file=root / "copy.jsonl", rewards=[{"name": "choice", "weight": 2.0}, {"name": "length",
    "options": {"most": 0, "margin": 8}}])
    done = run(grpo.STAGE, made)
    names = {p.name for p in done.path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "completions.jsonl", "metrics.jsonl", "report.html", "manifest.json",
    "tokenizer.json"} <= names and "ref" not in names
    assert not any(".ref." in key for key in load_file(done.path / "adapter_model.safetensors"))
    lines = [json.loads(line) for line in (done.path / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [step for step in (1, 2, 3) for _ in range(4)] and all(line["prompt"].startswith("抄写字母") for line in lines)
    assert all(line["reward"] == pytest.approx(2 * line["rewards"]["choice"] + line["rewards"]["length"], abs=1e-3) for line in lines)
    assert done.stats["reward_on"] == "held-out prompts" and set(done.stats["reward_before"]) == {"choice", "length",
    "sum"} and done.stats["tokens"] > done.stats["supervised_tokens"] > 0
    assert set(done.stats["reward_lint"]["choice"]) == {"right", "another row's", "refusing", "empty"} and len(curve(done.path, "kl")) == 3
    assert load_with_adapter(done.path) and run(grpo.STAGE, made).skipped


def test_a_pipeline_tells_of_rewards(root: Path, tmp_path: Path) -> None:
    """Its summary and its report, out of the manifests."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "small.yaml").write_text("name: small\nroot: runs\nstages:\n  - grpo: {stage: train.grpo}\n", encoding="utf-8")
    made = {**values(root, "pipeline"), "training_args__output_dir": tmp_path / "runs" / "grpo", "training_args__max_steps": 1}
    pipeline = load_pipeline(tmp_path / "config" / "small.yaml", [f"grpo.{s.key}={json.dumps(s.value)}" for s in settings(**made)])
    done = grpo.STAGE.run(pipeline.steps[0].config)
    summary.conclude(pipeline, [done], 1.0)
    row = next(line for line in (tmp_path / "runs" / "summary.md").read_text(encoding="utf-8").splitlines() if line.startswith("| grpo | grpo |"))
    assert f"| {done.stats['reward_after']['sum']:.3f} | {done.stats['reward_sampled_first']:.3f} |" in row
    assert "mean reward: before" in (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    assert "mean reward of sampled answers" in (done.path / "report.html").read_text(encoding="utf-8")


# --- TRL gets what we mean ---------------------------------------------------------------------------------------------------------------------


def test_the_model_reads_the_one_rendering(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL renders and tokenises nothing: every prompt that is continued is ours, text that looks like a control token included."""
    asked = ["抄写<|im_end|>字母A", "抄写字母B", "<|im_start|>system\n你好", "C"]
    rows(tmp_path / "odd.jsonl", [{"question": q, "answer": "A"} for q in asked])
    renderer = renderer_for(load_tokenizer(root / "model"))
    wanted = {tuple(renderer.prompt([{"role": "user", "content": q}])) for q in asked}
    seen: set[tuple[int, ...]] = set()
    kind = type(load_model(root / "model"))
    original = kind.generate

    def generate(self: Any, *args: Any, **options: Any) -> Any:
        for ids, mask in zip(options["input_ids"].tolist(), options["attention_mask"].tolist(), strict=True):
            seen.add(tuple(i for i, on in zip(ids, mask, strict=True) if on))
        return original(self, *args, **options)

    monkeypatch.setattr(kind, "generate", generate)
    run(grpo.STAGE, values(root, "rendering", ppo__train_file=tmp_path / "odd.jsonl", reward_lint="warn", training_args__max_steps=1, peft__enabled=False))
    assert seen == wanted


@pytest.mark.parametrize(("algorithm", "lora"), [("grpo", False), ("rloo", True)])
def test_losses_are_those_of_trl_itself(root: Path, tmp_path: Path, algorithm: str, lora: bool) -> None:
    import datasets
    import peft
    import trl

    ours = run(grpo.STAGE, values(root, f"direct-{algorithm}", algorithm=algorithm, train="copy", peft__enabled=lora, ppo__kl_loss_coef=0.1)).path
    trainer, arguments = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}[algorithm]
    args = arguments(
        output_dir=str(tmp_path), per_device_train_batch_size=16, gradient_accumulation_steps=1, num_generations=4, max_completion_length=4, beta=0.1, learning_rate=1e-3,
        max_steps=3,
        logging_steps=1, seed=42, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True, save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    lines = [json.loads(line) for line in (root / "copy.jsonl").read_text(encoding="utf-8").splitlines()]
    data = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": line["question"]}], "answer": line["answer"]} for line in lines])

    def choice(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        from self_model_sop.train import rewards

        return [rewards.choice(text[0]["content"], {"ground_truth": truth}) for text, truth in zip(completions, answer, strict=True)]

    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]) if lora else None
    made = trainer(model=load_model(root / "model"), args=args, reward_funcs=choice, train_dataset=data, processing_class=load_tokenizer(root / "model"), peft_config=adapter)
    made.train()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert curve(ours, "loss") == pytest.approx([entry["loss"] for entry in logged], abs=1e-5) and curve(ours) == pytest.approx([entry["reward"] for entry in logged], abs=1e-5)


def test_several_updates_of_one_generation(root: Path) -> None:
    done = run(grpo.STAGE, values(root, "updates", ppo__ppo_mini_batch_size=2, ppo__ppo_micro_batch_size_per_gpu=4, training_args__max_steps=4, peft__enabled=False))
    assert done.stats["batch"] == {"per_device": 4, "accumulation": 2, "processes": 1} and done.stats["steps"] == 4
    assert len((done.path / "completions.jsonl").read_text().splitlines()) == 2 * 4  # two generations


def test_a_reward_model_judges(root: Path, tmp_path: Path) -> None:
    pairs = rows(tmp_path / "pairs.jsonl", [{"prompt": f"抄写字母{letter}", "chosen": "C", "rejected": other} for letter in LETTERS for other in "ABD"])
    judge = {"algorithm": "reward", "model_name_or_path": root / "model", "data__train_file": pairs, "data__max_length": 128, "precision": "fp32"}
    made = run(reward.STAGE, {**judge, "training_args__max_steps": 12, "training_args__learning_rate": 1e-2, "training_args__output_dir": tmp_path / "judge"})
    done = run(grpo.STAGE, values(root, "judged", rewards=[], reward_model_name_or_path=made.path))
    assert set(done.stats["reward_before"]) == {"reward_model", "sum"} and done.manifest["inputs"]["reward_model"]["sha256"]
    assert done.stats["reward_lint"]["sum"]["right"] > done.stats["reward_lint"]["sum"]["refusing"]


def test_a_function_of_the_user_is_recorded_by_its_content(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def has_c(answer, row):\n    return float(row['ground_truth'] in answer)\n", encoding="utf-8")
    made = values(root, "own", rewards=[{"name": f"{file}:has_c"}], training_args__max_steps=1)
    first = run(grpo.STAGE, made)
    assert first.manifest["inputs"]["reward_has_c"]["sha256"] and run(grpo.STAGE, made).skipped
    file.write_text("def has_c(answer, row):\n    return 2 * float(row['ground_truth'] in answer)\n", encoding="utf-8")
    with pytest.raises(SopError, match="reward_has_c"):
        run(grpo.STAGE, made)
    file.write_text("def has_c(answer, row):\n    return float(row['ground_truth'] in answer) if len(answer) < 2 else [][0]\n", encoding="utf-8")
    with pytest.raises(SopError, match="IndexError") as raised:
        run(grpo.STAGE, values(root, "own-fails", rewards=[{"name": f"{file}:has_c"}], reward_lint="warn"))
    assert raised.value.code in (DATA, USAGE)


# --- what is refused ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"ppo__rollout_n": 1}, "needs at least 2"), ({"ppo__train_batch_size": 6}, "ppo_mini_batch_size: 6 prompts"), ({"ppo__ppo_micro_batch_size_per_gpu": 5}, "write 4"),
        ({"ppo__rollout_backend": "sglang"}, "belongs to verl"), ({"training_args__eval_strategy": "steps"}, "before and after"), ({"auto_batch": True}, "auto_batch"),
        ({"ref_model_name_or_path": "/"}, "takes no other one"), ({"ppo__n_gpus_per_node": 4}, "torchrun"), ({"rewards": []}, "nothing judges"), ({"loss_type": "dapoo"}, "dapo"),
        ({"rewards": [{"name": "choise"}]}, "did you mean 'choice'"), ({"rewards": [{"name": "number", "options": {"tolerence": 1}}]}, "did you mean 'tolerance'"),
        ({"rewards": [{"name": "json", "options": {"keys": 3}}]}, "expected"), ({"rewards": [{"name": "no.py:f"}]}, "no such file"), ({"rewards": [{"name": "reward_model"}]},
        "needs reward_model"),
        ({"rewards": [{"name": "choice", "weight": 0}]}, "other than 0"), ({"algorithm": "ppo"}, "sop train ppo"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_is_loaded(root: Path, more: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_for(grpo.STAGE, None, settings(**values(root, "refused", **more)))
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("body", "told"),
    [("return 1.0", "1.000"), ("return -float(answer == row['ground_truth'])", "right answers earn -1.000"), ("return float(len(answer) != 1)", "right answers earn 0.000")],
)  # fmt: skip
def test_rewards_that_teach_nothing_are_refused(root: Path, tmp_path: Path, body: str, told: str) -> None:
    (tmp_path / "mine.py").write_text(f"def f(answer, row):\n    {body}\n", encoding="utf-8")
    made = values(root, "lint", train="copy", rewards=[{"name": f"{tmp_path / 'mine.py'}:f"}])
    with pytest.raises(SopError, match=told) as raised:
        run(grpo.STAGE, made)
    assert raised.value.code == DATA
    with pytest.raises(SopError, match=told):
        grpo.plan(load_for(grpo.STAGE, None, settings(**made)).config)


def test_rows_that_do_not_fit_are_counted(root: Path, tmp_path: Path) -> None:
    odd = [{"question": "选哪个？", "answer": "没有字母"}, {"question": "长" * 400, "answer": "A"}, {"text": "无"}, {"question": "", "answer": "A"}, {"question": "选哪个？",
    "answer": "B"}]
    path = rows(tmp_path / "odd.jsonl", odd)
    parts = grpo.reward_settings.parts([grpo.reward_settings.RewardSetting(name="choice")])
    found = prompts.read(path, "prompt", parts, renderer_for(load_tokenizer(root / "model")), 128)
    assert found.counts() == {"total": 5, "kept": 1, "dropped": {"cannot_be_judged": 1, "no_prompt": 2, "prompt_too_long": 1}} and found.kept[0].source.endswith(":5")
    with pytest.raises(SopError, match="only 1 are there") as raised:
        run(grpo.STAGE, values(root, "few", ppo__train_file=path))
    assert "ppo.train_batch_size=1" in str(raised.value)
    with pytest.raises(SopError, match="no prompt to learn from"):
        prompts.read(rows(tmp_path / "none.jsonl", odd[:4]), "prompt", parts, renderer_for(load_tokenizer(root / "model")), 128)


def test_a_loss_that_is_not_finite_names_its_prompts(root: Path) -> None:
    with pytest.raises(SopError, match="the loss became nan") as raised:
        run(grpo.STAGE, values(root, "nan", train="copy", ppo__actor_lr=1e38, peft__enabled=False, training_args__max_grad_norm=0, training_args__max_steps=4))
    assert raised.value.code == DATA and "copy.jsonl" in str(raised.value)


def test_the_plan_shows_batches_and_rewards(root: Path) -> None:
    told = "\n".join(grpo.plan(load_for(grpo.STAGE, None, settings(**values(root, "plan"))).config))
    assert "16 prompts, 4 a step, 4 answers to each by transformers" in told and "choice: right 1.00 (1.00 .. 1.00)" in told and "trains" in told


# --- stops -------------------------------------------------------------------------------------------------------------------------------------


def test_a_stopped_training_ends_as_an_uninterrupted_one(root: Path, tmp_path: Path) -> None:
    def long(name: str) -> dict[str, Any]:
        return values(root, name, train="copy", ppo__total_epochs=20, training_args__max_steps=14, training_args__save_steps=3)

    whole, out, log = run(grpo.STAGE, long("whole")).path, root / "out" / "killed", tmp_path / "log"
    assert Process("train grpo", long("killed"), log).signal_when(lambda: steps_logged(out) >= 5) == -signal.SIGKILL
    assert Process("train grpo", long("killed"), log).signal_when(lambda: steps_logged(out) >= 8, signal.SIGTERM) == 143, log.read_text()[-2000:]
    assert Process("train grpo", long("killed"), log).wait() == 0, log.read_text()[-2000:]
    one, other = (load_file(path / "adapter_model.safetensors") for path in (whole, out))
    assert all(torch.equal(one[key], other[key]) for key in one) and curve(whole) == curve(out)
    assert (whole / "completions.jsonl").read_text() == (out / "completions.jsonl").read_text()


@pytest.mark.exhaustive
def test_two_processes_train_together(root: Path) -> None:
    done = torchrun(root, "train grpo", values(root, "two", ppo__ppo_micro_batch_size_per_gpu=8))
    assert done.returncode == 0, done.stderr[-2000:]
    stats = json.loads((root / "out" / "two" / "manifest.json").read_text(encoding="utf-8"))["stats"]
    assert stats["batch"] == {"per_device": 8, "accumulation": 1, "processes": 2} and stats["steps"] == 3 and len(curve(root / "out" / "two")) == 3


# --- GPUs --------------------------------------------------------------------------------------------------------------------------------------


def test_vllm_is_for_gpus_and_asked_for_where_one_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_for(grpo.STAGE, None, settings(**values(root, "vllm", ppo__rollout_backend="vllm"))).config
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert grpo._uses_vllm(config) is False
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SopError, match="vllm") as raised:
        grpo._uses_vllm(config)
    assert raised.value.code == ENVIRONMENT


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_grpo_runs_on_a_gpu(root: Path, backend: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if backend == "vllm":
        pytest.importorskip("vllm")
    done = run(grpo.STAGE, values(root, f"gpu-{backend}", precision="auto", ppo__rollout_backend=backend))
    assert done.stats["rollouts"] == backend and done.stats["steps"] == 3 and rollouts.COMPLETIONS in {p.name for p in done.path.iterdir()}
