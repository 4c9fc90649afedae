"""`config/self_model_config/rlhf.yaml`: the keys that reward, dpo, grpo and ppo share, and which command does which algorithm."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import option
from . import arguments, preflight
from .adapters import PeftSettings
from .reward_settings import RewardSetting
from .settings import RowData, TrainConfig

Algorithm = Literal["reward", "dpo", "kto", "orpo", "simpo", "grpo", "rloo", "ppo"]
COMMANDS: dict[str, str] = {"reward": "reward", "dpo": "dpo", "kto": "dpo", "orpo": "dpo", "simpo": "dpo", "grpo": "grpo", "rloo": "grpo", "ppo": "ppo"}

# Files of the installed TRL that declare each algorithm's own arguments, and the class in them.
TRL_CONFIGS: dict[str, tuple[str, str]] = {
    "reward": ("trainer/reward_config.py", "RewardConfig"), "dpo": ("trainer/dpo_config.py", "DPOConfig"), "kto": ("trainer/kto_config.py", "KTOConfig"),
    "orpo": ("experimental/orpo/orpo_config.py", "ORPOConfig"), "simpo": ("experimental/cpo/cpo_config.py", "CPOConfig"),
    "grpo": ("trainer/grpo_config.py", "GRPOConfig"), "rloo": ("trainer/rloo_config.py", "RLOOConfig"),
}  # fmt: skip

# Arguments of TRL's configs that have a key of their own here, or that this project decides.
_ELSEWHERE = {
    "beta": "use the top-level key `beta`", "loss_type": "use the top-level key `loss_type`", "loss_weights": "use the top-level key `loss_weights`",
    "max_length": "use data.max_length", "max_prompt_length": "use data.max_length", "precompute_ref_log_probs": "use data.precompute_ref_log_probs",
    "max_completion_length": "use ppo.max_response_length", "num_generations": "use ppo.rollout_n", "reward_weights": "give each entry of `rewards` its weight",
    "model_init_kwargs": "leave it out: model_name_or_path, precision and attn_implementation say how the model is loaded", "trust_remote_code": "leave it out",
    "chat_template_path": "use the top-level key `template_path`", "pad_token": "leave it out: a token that is no end marker is chosen",
    "eos_token": "leave it out: the template says what ends an answer",
    "dataset_num_proc": "use data.workers", "use_vllm": "use ppo.rollout_backend",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PairData(RowData):
    """`data:` preference pairs, for reward models and for DPO and its kin."""

    train_file: Path | tuple[Path, ...] = option(Path("data_process/final_data/reward/train.jsonl"), "rows with a chosen and a rejected answer; one file or several", path="input")
    eval_file: Path | None = option(None, "held-out pairs; accuracy and margin on them are measured before and after", path="input")
    precompute_ref_log_probs: bool = option(False, "measure the reference model once before training: one pass less in every step, and no second model in memory")


@dataclass(frozen=True, kw_only=True)
class PpoSettings:
    """`ppo:` prompts, rollouts and updates of grpo, rloo and ppo, on both engines."""

    train_file: Path = option(
        Path("data_process/final_data/reward/rl/train.parquet"), "prompts, as `sop data preference` writes them (verl's contract); Parquet or JSONL", path="input"
    )
    eval_file: Path | None = option(None, "held-out prompts; the mean reward on them is measured before and after", path="input")
    prompt_key: str = option("prompt", "field that holds the chat messages")
    max_prompt_length: int = option(512, "tokens of a prompt; longer ones are left out and counted")
    max_response_length: int = option(512, "tokens of an answer")
    train_batch_size: int = option(64, "prompts of one step, over all devices")
    rollout_backend: Literal["vllm", "sglang", "trtllm", "transformers"] = option("vllm", "what writes the answers; verl has no transformers, TRL has no sglang and trtllm")
    rollout_n: int = option(4, "answers to each prompt; grpo and rloo need at least 2")
    rollout_tp: int = option(1, "GPUs that share one copy of the model while answering")
    actor_lr: float = option(1.0e-6, "learning rate of the policy")
    critic_lr: float = option(1.0e-5, "learning rate of the critic (ppo)")
    ppo_mini_batch_size: int = option(32, "prompts of one update")
    ppo_micro_batch_size_per_gpu: int = option(2, "answers in one pass of one device")
    kl_loss_coef: float = option(0.001, "weight of the distance to the reference model")
    use_kl_loss: bool = option(True, "keep the policy near the reference model")
    n_gpus_per_node: int = option(1, "GPUs of one machine")
    nnodes: int = option(1, "machines")
    total_epochs: int = option(1, "passes over the prompts")
    logger: str | tuple[str, ...] = option("console", "verl's own trackers; the top-level `trace` is added", cosmetic=True)

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"ppo.{key} must be at least 1")
        if self.ppo_mini_batch_size > self.train_batch_size:
            raise ValueError("ppo.ppo_mini_batch_size must not exceed ppo.train_batch_size")


@dataclass(frozen=True, kw_only=True)
class RlhfConfig(TrainConfig):
    """config/self_model_config/rlhf.yaml"""

    algorithm: Algorithm = option("dpo", "reward; dpo, kto, orpo, simpo; grpo, rloo; ppo. The command must fit: sop train reward | dpo | grpo | ppo")
    engine: Literal["trl", "verl"] = option("trl", "trl: one machine; verl: many GPUs and machines (grpo and ppo alone, in an environment of its own)")
    template_path: str | None = option(
        None, "chat template for a tokenizer without one: a file, or a name of self_model/template; where the tokenizer has one, both must write the same", path="model"
    )
    template_override: bool = option(False, "use template_path even where the tokenizer's own template writes something else")
    ref_model_name_or_path: str | None = option(None, "reference model; none: the model as it was before this training", path="model")
    reward_model_name_or_path: str | None = option(None, "judge of answers for grpo, rloo and ppo", path="model")
    beta: float | None = option(None, "how strongly the reference holds the model back (for orpo the weight of the odds ratio); none: TRL's default for the algorithm")
    loss_type: str | tuple[str, ...] | None = option(None, "one loss of the installed TRL, or several; none: its default. kto, orpo and simpo stand for the algorithm too")
    loss_weights: tuple[float, ...] | None = option(None, "weights of several losses; none: all 1")
    data: PairData = option(factory=PairData)
    ppo: PpoSettings = option(factory=PpoSettings)
    peft: PeftSettings = option(factory=PeftSettings)
    rewards: tuple[RewardSetting, ...] = option((), "grpo, rloo, ppo: what judges an answer, as a weighted sum; the same functions on both engines")
    reward_lint: Literal["refuse", "warn"] = option("refuse", "before a run right, wrong and empty answers are judged; refuse: stop where right ones earn no more", cosmetic=True)
    verl: dict[str, Any] = option(help="engine verl: further keys of its own configuration, nested: {actor_rollout_ref: {rollout: {gpu_memory_utilization: 0.6}}}", factory=dict)
    verl_python: str | None = option(None, "engine verl: the Python of its environment; none: what SOP_VERL_PYTHON says", cosmetic=True)
    merge: bool = option(True, "reward model with an adapter: write it merged, a whole model, as judges are loaded; false: the adapter alone")
    trl: dict[str, Any] = option(help="further arguments of TRL's own config of the algorithm (label_smoothing, simpo_gamma, temperature, ...)", factory=dict)

    @property
    def method(self) -> Algorithm:
        """The algorithm, where `loss_type` does not name another one of the family of dpo."""
        return self.loss_type if self.algorithm == "dpo" and self.loss_type in ("kto", "orpo", "simpo") else self.algorithm  # type: ignore[return-value]

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of TRL's losses that were asked for; empty: its default. The file that all algorithms share may name dpo's own default."""
        named = self.loss_type or ()
        named = (named,) if isinstance(named, str) else named
        return () if named == (self.method,) or (named == ("sigmoid",) and self.algorithm != "dpo") else named

    @property
    def sequence_length(self) -> tuple[str, int]:
        if self.algorithm in ("grpo", "rloo", "ppo"):
            return "ppo.max_response_length", self.ppo.max_prompt_length + self.ppo.max_response_length
        return "data.max_length", self.data.max_length


