"""DPO and its kin (KTO, ORPO, SimPO): the model learns from pairs of a better and a worse answer. The trainers are TRL's; rendering, checkpoints and record are ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..stage import Artifact, Stage
from ..tokenizer.settings import local
from . import alignment, preflight, rlhf
from .adapters import optimizer_groups
from .alignment import Prepared, located, prepare
from .finish import building, disk
from .rlhf import RlhfConfig
from .settings import training_inputs


def _train(config: RlhfConfig, work: Path) -> dict[str, Any]:
    from . import corpus, finish
    from .loop import Phase, train
    from .record import Record
    from .setup import told
    from .trl_trainers import Numbered, beta_of, kind_of, unpaired

    named = config.model_name_or_path
    config, commit = located(config)
    prepared = prepare(config, work)
    record = Record(work)
    size = 2 * int(config.training_args.get("per_device_eval_batch_size", 4))
    measures = prepared.held_out is not None and not config.sharded  # one device may not hold the model
    reference = _reference(config, prepared)
    start: Any = finish.remembered(work, "log_probs_before", lambda: log_probs(prepared.model, prepared, size)) if measures else None
    origin: Any = finish.remembered(work, "log_probs_reference", lambda: log_probs(reference, prepared, size)) if measures and config.ref_model_name_or_path else start
    dataset, evaluation = prepared.pairs.dataset, prepared.held_out.dataset if prepared.held_out else None
    if config.method == "kto":
        batch = int(config.training_args.get("per_device_train_batch_size", 8))
        dataset, evaluation = (unpaired(pairs, batch, config.seed) if pairs else None for pairs in (dataset, evaluation))
    phase = Phase(
        name=config.method, model=prepared.model, dataset=dataset, collator=Numbered(config.method, prepared.pad_id), arguments=config.training_args,
        precision=prepared.precision, seed=config.seed, groups=optimizer_groups(config.peft, config.training_args), evaluate=evaluation,
        name_of=prepared.pairs.names, reports=prepared.reports, deepspeed=config.deepspeed, fsdp=config.fsdp, stop_ids=prepared.renderer.stop_ids,
        kind=kind_of(config, prepared.tokenizer, _adapter(config, prepared), reference),
    )  # fmt: skip
    outcome = train(phase, work / "checkpoints", record)
    model = outcome["model"]
    beta = beta_of(config)
    stats = finish.stats(record, outcome, prepared.precision) | {
        "algorithm": config.method, "loss_type": list(config.losses) or None, "beta": beta, "reference": _described(config),
        **(_preferences(config, prepared, start, origin, log_probs(model, prepared, size), beta) if measures else {}),
        "rows": corpus.counts(prepared.pairs.meta), "eval_rows": corpus.counts(prepared.held_out.meta) if prepared.held_out else None,
        "template": prepared.renderer.name, "adapter": config.peft.enabled, "trainable": told(model, prepared.rows), "base_commit": commit,
    }  # fmt: skip
    return finish.leave(
        work, stats, title=f"Preference learning ({config.method})", model=model, tokenizer=prepared.tokenizer, renderer=prepared.renderer, config=config, outcome=outcome,
        reports=prepared.reports, base=(named, commit) if config.peft.enabled else None, loss="loss of a pair",
    )  # fmt: skip


def _adapter(config: RlhfConfig, prepared: Prepared) -> Any:
    from .adapters import adapter_config

    if not config.peft.enabled:
        return None
    return adapter_config(prepared.model, config.peft, prepared.rows)


def _reference(config: RlhfConfig, prepared: Prepared) -> Any:
    """A second model, where one is needed: another one was named, or every weight trains and the reference is not measured in advance."""
    from .model import load_model
    from .setup import place

    if config.method in ("orpo", "simpo"):
        return None
    alone = config.peft.enabled or config.data.precompute_ref_log_probs
    if config.ref_model_name_or_path is None and alone:
        return None
    source = config.ref_model_name_or_path or config.model_name_or_path
    model = load_model(source, dtype=str(prepared.model.dtype).removeprefix("torch."), attn_implementation=config.attn_implementation)
    place(model, config)
    return model


def _described(config: RlhfConfig) -> str:
    if config.method in ("orpo", "simpo"):
        return "none"
    how = "measured before training" if config.data.precompute_ref_log_probs else "beside the model"
    if config.ref_model_name_or_path:
        return f"another model, {how}"
    return "the model with its adapter off" if config.peft.enabled and not config.data.precompute_ref_log_probs else f"the model as it was, {how}"


def log_probs(model: Any, prepared: Prepared, size: int) -> list[list[float]]:
    """Summed log-probability in nats of both answers of every held-out pair, end markers included: `[pairs][chosen, rejected]`."""
    import torch

    def summed(model: Any, ids: Any, mask: Any, starts: Any) -> Any:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        picked = logits.gather(2, ids[:, 1:, None])[:, :, 0].float()
        every = torch.stack([row.float().logsumexp(-1) for row in logits])  # row by row: a whole batch in fp32 would double the memory
        positions = torch.arange(1, ids.shape[1], device=ids.device)[None]
        return ((picked - every) * ((positions >= starts[:, None]) & mask[:, 1:].bool())).sum(1)

    return alignment.measured(model, prepared, size, summed)


def _preferences(
    config: RlhfConfig, prepared: Prepared, start: Sequence[Sequence[float]], origin: Sequence[Sequence[float]], end: Sequence[Sequence[float]], beta: float
) -> dict[str, Any]:
    """Accuracy and margin of the reward that the method gives answers, before and after; and in how many pairs the chosen answer is the likelier one per token."""
    rows = prepared.held_out.dataset
    tokens = [[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in rows]

    def mean(values: Sequence[Sequence[float]]) -> list[list[float]]:
        return [[value / n for value, n in zip(pair, lengths, strict=True)] for pair, lengths in zip(values, tokens, strict=True)]

    def rewards(values: Sequence[Sequence[float]]) -> list[list[float]]:
        if config.method in ("orpo", "simpo"):
            return [[beta * value for value in pair] for pair in mean(values)]
        return [[beta * (value - old) for value, old in zip(pair, before, strict=True)] for pair, before in zip(values, origin, strict=True)]

    found: dict[str, Any] = {}
    for when, values in (("before", start), ("after", end)):
        found[f"eval_accuracy_{when}"], found[f"eval_margin_{when}"] = alignment.compared(rewards(values))
        found[f"eval_likelier_{when}"] = alignment.compared(mean(values))[0]
        for i, part in enumerate(("chosen", "rejected")):
            found[f"eval_logp_{part}_{when}"] = round(sum(pair[i] for pair in values) / sum(pair[i] for pair in tokens), 5)
    return found


# --- the stage -----------------------------------------------------------------------------------------------------------------------------------


def _preflight(config: RlhfConfig) -> list[rlhf.Finding]:
    found = [*preflight.shared(config, config.data.eval_file), *rlhf.fits_command(config, "dpo")]
    return found if rlhf.COMMANDS[config.algorithm] != "dpo" else [*found, *_rules(config)]


def _rules(config: RlhfConfig) -> Iterator[rlhf.Finding]:
    method, reference_free = config.method, config.method in ("orpo", "simpo")
    yield from rlhf.loss_findings(config)
    if config.beta is not None and config.beta <= 0:
        yield "beta", f"must be above 0, got {config.beta:g}", "0.1 is the usual value"
    if reference_free and config.ref_model_name_or_path:
        yield "ref_model_name_or_path", f"{method} has no reference model", "leave it out"
    if reference_free and config.data.precompute_ref_log_probs:
        yield "data.precompute_ref_log_probs", f"{method} has no reference model", "leave it out"
    if not reference_free and config.peft.enabled and config.peft.init in ("pissa", "olora"):
        yield "peft.init", f"{config.peft.init} changes the base weights, so the model without its adapter is no reference any more", "write init: default"
    if config.trl.get("sync_ref_model") and (config.peft.enabled or config.data.precompute_ref_log_probs):
        yield "trl.sync_ref_model", "needs a reference model of its own", "set peft.enabled: false and data.precompute_ref_log_probs: false"
    if method == "kto" and "apo_zero_unpaired" not in config.losses and int(config.training_args.get("per_device_train_batch_size", 8)) < 2:
        yield "training_args.per_device_train_batch_size", "kto compares the answers of a batch: it needs at least 2", "write 2 or more"
    if config.peft.enabled and "lm_head" in config.peft.target_modules and not isinstance(config.peft.target_modules, str):
        yield "peft.target_modules", "TRL computes log-probabilities past an adapter on lm_head, which would never train", "leave lm_head out"


def _inputs(config: RlhfConfig) -> dict[str, Path | None]:
    reference = config.ref_model_name_or_path
    return {**training_inputs(config), "reference": local(reference) if reference and reference != config.model_name_or_path else None}


def plan(config: RlhfConfig) -> Sequence[str]:
    """What `--dry-run` prints."""
    second = not config.peft.enabled and not config.data.precompute_ref_log_probs
    memory = "; a second model stands in memory beside these numbers" if config.method not in ("orpo", "simpo") and (config.ref_model_name_or_path or second) else ""
    return [*alignment.plan(config), f"reference: {_described(config)}{memory}"]


def _next(config: RlhfConfig) -> str:
    folder = config.training_args["output_dir"]
    return f"sop train merge adapter={folder}" if config.peft.enabled else f"sop infer chat model={folder}"


STAGE = Stage(
    name="train.dpo", version=1, config=RlhfConfig, output=RlhfConfig.target, build=building(_train), disk=disk, inputs=_inputs, preflight=_preflight, plan=plan,
    uses=(*alignment.USES, "ref_model_name_or_path", "beta", "loss_type", "loss_weights"), summary=alignment.summary, next=_next, resumable=True, apart=True,
)  # fmt: skip


def run(config: RlhfConfig) -> Artifact:
    """Learn preferences (or find it up to date)."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop train dpo`"""
    from . import ranks

    return ranks.main(STAGE, _train, argv)
