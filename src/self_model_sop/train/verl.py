"""`engine: verl`: the recipe as verl's own configuration, composed and checked by the installed verl, and run in its environment by subprocess.

verl 0.9 (Hydra; trainer/config/ppo_trainer.yaml) accepts values of any type, so types and choices are checked here first.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import errors
from ..artifact import write_atomic
from ..console import note
from ..errors import Interrupted, SopError
from ..stage import Run
from . import machine, rewards
from .reward_settings import MODEL, complete, file_of
from .rlhf import RlhfConfig

PYTHON = "SOP_VERL_PYTHON"
CONFIG, LOG = "verl.yaml", "verl.log"
_COMPOSE, _REWARD = Path(__file__).with_name("verl_compose.py"), Path(__file__).with_name("verl_reward.py")
_TRACKERS = ("console", "wandb", "swanlab", "tensorboard", "mlflow", "clearml", "trackio", "file")
Finding = tuple[str, str, str]


# --- the recipe in verl's words ----------------------------------------------------------------------------------------------------------------


def tree(config: RlhfConfig, folder: Path) -> dict[str, Any]:
    """The keys of verl's configuration that the recipe decides; `verl:` is laid over them.

    GRPO: advantages from the group, the KL term in the loss, no critic. PPO: generalised advantage estimation, a critic that starts from the same model, one answer a prompt.
    """
    p, ppo = config.ppo, config.algorithm == "ppo"
    flash = config.attn_implementation == "flash_attention_2"
    lora = {"lora_rank": config.peft.lora_r, "lora_alpha": int(config.peft.lora_alpha), "target_modules": _targets(config)} if config.peft.enabled else {}
    model = {
        "path": config.model_name_or_path, "tokenizer_path": config.tokenizer_name_or_path, "trust_remote_code": False, "use_remove_padding": flash,
        "override_config": {"attn_implementation": config.attn_implementation}, **({"custom_chat_template": template(config)} if config.template_path else {}),
    }  # fmt: skip
    steps, saves = config.training_args.get("max_steps", -1), config.training_args.get("save_steps", 500)
    judge, functions = _judges(config)
    recipe: dict[str, Any] = {
        "algorithm": {"adv_estimator": "gae" if ppo else "grpo", "use_kl_in_reward": False},
        "data": {
            "train_files": [str(folder / "data" / "train.parquet")], "val_files": [str(folder / "data" / ("validation.parquet" if p.eval_file else "train.parquet"))],
            "prompt_key": "prompt", "train_batch_size": p.train_batch_size, "max_prompt_length": p.max_prompt_length, "max_response_length": p.max_response_length,
            "filter_overlong_prompts": True, "truncation": "error", "seed": config.seed,
        },
        "actor_rollout_ref": {
            "model": {**model, **lora},
            "actor": {
                "optim": {"lr": p.actor_lr}, "ppo_mini_batch_size": p.ppo_mini_batch_size, "ppo_micro_batch_size_per_gpu": p.ppo_micro_batch_size_per_gpu,
                "use_kl_loss": p.use_kl_loss, "kl_loss_coef": p.kl_loss_coef, "kl_loss_type": "low_var_kl",
            },
            "rollout": {
                "name": p.rollout_backend, "n": p.rollout_n, "tensor_model_parallel_size": p.rollout_tp, "log_prob_micro_batch_size_per_gpu": p.ppo_micro_batch_size_per_gpu,
                "seed": config.seed, **({"load_format": "safetensors"} if config.peft.enabled else {}),
            },
            "ref": {"log_prob_micro_batch_size_per_gpu": p.ppo_micro_batch_size_per_gpu},
        },
        "critic": {"enable": ppo},
        "trainer": {
            "n_gpus_per_node": p.n_gpus_per_node, "nnodes": p.nnodes, "total_epochs": p.total_epochs, "logger": _loggers(config),
            "project_name": config.trace_project or "self-model-sop", "experiment_name": config.algorithm, "default_local_dir": str(folder / "checkpoints"),
            "save_freq": int(saves), "resume_mode": "auto",
            "val_before_train": p.eval_file is not None, "test_freq": int(saves) if p.eval_file else -1, **({"total_training_steps": int(steps)} if steps > 0 else {}),
        },
    }  # fmt: skip
    if ppo:
        recipe["critic"] |= {"model": {**model, **lora}, "optim": {"lr": p.critic_lr}, "ppo_micro_batch_size_per_gpu": p.ppo_micro_batch_size_per_gpu}
    if functions:
        recipe["reward"] = {"custom_reward_function": {"path": str(folder / "reward" / "compute_score.py"), "name": "compute_score"}}
    elif judge:
        whole = p.max_prompt_length + p.max_response_length
        served = {"name": p.rollout_backend, "tensor_model_parallel_size": 1, "prompt_length": whole, "response_length": p.max_response_length}
        recipe["reward"] = {"reward_model": {"enable": True, "model_path": judge, "rollout": served}}
    return _over(recipe, config.verl)


def _over(base: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in above.items():
        out[key] = _over(out[key], value) if isinstance(value, Mapping) and isinstance(out.get(key), Mapping) else value
    return out


def _targets(config: RlhfConfig) -> Any:
    wanted = config.peft.target_modules
    return wanted if isinstance(wanted, str) else list(wanted)


def _loggers(config: RlhfConfig) -> list[str]:
    named = config.ppo.logger
    given = [named] if isinstance(named, str) else list(named)
    return list(dict.fromkeys([*given, *([config.trace] if config.trace != "none" else [])]))


def _judges(config: RlhfConfig) -> tuple[str | None, list[Any]]:
    """(the reward model, the functions)."""
    wanted = complete(config.rewards, config.reward_model_name_or_path)
    return config.reward_model_name_or_path, [setting for setting in wanted if setting.name != MODEL]


def template(config: RlhfConfig) -> str:
    """The Jinja of the template file, which verl renders prompts with."""
    from . import families

    return families.read(families.find(str(config.template_path))).source


# --- what cannot work --------------------------------------------------------------------------------------------------------------------------


def findings(config: RlhfConfig) -> Iterator[Finding]:
    """Rules of both algorithms on verl, before anything is composed."""
    p = config.ppo
    gpus = p.n_gpus_per_node * p.nnodes
    if config.algorithm == "rloo":
        yield "engine", "rloo runs on TRL", "write engine: trl, or algorithm: grpo"
    if p.rollout_backend not in ("vllm", "sglang"):
        why = "envs/verl.txt has no TensorRT-LLM" if p.rollout_backend == "trtllm" else "verl 0.9 writes answers with a server; plain transformers is no longer among its rollouts"
        yield "ppo.rollout_backend", f"{p.rollout_backend}: {why}", "write vllm or sglang"
    if config.algorithm == "grpo" and p.rollout_n < 2:
        yield "ppo.rollout_n", f"{p.rollout_n}: grpo compares the answers to one prompt, so it needs at least 2", "write 4 or 8"
    if config.algorithm == "grpo" and not p.use_kl_loss:
        yield "ppo.use_kl_loss", "grpo keeps near the reference by its loss, and nothing else would", "write use_kl_loss: true"
    if config.algorithm == "ppo" and p.rollout_n != 1:
        yield "ppo.rollout_n", f"{p.rollout_n}: ppo has a critic instead of a group", "write rollout_n: 1, or algorithm: grpo"
    if p.train_batch_size * p.rollout_n % gpus:
        yield "ppo.train_batch_size", f"{p.train_batch_size} x {p.rollout_n} answers cannot be shared by {gpus} GPUs", f"make it a multiple of {gpus}"
    elif p.ppo_mini_batch_size * p.rollout_n % (p.ppo_micro_batch_size_per_gpu * gpus):
        what = f"an update has {p.ppo_mini_batch_size} x {p.rollout_n} answers, which passes of {p.ppo_micro_batch_size_per_gpu} on {gpus} GPUs do not fill"
        yield "ppo.ppo_micro_batch_size_per_gpu", what, f"make ppo_mini_batch_size x rollout_n a multiple of it times {gpus}"
    if p.n_gpus_per_node % p.rollout_tp:
        yield "ppo.rollout_tp", f"{p.n_gpus_per_node} GPUs of a machine cannot be split into groups of {p.rollout_tp}", "write a divisor of n_gpus_per_node"
    yield from _values(config)
    judge, functions = _judges(config)
    if judge and functions:
        yield "rewards", "verl judges by a reward model or by functions, not by their sum", f"leave {MODEL} or the functions out, or write engine: trl"
    if config.ref_model_name_or_path and config.ref_model_name_or_path != config.model_name_or_path:
        yield "ref_model_name_or_path", "verl keeps near the model as it was, and takes no other one", "leave it out"


def _values(config: RlhfConfig) -> Iterator[Finding]:
    p = config.ppo
    for key, rate in (("actor_lr", p.actor_lr), ("critic_lr", p.critic_lr)):
        if not 0 < rate < 1:
            yield f"ppo.{key}", f"{rate} is no learning rate", "for example 1.0e-6"
    if p.kl_loss_coef < 0:
        yield "ppo.kl_loss_coef", f"must be at least 0, got {p.kl_loss_coef}", ""
    for name in _loggers(config):
        if name not in _TRACKERS:
            yield "ppo.logger", f"verl has no tracker {name!r}", errors.suggest(name, _TRACKERS, f"trackers: {', '.join(_TRACKERS)}")
    if config.peft.enabled:
        if config.peft.lora_alpha != int(config.peft.lora_alpha):
            yield "peft.lora_alpha", f"verl takes whole numbers, got {config.peft.lora_alpha}", f"write {int(config.peft.lora_alpha)}"
        for key in ("qlora", "dora", "rslora"):
            if getattr(config.peft, key):
                yield f"peft.{key}", "verl has plain LoRA alone", "leave it out, or write engine: trl"
    for key, kind in (("deepspeed", config.deepspeed), ("fsdp", config.fsdp)):
        if kind:
            yield key, "verl shards by itself (FSDP)", "leave it out; verl: {actor_rollout_ref: {actor: {fsdp_config: ...}}} has its settings"


# --- verl's own environment --------------------------------------------------------------------------------------------------------------------


class Composed(NamedTuple):
    """What the installed verl makes of a recipe."""

    version: str
    yaml: str
    validated: str


def python(config: RlhfConfig) -> Path | None:
    """The Python of verl's environment, or None where none is named or it is not there."""
    named = config.verl_python or os.environ.get(PYTHON)
    path = Path(named).expanduser() if named else None
    return path.absolute() if path and path.exists() else None


