"""`engine: verl`: what the recipe becomes, composed by the real verl where it can be had, and what it runs on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from self_model_sop.config import ConfigError
from self_model_sop.errors import ENVIRONMENT, SopError
from self_model_sop.stage import Stage, load_for
from self_model_sop.train import grpo, ppo, reward_settings, verl
from self_model_sop.train.machine import Gpu
from self_model_sop.train.rlhf import RlhfConfig
from tiny_models import tiny_qwen
from tiny_runs import rows, settings

ROOT = Path(__file__).resolve().parents[2]
STAGES: dict[str, Stage[RlhfConfig]] = {"grpo": grpo.STAGE, "ppo": ppo.STAGE}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verl")
    tiny_qwen(path / "qwen")
    rows(path / "train.jsonl", [{"question": f"选哪个？第{i}题", "answer": "ABCD"[i % 4]} for i in range(32)])
    return path


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the real verl's files: the one of SOP_VERL_PYTHON, else one made of envs/verl-config.txt (30 MB at most, no torch)."""
    named = os.environ.get(verl.PYTHON)
    if named:
        return Path(named)
    folder = tmp_path_factory.mktemp("environment")
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, timeout=120)
        install = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", "-r", ROOT / "envs" / "verl-config.txt"]
        subprocess.run(install, check=True, capture_output=True, timeout=300)
    except (subprocess.SubprocessError, OSError) as error:
        told = getattr(error, "stderr", b"") or b""
        pytest.skip(f"verl's files cannot be installed here: {error}; {told.decode(errors='replace')[-300:]}")
    return folder / "bin" / "python"


def values(root: Path, algorithm: str, **more: Any) -> dict[str, Any]:
    return {
        "algorithm": algorithm, "engine": "verl", "model_name_or_path": root / "qwen", "ppo__train_file": root / "train.jsonl", "ppo__rollout_n": 4 if algorithm == "grpo" else 1,
        "ppo__train_batch_size": 32, "ppo__ppo_mini_batch_size": 16, "ppo__ppo_micro_batch_size_per_gpu": 1, "ppo__max_prompt_length": 128, "ppo__max_response_length": 64,
        "rewards": [{"name": "choice"}],
        "training_args__output_dir": root / "out", **more,
    }  # fmt: skip


