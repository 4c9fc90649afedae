"""A reward model: one number for an answer, learned from pairs (Bradley-Terry). The trainer is TRL's; rendering, checkpoints and record are ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import errors
from ..errors import SopError
from ..hub import HubConfig
from ..stage import Artifact, Stage
from . import alignment, preflight, rlhf
from .adapters import optimizer_groups
from .alignment import Prepared, located, prepare
from .finish import building, disk
from .rlhf import RlhfConfig
from .settings import training_inputs

_MERGED_BOUND = 1e-3  # largest difference of scores before and after merging, relative to the largest score


def _train(config: RlhfConfig, work: Path) -> dict[str, Any]:
    from . import corpus, finish
    from .adapters import adapter_config
    from .loop import Phase, train
    from .record import Record
    from .setup import told
    from .trl_trainers import Numbered, kind_of

    named = config.model_name_or_path
    config, commit = located(config)
    prepared = prepare(config, work, kind="score", num_labels=1)
    model = prepared.model
    model.config.get_text_config().pad_token_id = prepared.pad_id  # the model scores at the last token that is no padding
    record = Record(work)
    size = 2 * int(config.training_args.get("per_device_eval_batch_size", 4))
    measures = prepared.held_out is not None and not config.sharded  # one device may not hold the model
    before: Any = finish.remembered(work, "scores_before", lambda: scores(model, prepared, size)) if measures else None
    phase = Phase(
        name="reward", model=model, dataset=prepared.pairs.dataset, collator=Numbered("reward", prepared.pad_id), arguments=config.training_args, precision=prepared.precision,
        seed=config.seed, groups=optimizer_groups(config.peft, config.training_args), evaluate=prepared.held_out.dataset if prepared.held_out else None,
        name_of=prepared.pairs.names, reports=prepared.reports, deepspeed=config.deepspeed, fsdp=config.fsdp,
        kind=kind_of(config, prepared.tokenizer, adapter_config(model, config.peft, prepared.rows, task="SEQ_CLS") if config.peft.enabled else None, None),
    )  # fmt: skip
    outcome = train(phase, work / "checkpoints", record)
    model, counts = outcome["model"], told(outcome["model"], prepared.rows)
    merges = config.peft.enabled and config.merge and not (outcome["saved"] or config.peft.qlora)  # nothing merges into 4 bits without loss
    after: Any = scores(model, prepared, size) if measures else None
    if merges:
        model = _merged(model, prepared)
    stats = finish.stats(record, outcome, prepared.precision) | {
        "algorithm": "reward", **(_preferences(before, after) if measures else {}),
        "rows": corpus.counts(prepared.pairs.meta), "eval_rows": corpus.counts(prepared.held_out.meta) if prepared.held_out else None,
        "template": prepared.renderer.name, "adapter": config.peft.enabled and not merges, "trainable": counts, "base_commit": commit,
    }  # fmt: skip
    return finish.leave(
        work, stats, title="Reward model", model=model, tokenizer=prepared.tokenizer, renderer=prepared.renderer, config=config, outcome=outcome, reports=prepared.reports,
        base=(named, commit) if config.peft.enabled and not merges else None, loss="loss of a pair",
    )  # fmt: skip


def scores(model: Any, prepared: Prepared, size: int) -> list[list[float]]:
    """The score of both answers of every held-out pair: `[pairs][chosen, rejected]`."""
    return alignment.measured(model, prepared, size, lambda model, ids, mask, _: model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float())


def _merged(model: Any, prepared: Prepared) -> Any:
    """The model with its adapter merged in, proven in fp32 on a few pairs.

    Raises:
        SopError: where it scores differently (exit 3).
    """
    rows = (prepared.held_out or prepared.pairs).dataset
    texts = [row["prompt_ids"] + row[f"{part}_ids"] for row in rows.select(range(min(len(rows), 4))) for part in ("chosen", "rejected")]
    model = model.float()  # on a GPU the frozen weights may be bf16
    wanted = _one_by_one(model, texts)
    merged = model.merge_and_unload()
    difference = max(abs(a - b) for a, b in zip(_one_by_one(merged, texts), wanted, strict=True))
    if not difference <= _MERGED_BOUND * max(1.0, *map(abs, wanted)):
        what = f"the merged reward model scores differently from model and adapter (by {difference:.2g})"
        raise SopError(what, fix="write merge: false to keep the adapter apart, and please report this", code=errors.DATA)
    return merged


def _one_by_one(model: Any, texts: Sequence[list[int]]) -> list[float]:
    import torch

    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, 0]) for ids in texts]


def _preferences(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Accuracy and margin of the scores before and after, and where scores lie at the end."""
    found: dict[str, Any] = {}
    for when, values in (("before", before), ("after", after)):
        found[f"eval_accuracy_{when}"], found[f"eval_margin_{when}"] = alignment.compared(values)
    every = [score for pair in after for score in pair]
    return {**found, "eval_score_least": min(every), "eval_score_mean": round(sum(every) / len(every), 5), "eval_score_most": max(every)}