def compose(config: RlhfConfig, interpreter: Path, folder: Path, *, validate: bool) -> Composed:
    """Compose the recipe with the installed verl's files, and let verl validate it where it can (that imports torch and Ray).

    Raises:
        SopError: exit 2 for keys or values that verl refuses, 4 where its environment does not work.
    """
    asked = json.dumps({"tree": tree(config, folder), "validate": validate})
    done = subprocess.run([str(interpreter), "-I", str(_COMPOSE)], input=asked, capture_output=True, text=True, env=_environment(), timeout=600, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise SopError(f"verl's environment cannot compose a configuration: {told}", where=str(interpreter), fix="sop doctor --for verl", code=errors.ENVIRONMENT)
    answer = json.loads(done.stdout)
    if answer["problems"]:
        told = "; ".join(f"{key}: {what}" if key else what for key, what in answer["problems"])
        raise SopError(f"verl {answer['version']} refuses the configuration: {told}", where="verl", fix="correct the key below `verl:`, or the setting that it comes from")
    return Composed(answer["version"], answer["yaml"], answer["validated"])


def _environment() -> dict[str, str]:
    """This process's environment without what belongs to its own Python."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")} | {"HYDRA_FULL_ERROR": "1"}


def command(interpreter: Path | str, folder: Path) -> list[str]:
    """What runs verl on the composed configuration."""
    return [str(interpreter), "-m", "verl.trainer.main_ppo", "--config-path", str(folder), "--config-name", Path(CONFIG).stem, f"hydra.run.dir={folder / 'hydra'}"]


def plan(config: RlhfConfig) -> list[str]:
    """What `--dry-run` prints: the command, and the composed configuration, or without an environment the keys that the recipe sets."""
    from .grpo import judged

    p, interpreter, folder = config.ppo, python(config), config.target().folder.absolute()
    found, table = judged(config)
    out = [f"{config.algorithm} by verl on {p.n_gpus_per_node} x {p.nnodes} GPUs: {len(found):,} prompts, {p.train_batch_size} a step, {p.rollout_n} answers to each"]
    out += [*table, "command: " + shlex.join(command(interpreter or f"${PYTHON}", folder))]
    if interpreter is None:
        text = _dump(tree(config, folder))
        out.append(f"verl is not installed here ({PYTHON} and verl_python name no Python): not composed; sop doctor --for verl prints how to install it. The recipe's keys:")
    else:
        made = compose(config, interpreter, folder, validate=True)
        text = made.yaml
        out.append(f"composed with the files of verl {made.version}; verl's own validation: {made.validated}")
    return [*out, *text.rstrip().split("\n")]


def _dump(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(recipe), allow_unicode=True, sort_keys=False)


# --- a run -------------------------------------------------------------------------------------------------------------------------------------


def build(run: Run[RlhfConfig]) -> dict[str, Any]:
    """Write data, reward function and configuration into the work folder, run verl on them, and take its last checkpoint as the result.

    Raises:
        SopError: exit 4 where verl or a GPU is missing; else what verl ended with.
        Interrupted: stopped by a signal; verl resumes from its last checkpoint.
    """
    from . import finish
    from .alignment import located

    work, named = run.work, run.config.model_name_or_path
    interpreter = ready(run.config)
    config, commit = located(run.config)
    done = finish.already(work)
    if done is None:
        made, rows, lint = write(config, interpreter, work)
        _call(command(interpreter, work), work)
        steps = _collect(interpreter, work, named, commit)
        done = {"algorithm": config.algorithm, "engine": "verl", "verl": made.version, "validated": made.validated, "steps": steps, "rows": rows, "reward_lint": lint}
        finish.seal(work, done)
    if not config.keep_checkpoints:
        shutil.rmtree(work / "checkpoints", ignore_errors=True)
    return done


def ready(config: RlhfConfig) -> Path:
    """The Python to run verl with.

    Raises:
        SopError: exit 4, with what to install.
    """
    interpreter = python(config)
    if interpreter is None:
        raise SopError(f"verl is not installed here: neither verl_python nor {PYTHON} names a Python", fix="sop doctor --for verl prints the commands", code=errors.ENVIRONMENT)
    if not machine.gpus():
        fix = "run it where CUDA GPUs are; --dry-run shows the command and the configuration here, engine: trl trains grpo and rloo on a CPU"
        raise SopError("verl needs CUDA GPUs, and there is none here", fix=fix, code=errors.ENVIRONMENT)
    return interpreter


def write(config: RlhfConfig, interpreter: Path, work: Path) -> tuple[Composed, dict[str, Any], dict[str, Any] | None]:
    """Everything that verl reads: `data/*.parquet`, `reward/`, `verl.yaml`, and the command as `run.sh`; answers the composed YAML, the counts of rows, the table of rewards."""
    from . import reward_lint, reward_settings
    from .prompts import read

    parts = reward_settings.parts(config.rewards)
    prompts = read(config.ppo.train_file, config.ppo.prompt_key, parts)
    table = reward_lint.table(parts, prompts.kept) if parts else None
    if table:
        for line in table.lines():
            note(line)
        reward_lint.require(table, config.reward_lint)
    write_rows(work / "data" / "train.parquet", [prompt.row for prompt in prompts.kept], "train")
    if config.ppo.eval_file:
        held_out = read(config.ppo.eval_file, config.ppo.prompt_key, parts)
        write_rows(work / "data" / "validation.parquet", [prompt.row for prompt in held_out.kept], "validation")
    write_reward(config, work / "reward")
    made = compose(config, interpreter, work, validate=True)
    write_atomic(work / CONFIG, made.yaml)
    write_atomic(work / "run.sh", "#!/bin/sh\nexec " + shlex.join(command(interpreter, work)) + "\n")
    return made, prompts.counts(), table.stats() if table else None


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], split: str) -> None:
    """Rows of verl's contract; what a row's extra_info holds goes along, for rewards that read it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    keys = ("prompt", "data_source", "ability", "reward_model")
    made = [{**{k: row[k] for k in keys}, "extra_info": {**row["extra_info"], "split": split, "index": i}} for i, row in enumerate(rows)]
    made = [{**row, "data_source": row["data_source"] or path.stem} for row in made]
    pq.write_table(pa.Table.from_pylist(made), path)


def write_reward(config: RlhfConfig, folder: Path) -> None:
    """The function that verl calls, with a copy of every reward that it needs: the folder runs without this project."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path(rewards.__file__).parent, folder / "sop_rewards", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(_REWARD, folder / "compute_score.py")
    listed = []
    for setting in _judges(config)[1]:
        name = setting.name
        if rewards.is_file(name):
            copy = f"{rewards.label(name)}_{file_of(name).name}"
            shutil.copyfile(file_of(name), folder / copy)
            name = f"{copy}:{rewards.label(name)}"
        listed.append({"name": name, "weight": setting.weight, "options": setting.options})
    write_atomic(folder / "rewards.json", json.dumps(listed, ensure_ascii=False, indent=1))


def _call(words: Sequence[str], work: Path) -> None:
    """Run a command with its output in verl.log; a signal to this process stops it and its children.

    Raises:
        SopError: exit 4 where it failed, with the end of its output.
    """
    note("running " + shlex.join(words))
    with (work / LOG).open("ab") as log:
        child = subprocess.Popen(words, cwd=work, stdout=log, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True)
        try:
            code = child.wait()
        except (Interrupted, KeyboardInterrupt):
            os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
            raise
    if code:
        tail = (work / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        what = f"verl ended with code {code}:\n  " + "\n  ".join(tail)
        raise SopError(what, where=str(work / LOG), fix="the same command resumes from its last checkpoint", code=errors.ENVIRONMENT)


def _collect(interpreter: Path, work: Path, base: str, commit: str | None) -> int:
    """Take the last checkpoint as the result: verl's own merger turns its shards into a model (with LoRA: an adapter); answers the step.

    Raises:
        SopError: where verl left no checkpoint.
    """
    from .finish import name_base

    found = sorted((work / "checkpoints").glob("global_step_*/actor"), key=lambda path: int(path.parent.name.rpartition("_")[2]))
    if not found:
        raise SopError("verl ended without a checkpoint", where=str(work / "checkpoints"), fix="set training_args.save_steps to at most the number of steps", code=errors.DATA)
    merged = work / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    _call([str(interpreter), "-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(found[-1]), "--target_dir", str(merged)], work)
    adapter = merged / "lora_adapter"
    for path in sorted((adapter if adapter.is_dir() else merged).iterdir()):
        if path.is_file():
            path.replace(work / path.name)
    if adapter.is_dir():
        for path in merged.glob("*token*"):
            path.replace(work / path.name)
        name_base(work, base, commit)
    shutil.rmtree(merged)
    return int(found[-1].parent.name.rpartition("_")[2])