Finding = tuple[str, str, str]


def fits_command(config: RlhfConfig, command: str) -> Iterator[Finding]:
    """What is wrong with running `command` (reward, dpo, grpo, ppo) on this config, before anything is loaded."""
    wanted = COMMANDS[config.algorithm]
    if wanted != command:
        others = [name for name, runs in COMMANDS.items() if runs == command]
        yield "algorithm", f"{config.algorithm}, but this is sop train {command}", f"run `sop train {wanted}`, or set algorithm: {' or '.join(others)}"
        return
    if config.engine == "verl" and command in ("reward", "dpo"):
        yield "engine", f"verl has no trainer for {config.algorithm}", "write engine: trl"
    if config.engine == "trl":
        yield from trl_findings(config)
    yield from preflight.template(config.template_path, override=config.template_override)
    yield from preflight.targets(config.model_name_or_path, config.peft)


def trl_findings(config: RlhfConfig) -> Iterator[Finding]:
    """What is wrong with `trl:` for the config's algorithm, judged by the source of the installed TRL (nothing of it is imported)."""
    if config.method not in TRL_CONFIGS:
        return
    own = trl_arguments(config.method)
    for key, value in config.trl.items():
        if key in _ELSEWHERE:
            yield f"trl.{key}", "not set here", _ELSEWHERE[key]
        elif key not in own:
            where = "use training_args" if key in arguments.known() else ""
            near = difflib.get_close_matches(key, [name for name in own if name not in _ELSEWHERE], 1, cutoff=0.6)
            yield f"trl.{key}", f"unknown key of trl.{TRL_CONFIGS[config.method][1]}", where or (f"did you mean {near[0]!r}?" if near else "")
        else:
            problem = arguments.problem(own[key], value)
            if problem:
                yield (f"trl.{key}", *problem)


