"""rlhf.yaml: its documented keys, which command does which algorithm, and what of it reaches TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from self_model_sop.config import ConfigError, Setting, load
from self_model_sop.ops.config import kind_of
from self_model_sop.train import arguments, rlhf
from self_model_sop.train.rlhf import COMMANDS, RlhfConfig
from self_model_sop.train.trl_trainers import beta_of
from self_model_sop.train.trl_trainers import kind_of as trainer_of

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "config/self_model_config/rlhf.yaml"

DOCUMENTED = """
algorithm: {algorithm}
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
tokenizer_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
template_path: self_model/template/qwen2_chatml.json
ref_model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
reward_model_name_or_path: self_model/checkpoints/reward
data: {{train_file: data_process/final_data/reward/train.jsonl, eval_file: data_process/final_data/reward/validation.jsonl, max_length: 512}}
beta: 0.1
loss_type: sigmoid
peft: {{enabled: true, lora_r: 8, lora_alpha: 16, target_modules: [q_proj, k_proj, v_proj, o_proj]}}
trace: swanlab
trace_project: alignment
ppo:
  train_file: data_process/final_data/reward/rl/train.parquet
  eval_file: data_process/final_data/reward/rl/validation.parquet
  prompt_key: prompt
  max_prompt_length: 512
  max_response_length: 512
  train_batch_size: 64
  rollout_backend: vllm
  rollout_n: 4
  rollout_tp: 1
  actor_lr: 1e-6
  ppo_mini_batch_size: 32
  ppo_micro_batch_size_per_gpu: 2
  kl_loss_coef: 0.001
  use_kl_loss: true
  n_gpus_per_node: 1
  nnodes: 1
  total_epochs: 1
  logger: [console, swanlab]
training_args: {{output_dir: self_model/checkpoints/rlhf, per_device_train_batch_size: 2, learning_rate: 5e-6, num_train_epochs: 1}}
"""


def _load(**values: Any) -> RlhfConfig:
    return load(RlhfConfig, SHIPPED, [Setting(k.replace("__", "."), v, "test", ROOT) for k, v in values.items()], check_paths=False).config


@pytest.mark.parametrize("algorithm", ["dpo", "ppo", "grpo"])
def test_the_documented_keys_load_verbatim(algorithm: str, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    path = tmp_path / "config" / "rlhf.yaml"
    path.write_text(DOCUMENTED.format(algorithm=algorithm), encoding="utf-8")
    config = load(RlhfConfig, path, check_paths=False).config
    assert config.algorithm == algorithm and config.beta == 0.1 and config.ppo.actor_lr == 1e-6 and config.ppo.logger == ("console", "swanlab") and config.peft.lora_r == 8


def test_the_shipped_file_is_read_by_the_command_of_its_algorithm(tmp_path: Path) -> None:
    shipped = _load()
    assert kind_of(SHIPPED).name == f"train.{COMMANDS[shipped.algorithm]}" and shipped.target().folder == ROOT / "self_model/checkpoints/dpo"
    other = tmp_path / "config" / "self_model_config" / "rlhf.yaml"
    other.parent.mkdir(parents=True)
    other.write_text(SHIPPED.read_text(encoding="utf-8").replace("algorithm: dpo", "algorithm: reward"), encoding="utf-8")
    assert kind_of(other).name == "train.reward"


@pytest.mark.parametrize("algorithm", list(COMMANDS))
def test_a_command_takes_its_own_algorithms_alone(algorithm: str) -> None:
    config = _load(algorithm=algorithm)
    for command in dict.fromkeys(COMMANDS.values()):
        wrong = [finding for finding in rlhf.fits_command(config, command) if finding[0] == "algorithm"]
        assert bool(wrong) == (command != COMMANDS[algorithm])
        assert not wrong or f"run `sop train {COMMANDS[algorithm]}`" in wrong[0][2]


def test_an_unknown_algorithm_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"algorithm: expected .*'dpo'.*did you mean 'grpo'\?"):
        _load(algorithm="grp")


def test_losses_and_methods() -> None:
    assert _load(loss_type="kto").method == "kto" and _load(loss_type="kto").losses == ()
    assert _load(algorithm="orpo").losses == () and _load(loss_type=["sigmoid", "sft"]).losses == ("sigmoid", "sft")
    known = rlhf.implemented_losses("dpo")
    assert {"sigmoid", "hinge", "ipo", "robust", "exo_pair", "sppo_hard", "apo_zero", "discopop", "sft"} <= set(known) and "kto" not in known
    assert rlhf.implemented_losses("kto") == ("kto", "apo_zero_unpaired")


@pytest.mark.parametrize("loss", rlhf.implemented_losses("dpo"))
def test_every_loss_of_trl_is_accepted(loss: str) -> None:
    assert not list(rlhf.loss_findings(_load(loss_type=loss, trl={"label_smoothing": 0.01} if loss == "exo_pair" else {})))


def test_what_reaches_trl() -> None:
    dpo = trainer_of(_load(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], trl={"label_smoothing": 0.1}, data__precompute_ref_log_probs=True), None, None, None)
    assert dpo.options == {"max_length": None, "label_smoothing": 0.1, "beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "precompute_ref_log_probs": True}
    simpo = trainer_of(_load(algorithm="simpo", beta=None, trl={"simpo_gamma": 0.5}), None, None, None)
    assert simpo.options == {"max_length": 512, "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5, "loss_type": "simpo"}
    assert beta_of(_load(beta=None)) == 0.1 and beta_of(_load(algorithm="simpo", beta=None)) == 2.0 and beta_of(_load(algorithm="simpo")) == 0.1


def test_trl_is_read_not_imported() -> None:
    own = rlhf.trl_arguments("grpo")
    assert {"temperature", "scale_rewards", "mask_truncated_completions"} <= set(own) and "learning_rate" in arguments.known()
    assert [k for k, _, _ in rlhf.trl_findings(_load(algorithm="grpo", trl={"temperatur": 1.0}))] == ["trl.temperatur"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"data__max_length": 4}, "at least 8"),
        ({"ppo__rollout_n": 0}, "ppo.rollout_n must be at least 1"),
        ({"ppo__train_batch_size": 16}, "must not exceed ppo.train_batch_size"),
        ({"ppo__rolout_n": 2}, "did you mean 'rollout_n'"),
    ],
)
def test_values_that_cannot_be(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _load(**more)