def config_of(root: Path, command: str, **more: Any) -> RlhfConfig:
    return load_for(STAGES[command], None, settings(**{**values(root, command), **more})).config


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("gpus", [1, 16])
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_every_recipe_composes_with_the_real_verl(root: Path, interpreter: Path, tmp_path: Path, algorithm: str, gpus: int, lora: bool) -> None:
    config = config_of(root, algorithm, ppo__n_gpus_per_node=min(gpus, 8), ppo__nnodes=max(gpus // 8, 1), peft__enabled=lora)
    made = verl.compose(config, interpreter, tmp_path, validate=True)
    assert made.version == "0.9.1" and (made.validated.startswith(("yes", "not run: ModuleNotFoundError")))
    whole = yaml.safe_load(made.yaml)
    actor, model, rollout, critic = (*(whole["actor_rollout_ref"][k] for k in ("actor", "model", "rollout")), whole["critic"])
    assert whole["algorithm"]["adv_estimator"] == ("grpo" if algorithm == "grpo" else "gae") and whole["algorithm"]["use_kl_in_reward"] is False
    assert actor["use_kl_loss"] is True and actor["kl_loss_coef"] == 0.001 and actor["optim"]["lr"] == 1e-6 and rollout["n"] == (4 if algorithm == "grpo" else 1)
    assert critic["enable"] is (algorithm == "ppo") and (algorithm == "grpo" or (critic["model"]["path"] == str(root / "qwen") and critic["optim"]["lr"] == 1e-5))
    assert (model["lora_rank"], rollout["load_format"]) == ((8, "safetensors") if lora else (0, "dummy"))
    assert (whole["trainer"]["nnodes"], whole["trainer"]["n_gpus_per_node"]) == (max(gpus // 8, 1), min(gpus, 8))
    assert whole["reward"]["custom_reward_function"] == {"path": str(tmp_path / "reward" / "compute_score.py"), "name": "compute_score"}


@pytest.mark.slow
def test_the_composed_file_is_what_the_command_reads(root: Path, interpreter: Path, tmp_path: Path) -> None:
    """`--config-path FOLDER --config-name verl` gives verl's entry point the same configuration again."""
    made = verl.compose(config_of(root, "grpo"), interpreter, tmp_path, validate=False)
    (tmp_path / verl.CONFIG).write_text(made.yaml, encoding="utf-8")
    words = verl.command(interpreter, tmp_path)
    assert words[1:3] == ["-m", "verl.trainer.main_ppo"] and words[3:7] == ["--config-path", str(tmp_path), "--config-name", "verl"]
    main = "@hydra.main(config_path='nowhere', config_name='ppo_trainer', version_base=None)\ndef main(config): print(OmegaConf.to_yaml(config))\nmain()\n"
    main = f"import hydra\nfrom omegaconf import OmegaConf\n{main}"
    (tmp_path / "main.py").write_text(main, encoding="utf-8")
    done = subprocess.run([str(interpreter), str(tmp_path / "main.py"), *words[3:]], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert yaml.safe_load(done.stdout) == yaml.safe_load(made.yaml)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"actor_rollout_ref": {"actor": {"optim": {"lr": "abc"}}}}, "expected a number, got 'abc'"), ({"actor_rollout_ref": {"acter": {}}}, "did you mean 'actor'"),
        ({"trainer": {"nnodes": 1.5}}, "whole number"), ({"trainer": {"balance_batch": "yes"}}, "true or false"), ({"trainer": {"project_name": 3}}, "expected a text"),
    ],
)  # fmt: skip
def test_what_hydra_would_swallow_is_refused(root: Path, interpreter: Path, tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    with pytest.raises(SopError, match=told):
        verl.compose(config_of(root, "grpo", verl=keys), interpreter, tmp_path, validate=False)


@pytest.mark.slow
def test_a_dry_run_prints_the_command_and_the_whole_configuration(root: Path, interpreter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(verl.PYTHON, str(interpreter))
    words = [f"{k.replace('__', '.')}={json.dumps(v, default=str, ensure_ascii=False)}" for k, v in values(root, "ppo", ppo__eval_file=None, tokenizer_name_or_path=None).items()]
    assert ppo.main([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "-m verl.trainer.main_ppo --config-path" in told and "composed with the files of verl 0.9.1" in told and "adv_estimator: gae" in told and "choice: right 1.00" in told
    assert not (root / "out").exists()


def test_without_an_environment_a_dry_run_shows_the_recipe(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(verl.PYTHON, raising=False)
    told = "\n".join(grpo.plan(config_of(root, "grpo")))
    assert "not composed" in told and "adv_estimator: grpo" in told and f"${verl.PYTHON}" in told and "sop doctor --for verl" in told


def test_both_lists_of_packages_name_one_verl() -> None:
    lines = [line.split("==") for name in ("verl", "verl-config") for line in (ROOT / "envs" / f"{name}.txt").read_text().splitlines() if line.startswith("verl")]
    assert [name.partition("[")[0] for name, _ in lines] == ["verl", "verl"] and lines[0][1] == lines[1][1]


@pytest.mark.parametrize(
    ("command", "changed", "key", "fix"),
    [
        ("grpo", {"ppo__rollout_n": 1}, "ppo.rollout_n", "at least 2"), ("ppo", {"ppo__rollout_n": 4}, "ppo.rollout_n", "critic"),
        ("grpo", {"ppo__use_kl_loss": False}, "ppo.use_kl_loss", "true"), ("grpo", {"ppo__rollout_backend": "transformers"}, "ppo.rollout_backend", "no longer"),
        ("grpo", {"ppo__rollout_backend": "trtllm"}, "ppo.rollout_backend", "TensorRT"), ("grpo", {"ppo__n_gpus_per_node": 7}, "ppo.train_batch_size", "multiple of 7"),
        ("grpo", {"ppo__rollout_tp": 2}, "ppo.rollout_tp", "divisor"), ("grpo", {"ppo__actor_lr": 5.0}, "ppo.actor_lr", "learning rate"),
        ("grpo", {"peft__qlora": True}, "peft.qlora", "plain LoRA"), ("grpo", {"peft__lora_alpha": 1.5}, "peft.lora_alpha", "whole"),
        ("grpo", {"ppo__logger": "wandbb"}, "ppo.logger", "wandb"), ("grpo", {"reward_model_name_or_path": "."}, "rewards", "not by their sum"),
        ("grpo", {"algorithm": "rloo"}, "engine", "TRL"),
    ],
)  # fmt: skip
def test_rules_are_checked_before_anything_is_composed(root: Path, command: str, changed: dict[str, Any], key: str, fix: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config_of(root, command, **changed)
    assert any(key in str(p) and fix in str(p) for p in raised.value.problems), str(raised.value)


def test_hf_rollouts_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="rollout_backend"):
        config_of(root, "grpo", ppo__rollout_backend="hf")


def test_the_data_and_the_reward_function_run_in_any_python(root: Path, tmp_path: Path) -> None:
    """What verl is given judges as the other engine does, without this project on the path."""
    (tmp_path / "mine.py").write_text("def short(answer, row, *, most=5):\n    return float(len(answer) <= most)\n", encoding="utf-8")
    listed = [{"name": "choice", "weight": 2.0}, {"name": "length", "options": {"most": 4, "margin": 4}}, {"name": f"{tmp_path / 'mine.py'}:short", "weight": 0.5}]
    config = config_of(root, "grpo", rewards=listed)
    verl.write_reward(config, tmp_path / "reward")
    shutil.move(tmp_path / "mine.py", tmp_path / "gone.py")
    code = "import importlib.util, json, sys\nspec = importlib.util.spec_from_file_location('custom', sys.argv[1])\nmodule = importlib.util.module_from_spec(spec)\n"
    code += "spec.loader.exec_module(module)\nprint(json.dumps(module.compute_score('x', '答案是B呀呀', 'B', {'index': 1}, reward_router_address=None)))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(tmp_path / "reward" / "compute_score.py")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"score": 2.0 - 0.5 + 0.0, "choice": 1.0, "length": -0.5, "short": 0.0}


def test_rows_for_verl_keep_what_rewards_read(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from self_model_sop.train.prompts import read

    rows(tmp_path / "rl.jsonl", [{"prompt": [{"role": "user", "content": "问"}], "reward_model": {"ground_truth": "《刑法》第一条"},
    "extra_info": {"references": ["《刑法》第一条"]}}])
    parts = reward_settings.parts([reward_settings.RewardSetting(name="cite")])
    verl.write_rows(tmp_path / "data" / "train.parquet", [p.row for p in read(tmp_path / "rl.jsonl", "prompt", parts).kept], "train")
    (row,) = pq.read_table(tmp_path / "data" / "train.parquet").to_pylist()
    assert row["prompt"] == [{"role": "user", "content": "问"}] and row["reward_model"]["ground_truth"] == "《刑法》第一条" and row["data_source"] == "train"
    assert row["extra_info"] == {"references": ["《刑法》第一条"], "split": "train", "index": 0}


STAND_IN = """#!/bin/sh
case "$*" in
  *verl.trainer.main_ppo*) [ -n "$FAILS" ] && echo "CUDA said no" && exit 3; mkdir -p checkpoints/global_step_5/actor checkpoints/global_step_12/actor; echo "step 12"; exit 0;;
  *verl.model_merger*) for last; do :; done; mkdir -p "$last/lora_adapter"; echo '{}' > "$last/config.json"; echo '{}' > "$last/tokenizer.json"
    if [ -n "$LORA" ]; then echo '{"base_model_name_or_path": "x"}' > "$last/lora_adapter/adapter_config.json"; else rmdir "$last/lora_adapter"; fi; exit 0;;
  *) exec PYTHON "$@";;
esac
"""


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_leaves_all_that_verl_read_and_its_last_checkpoint(root: Path, interpreter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    """The way around verl, with the real files of its configuration; a script stands in for the training itself, which needs GPUs."""
    script = tmp_path / "python"
    script.write_text(STAND_IN.replace("PYTHON", str(interpreter)), encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv(verl.PYTHON, str(script))
    monkeypatch.setenv("LORA", "1" if lora else "")
    monkeypatch.setattr(verl.machine, "gpus", lambda: [Gpu("a GPU that is not there", 1)])
    config = config_of(root, "grpo", peft__enabled=lora, ppo__eval_file=root / "train.jsonl", training_args__output_dir=tmp_path / "out")
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(SopError, match="CUDA said no") as raised:
        grpo.STAGE.run(config)
    assert raised.value.code == ENVIRONMENT and not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setenv("FAILS", "")
    done = grpo.STAGE.run(config)
    files = {str(p.relative_to(done.path)) for p in done.path.rglob("*") if p.is_file()}
    made = {"adapter_config.json", "base.json", "tokenizer.json"} if lora else {"config.json", "tokenizer.json"}
    assert made | {"verl.yaml", "run.sh", "verl.log", "data/train.parquet", "data/validation.parquet", "reward/compute_score.py", "reward/rewards.json", "manifest.json"} <= files
    assert done.stats["steps"] == 12 and done.stats["rows"]["kept"] == 32 and done.stats["reward_lint"]["choice"]["right"] == 1 and not any("checkpoints" in name for name in files)
    assert "main_ppo --config-path" in (done.path / "run.sh").read_text() and yaml.safe_load((done.path / "verl.yaml").read_text())["actor_rollout_ref"]["rollout"]["n"] == 4
    assert grpo.STAGE.run(config).skipped and grpo.summary(done)


def test_a_run_without_verl_or_a_gpu_says_what_is_missing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(verl.PYTHON, raising=False)
    with pytest.raises(SopError, match="verl is not installed") as raised:
        grpo.STAGE.run(config_of(root, "grpo"))
    assert raised.value.code == ENVIRONMENT and "sop doctor --for verl" in str(raised.value)
    monkeypatch.setenv(verl.PYTHON, sys.executable)
    monkeypatch.setattr(verl.machine, "gpus", list)
    with pytest.raises(SopError, match="CUDA GPUs") as raised:
        grpo.STAGE.run(config_of(root, "grpo"))
    assert raised.value.code == ENVIRONMENT


def test_ppo_on_trl_names_the_choices(root: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        config_of(root, "ppo", engine="trl")
    assert "TRL no longer has PPO" in str(raised.value) and all(word in str(raised.value) for word in ("engine: verl", "grpo", "rloo"))
