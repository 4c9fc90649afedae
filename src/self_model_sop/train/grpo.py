"""GRPO and RLOO: the model writes several answers to each prompt and learns from those that the rewards judge better. Trainers: TRL on one machine, verl on many."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import errors
from ..console import note
from ..errors import SopError
from ..stage import Artifact, Run, Stage
from ..tokenizer.settings import local
from . import alignment, machine, preflight, reward_lint, reward_settings, rlhf, rollouts
from .adapters import optimizer_groups
from .alignment import located
from .finish import building, disk
from .reward_settings import MODEL
from .rlhf import RlhfConfig
from .settings import training_inputs

if TYPE_CHECKING:
    from .prompts import Prompts
    from .rewards import Part

_MEASURED = 64  # prompts of train_file on which the reward is measured where there is no eval_file
_JUDGED = 16  # prompts of the lint where a reward model judges


def _train(config: RlhfConfig, work: Path) -> dict[str, Any]:
    from . import finish, ranks, trace
    from .attempts import OutOfMemory, guarded
    from .loop import Phase, train
    from .precision import choose
    from .record import Record, losses
    from .setup import load_bare, place, quiet, told

    quiet()
    named = config.model_name_or_path
    vllm = _uses_vllm(config)
    preflight.machine(config, qlora=config.peft.qlora)
    config, commit = located(config)
    chosen = choose(config.precision, config.training_args)
    note(f"precision: {chosen.mode} ({chosen.reason})")
    tokenizer, renderer, prompts, held_out, parts, lint = prepare(config)
    model, rows = load_bare(config, tokenizer, config.peft, chosen)
    place(model, config)
    model.generation_config.eos_token_id = renderer.stop_ids
    record = Record(work)
    measured = held_out.kept if held_out else prompts.kept[:_MEASURED]
    size = max(config.ppo.ppo_micro_batch_size_per_gpu, min(32, config.ppo.train_batch_size))

    def measure(model: Any) -> dict[str, float] | None:
        if config.sharded:  # one device may not hold the model
            return None
        return rollouts.mean_reward(model, measured, parts, tokenizer, renderer.stop_ids, length=config.ppo.max_response_length, size=size, autocast=chosen.autocast)

    try:
        with guarded(config):
            before: Any = finish.remembered(work, "reward_before", lambda: measure(model))
            arguments = rollouts.arguments(config, ranks.world())
            phase = Phase(
                name=config.algorithm, model=model, dataset=rollouts.dataset(prompts), collator=_as_they_are, arguments=arguments, precision=chosen, seed=config.seed,
                groups=optimizer_groups(config.peft, arguments), name_of=prompts.names, reports=trace.start(config.trace, config.trace_project, work),
                deepspeed=config.deepspeed, fsdp=config.fsdp, stop_ids=renderer.stop_ids,
                kind=rollouts.kind_of(config, tokenizer, _adapter(config, model, rows), prompts, parts, vllm=vllm),
            )  # fmt: skip
            outcome = train(phase, work / "checkpoints", record)
            model = outcome["model"]
            after = measure(model)
    except OutOfMemory as error:
        raise OutOfMemory(error.what, fix="\n       ".join(_smaller(config)), code=errors.ENVIRONMENT) from error
    curve = losses(record.lines(), "reward")
    stats = finish.stats(record, outcome, chosen) | {
        "algorithm": config.algorithm, "engine": "trl", "reward_before": before, "reward_after": after, "reward_on": "held-out prompts" if held_out else "prompts of the training",
        "reward_sampled_first": curve[0][1] if curve else None, "reward_sampled_last": curve[-1][1] if curve else None, "rollouts": "vllm" if vllm else "transformers",
        "reward_weights": {part.name: part.weight for part in parts}, "reward_lint": lint.stats(), "rows": prompts.counts(), "eval_rows": held_out.counts() if held_out else None,
        "template": renderer.name, "adapter": config.peft.enabled, "trainable": told(model, rows), "base_commit": commit,
    }  # fmt: skip
    return finish.leave(
        work, stats, title=f"Reinforcement learning ({config.algorithm})", model=model, tokenizer=tokenizer, renderer=renderer, config=config, outcome=outcome,
        reports=phase.reports, base=(named, commit) if config.peft.enabled else None, loss="loss of the policy",
    )  # fmt: skip


def _as_they_are(rows: Sequence[Any]) -> Any:
    """TRL takes rows as a list; it makes tensors after the answers are written."""
    return list(rows)


class Prepared(NamedTuple):
    """What a run needs before its model; `table` says what the rewards give right and wrong answers."""

    tokenizer: Any
    renderer: Any
    prompts: Prompts
    held_out: Prompts | None
    parts: list[Part]
    table: reward_lint.Table


def prepare(config: RlhfConfig) -> Prepared:
    """Everything cheap, where most mistakes show, so before the model is loaded."""
    from . import ranks
    from .model import load_tokenizer
    from .prompts import read
    from .template import ensure_pad, renderer_for

    tokenizer = load_tokenizer(config.tokenizer_source)
    ensure_pad(tokenizer)
    renderer = renderer_for(tokenizer, config.template_path, override=config.template_override)
    wanted = reward_settings.complete(config.rewards, config.reward_model_name_or_path)
    parts: list[Any] = reward_settings.parts(wanted)
    p = config.ppo
    prompts = read(p.train_file, p.prompt_key, parts, renderer, p.max_prompt_length)
    held_out = read(p.eval_file, p.prompt_key, parts, renderer, p.max_prompt_length) if p.eval_file else None
    if len(prompts) < p.train_batch_size:
        what = f"a step takes {p.train_batch_size} prompts, and only {len(prompts)} are there"
        raise SopError(what, where="ppo.train_batch_size", fix=f"ppo.train_batch_size={len(prompts)} ppo.ppo_mini_batch_size={len(prompts)}, or more prompts", code=errors.USAGE)
    judge = next((setting for setting in wanted if setting.name == MODEL), None)
    if judge:
        parts.append(rollouts.judged_by(str(config.reward_model_name_or_path), judge.weight, MODEL, p.ppo_micro_batch_size_per_gpu, hub=config.huggingface))
    table = reward_lint.table(parts, prompts.kept, _JUDGED if judge else reward_lint.ROWS)
    if ranks.is_main():
        for line in table.lines():
            note(line)
    reward_lint.require(table, config.reward_lint)
    return Prepared(tokenizer, renderer, prompts, held_out, parts, table)


def _adapter(config: RlhfConfig, model: Any, rows: range | None) -> Any:
    from .adapters import adapter_config

    return adapter_config(model, config.peft, rows if config.peft.new_rows != "freeze" else None) if config.peft.enabled else None


def _uses_vllm(config: RlhfConfig) -> bool:
    """Whether vLLM writes the answers: it needs a GPU; on a CPU transformers does.

    Raises:
        SopError: exit 4 where there is a GPU and the package is not installed: transformers would be many times slower there, which nobody should get unasked.
    """
    import torch

    if config.ppo.rollout_backend != "vllm":
        return False
    if not torch.cuda.is_available() or config.training_args.get("use_cpu"):
        note("rollouts: transformers (vLLM needs a CUDA GPU)")
        return False
    if importlib.util.find_spec("vllm") is None:
        fix = "install vllm in a version for this torch (TRL names the versions that it knows), or write ppo.rollout_backend: transformers (slower)"
        raise SopError("the package 'vllm' is not installed", where="ppo.rollout_backend", fix=fix, code=errors.ENVIRONMENT)
    return True


def _smaller(config: RlhfConfig) -> list[str]:
    """What helps against too little memory, the cheapest first."""
    p = config.ppo
    found = []
    if p.ppo_micro_batch_size_per_gpu > 1:
        found.append(f"ppo.ppo_micro_batch_size_per_gpu={p.ppo_micro_batch_size_per_gpu // 2} (the same result)")
    found.append(f"ppo.train_batch_size={max(p.train_batch_size // 2, 1)} (fewer answers at once)")
    found.append(f"ppo.max_response_length={max(p.max_response_length // 2, 1)} (shorter answers)")
    return [*found, *([] if config.peft.enabled else ["peft.enabled=true (no second model, and gradients for the adapter only)"])][:3]


# --- the stage -----------------------------------------------------------------------------------------------------------------------------------


def findings(config: RlhfConfig, command: str) -> list[rlhf.Finding]:
    """What cannot work, for grpo and ppo on either engine."""
    found = [*preflight.shared(config, None), *rlhf.fits_command(config, command)]
    if rlhf.COMMANDS[config.algorithm] != command:
        return found
    found += reward_settings.findings(config.rewards, config.reward_model_name_or_path)
    if config.engine == "verl":
        from . import verl

        return [*found, *verl.findings(config)]
    return [*found, *_rules(config)]


def _rules(config: RlhfConfig) -> Iterator[rlhf.Finding]:
    from .ranks import world

    yield from rollouts.findings(config, world())
    if config.losses and (config.algorithm != "grpo" or len(config.losses) > 1 or config.losses[0] not in rollouts.GRPO_LOSSES):
        fix = f"its losses: {', '.join(rollouts.GRPO_LOSSES)}" if config.algorithm == "grpo" else "leave it out"
        yield "loss_type", f"{', '.join(config.losses)} is no loss of {config.algorithm}", errors.suggest(config.losses[0], rollouts.GRPO_LOSSES, fix)
    if config.ppo.rollout_backend in ("sglang", "trtllm"):
        yield "ppo.rollout_backend", f"{config.ppo.rollout_backend} belongs to verl", "write vllm or transformers, or engine: verl"
    if config.ref_model_name_or_path and config.ref_model_name_or_path != config.model_name_or_path:
        yield "ref_model_name_or_path", f"TRL's {config.algorithm} keeps near the model as it was, and takes no other one", "leave it out"
    if config.training_args.get("eval_strategy", "no") != "no":
        yield "training_args.eval_strategy", "the reward on ppo.eval_file is measured before and after, not in between", "leave it out"
    if config.auto_batch:
        yield "auto_batch", "groups of answers cannot be halved unseen", "leave it out; ppo.ppo_micro_batch_size_per_gpu sets the memory"
    if config.ppo.n_gpus_per_node * config.ppo.nnodes > 1 and config.ppo.n_gpus_per_node * config.ppo.nnodes != world():
        fix = f"torchrun --nproc_per_node {config.ppo.n_gpus_per_node} self_model/rlhf/train_grpo.py --config ..., or engine: verl"
        yield "ppo.n_gpus_per_node", "TRL runs on as many processes as torchrun starts", fix
    if config.peft.enabled and not isinstance(config.peft.target_modules, str) and "lm_head" in config.peft.target_modules:
        yield "peft.target_modules", "TRL computes log-probabilities past an adapter on lm_head, which would never train", "leave lm_head out"


def inputs(config: RlhfConfig) -> dict[str, Path | None]:
    """Every file and folder that decides the result, functions of the user among them."""
    judge = local(config.reward_model_name_or_path) if config.reward_model_name_or_path else None
    return {**training_inputs(config, config.ppo), MODEL: judge, **reward_settings.files(config.rewards)}


def plan(config: RlhfConfig) -> Sequence[str]:
    """What `--dry-run` prints."""
    if config.engine == "verl":
        from . import verl

        return verl.plan(config)
    from .plan import Rows, lines

    p = config.ppo
    found, table = judged(config)
    total = rollouts.steps(config, len(found))
    layout = Rows(p.max_prompt_length + p.max_response_length, eager=config.attn_implementation == "eager", steps=total, share=p.max_response_length / config.sequence_length[1])
    backend = "vLLM" if p.rollout_backend == "vllm" and machine.gpus() else "transformers"
    made = rollouts.batches(config, 1)
    out = [f"{config.algorithm}: {len(found):,} prompts, {p.train_batch_size} a step, {p.rollout_n} answers to each by {backend}, {made.updates} updates a step"]
    out.append("batches, learning rate and passes are those of ppo:; of training_args the rest")
    out += lines(config, [(config.algorithm, "all", rollouts.arguments(config))], [p.train_file], peft=config.peft, layout=layout)
    return [*out, *table]


def judged(config: RlhfConfig) -> tuple[Any, list[str]]:
    """(The prompts that fit, the table of the rewards in words). A reward model is not loaded for a plan.

    Raises:
        SopError: where no prompt fits, or right answers earn no more than wrong ones.
    """
    from .prompts import read

    parts = reward_settings.parts(config.rewards)
    found = read(config.ppo.train_file, config.ppo.prompt_key, parts)
    if not parts:
        return found, ["rewards: the reward model alone; it judges samples when the run starts"]
    table = reward_lint.table(parts, found.kept)
    reward_lint.require(table, config.reward_lint)
    return found, table.lines()


def build(run: Run[RlhfConfig]) -> dict[str, Any]:
    """Learn with TRL, or let verl do it in its own environment."""
    if run.config.engine == "verl":
        from . import verl

        return verl.build(run)
    alone = dataclasses.replace(run, config=dataclasses.replace(run.config, auto_batch=False))
    return building(_train)(alone)


def summary(artifact: Artifact) -> list[str]:
    """The rewards before and after."""
    stats = artifact.stats
    if stats["engine"] == "verl":
        return [f"verl: {stats['steps']} steps; log: {artifact.path / 'verl.log'}"]
    lines = []
    if stats["reward_before"] and stats["reward_after"]:
        told = ", ".join(f"{name} {value:.3f} -> {stats['reward_after'][name]:.3f}" for name, value in stats["reward_before"].items())
        lines.append(f"mean reward on {stats['reward_on']} (greedy answers): {told}")
    if stats["reward_sampled_first"] is not None:
        lines.append(f"mean reward of sampled answers: {stats['reward_sampled_first']:.3f} -> {stats['reward_sampled_last']:.3f} in {stats['steps']} updates")
    return [*lines, f"answers with rewards: {artifact.path / rollouts.COMPLETIONS}", f"curves: {artifact.path / 'report.html'}"]


def following(config: RlhfConfig) -> str:
    """The next command."""
    folder = config.training_args["output_dir"]
    return f"sop train merge adapter={folder}" if config.peft.enabled and config.engine == "trl" else f"sop infer chat model={folder}"


USES = (
    *(key for key in alignment.USES if key != "data"), "ref_model_name_or_path", "reward_model_name_or_path", "loss_type", "ppo", "rewards", "reward_lint", "verl", "verl_python",
)  # fmt: skip

STAGE = Stage(
    name="train.grpo", version=1, config=RlhfConfig, output=RlhfConfig.target, build=build, disk=disk, inputs=inputs,
    preflight=lambda config: findings(config, "grpo"), plan=plan, uses=USES,
    summary=summary, next=following, resumable=True, apart=True,
)  # fmt: skip


def run(config: RlhfConfig) -> Artifact:
    """Learn from rewards (or find it up to date)."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop train grpo`"""
    from . import ranks

    return ranks.main(STAGE, _train, argv)