def loss_findings(config: RlhfConfig) -> Iterator[Finding]:
    """Losses that the installed TRL does not have for the method, and what else is wrong with them."""
    known = implemented_losses(config.method)
    for name in config.losses:
        if name not in known:
            others = [*known, *(() if config.algorithm != "dpo" else ("kto", "orpo", "simpo"))]
            near = difflib.get_close_matches(name, others, 1, cutoff=0.5)
            what = f"{config.method} has no loss {name!r} in the installed TRL" if known else f"{config.method} has one loss only, not {name!r}"
            yield "loss_type", what, (f"did you mean {near[0]!r}? " if near else "") + (f"it has {', '.join(others)}" if known else "leave loss_type out")
    if len(config.losses) > 1 and config.method != "dpo":
        yield "loss_type", f"several losses are for dpo, not for {config.method}", "name one"
    if config.loss_weights is not None and len(config.loss_weights) != len(config.losses):
        yield "loss_weights", f"{len(config.loss_weights)} weights for {len(config.losses)} losses", "give one weight to each entry of loss_type"
    if "exo_pair" in config.losses and not config.trl.get("label_smoothing"):
        yield "loss_type", "exo_pair needs label smoothing", "set trl: {label_smoothing: 1.0e-3}"


def implemented_losses(method: str) -> tuple[str, ...]:
    """What the source of the installed TRL compares `loss_type` with: the losses that a trainer has. Empty for methods with a single one."""
    file = {"dpo": "trainer/dpo_trainer.py", "kto": "trainer/kto_trainer.py"}.get(method)
    return arguments.compared_with("trl", file, "loss_type") if file else ()


def trl_arguments(method: str) -> Mapping[str, arguments.Argument]:
    """The fields that TRL's config of an algorithm adds to TrainingArguments, by name."""
    file, name = TRL_CONFIGS[method]
    return arguments.fields_of("trl", file, name)