# --- using it ------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """A reward model that scores conversations; made by `load_judge`."""

    model: Any
    tokenizer: Any
    renderer: Any

    def score(self, conversations: Sequence[Sequence[Mapping[str, Any]]], *, batch_size: int = 8) -> list[float]:
        """One number for each conversation's last answer; larger is better, and only differences within a question mean anything.

        Raises:
            TemplateError: where a conversation cannot be rendered.
            SopError: where one does not end with an answer.
        """
        import torch

        ids = [_closed(self.renderer, messages) for messages in conversations]
        order, found = sorted(range(len(ids)), key=lambda i: len(ids[i])), [0.0] * len(ids)
        device, pad = next(self.model.parameters()).device, int(self.model.config.get_text_config().pad_token_id)
        with torch.no_grad():
            for first in range(0, len(order), batch_size):
                places = order[first : first + batch_size]
                width = max(len(ids[i]) for i in places)
                rows = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in places], device=device)
                mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in places], device=device)
                values = self.model(input_ids=rows, attention_mask=mask, use_cache=False).logits[:, 0].float().tolist()
                for place, value in zip(places, values, strict=True):
                    found[place] = value
        return found


def _closed(renderer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Ids of a conversation up to and with the end marker of its last answer: what the reward model was trained on."""
    rendered = renderer.render(messages)
    learned = [i for i, on in enumerate(rendered.supervised) if on]
    if messages[-1]["role"] != "assistant" or not learned:
        raise SopError("a reward model judges answers: the conversation must end with an assistant turn", code=errors.DATA)
    return list(rendered.ids[: learned[-1] + 1])


def load_judge(source: str | Path, hub: HubConfig | None = None, *, dtype: str = "float32") -> Judge:
    """The reward model of a folder or hub id, whole or as an adapter.

    Raises:
        SopError: where it is no model with one score.
    """
    from .model import base_folder, is_adapter, load_model, load_tokenizer, put_adapter
    from .template import renderer_for

    tokenizer = load_tokenizer(source, hub)
    adapter = is_adapter(source)
    model = load_model(base_folder(source, hub) if adapter else source, hub, kind="score", dtype=dtype, **({"num_labels": 1} if adapter else {}))
    if adapter:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model = put_adapter(model, source).eval()
    _require_one_score(model, source)
    return Judge(model, tokenizer, renderer_for(tokenizer, train_on="last"))


def _require_one_score(model: Any, source: str | Path) -> None:
    named = any(str(name).endswith("ForSequenceClassification") for name in model.config.architectures or ["ForSequenceClassification"])
    if model.config.num_labels != 1 or (not named and not hasattr(model, "peft_config")):
        raise SopError("this is no reward model: it gives no single score", where=str(source), fix="train one: sop train reward algorithm=reward")
    if model.config.get_text_config().pad_token_id is None:
        raise SopError("the reward model's config names no padding token, so it cannot tell where an answer ends", where=str(source), fix="set pad_token_id in its config.json")


# --- the stage -----------------------------------------------------------------------------------------------------------------------------------


def _preflight(config: RlhfConfig) -> list[rlhf.Finding]:
    return [*preflight.shared(config, config.data.eval_file), *rlhf.fits_command(config, "reward")]


def plan(config: RlhfConfig) -> Sequence[str]:
    """What `--dry-run` prints."""
    return alignment.plan(config)


def _next(config: RlhfConfig) -> str:
    return f"sop train grpo algorithm=grpo reward_model_name_or_path={config.training_args['output_dir']} training_args.output_dir=self_model/checkpoints/grpo"


STAGE = Stage(
    name="train.reward", version=1, config=RlhfConfig, output=RlhfConfig.target, build=building(_train), disk=disk, inputs=training_inputs, preflight=_preflight, plan=plan,
    uses=(*alignment.USES, "merge"), summary=alignment.summary, next=_next, resumable=True, apart=True,
)  # fmt: skip


def run(config: RlhfConfig) -> Artifact:
    """Train a reward model (or find it up to date)."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop train reward`"""
    from . import ranks

    return ranks.main(STAGE, _train, argv)
