"""TRL's trainers of preferences, fed with pairs of token ids that this project rendered: no trainer renders, tokenises or cuts anything itself."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import adapters
from .loop import Kind, Phase, Watched
from .record import Record
from .rlhf import RlhfConfig

REFERENCE_FREE = ("orpo", "simpo", "reward")

# What a method gets where the config says nothing. SimPO is CPO's loss without its likelihood term; beta and gamma as its authors found them (arXiv 2405.14734, table 8).
_DEFAULTS: dict[str, dict[str, Any]] = {"simpo": {"cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}}


def beta_of(config: RlhfConfig) -> float:
    """The beta that the training takes: the config's, ours, or that of TRL's arguments."""
    default = _DEFAULTS.get(config.method, {}).get("beta")
    given = default if config.beta is None else config.beta
    return float(_classes(config.method)[1].beta if given is None else given)


def kind_of(config: RlhfConfig, tokenizer: Any, adapter: Any, reference: Any) -> Kind:
    """The trainer of `config.method`.

    Args:
        tokenizer: goes into checkpoints; TRL takes its padding token.
        adapter: peft's config, or None to train every weight.
        reference: a second model; None where the model itself, its adapter off, is the reference, or none is needed.
    """
    trainer, arguments = _classes(config.method)

    def make(phase: Phase, args: Any, record: Record, root: Path) -> Any:
        more = {} if config.method in REFERENCE_FREE else {"ref_model": reference}
        return _fed(trainer)(phase, args, record, root, processing_class=tokenizer, peft_config=adapter, **more)

    return Kind(arguments, _options(config), make)


def _classes(method: str) -> tuple[Any, Any]:
    import trl

    if method in ("orpo", "simpo"):
        import os

        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        if method == "orpo":
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

            return ORPOTrainer, ORPOConfig
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOTrainer, CPOConfig
    return {"dpo": (trl.DPOTrainer, trl.DPOConfig), "kto": (trl.KTOTrainer, trl.KTOConfig), "reward": (trl.RewardTrainer, trl.RewardConfig)}[method]


def _options(config: RlhfConfig) -> dict[str, Any]:
    """What goes into TRL's arguments besides training_args. Pairs are cut to length already."""
    method, losses = config.method, config.losses
    options: dict[str, Any] = {"max_length": config.data.max_length if method in ("orpo", "simpo") else None, **_DEFAULTS.get(method, {}), **config.trl}
    if config.beta is not None and method != "reward":
        options["beta"] = config.beta
    if method == "simpo":
        options["loss_type"] = "simpo"
    elif losses:
        options["loss_type"] = list(losses) if method == "dpo" else losses[0]
    if config.loss_weights is not None:
        options["loss_weights"] = list(config.loss_weights)
    if method not in REFERENCE_FREE:
        options["precompute_ref_log_probs"] = config.data.precompute_ref_log_probs
    return options


@functools.cache
def _fed(trainer: Any) -> Any:
    class Fed(Watched, trainer):  # type: ignore[misc]
        """TRL's trainer over batches that carry the numbers of their examples."""

        def __init__(self, phase: Phase, args: Any, record: Record, root: Path, **given: Any) -> None:
            self.phase, self.record, self.root = phase, record, root
            data = {"train_dataset": phase.dataset, "eval_dataset": phase.evaluate}
            if hasattr(trainer, "tokenize_row"):  # the older trainers map the rows of a dataset whatever is in them
                data = {key: _still()(rows.data) if rows is not None else None for key, rows in data.items()}
            super().__init__(model=phase.model, args=args, data_collator=phase.collator, **data, **given)
            self.watch()

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **options: Any) -> Any:
            adapters.give_bias(self.model)  # this happens while the trainer is made
            return super()._precompute_ref_logps(*args, **options)

        def _prepare_inputs(self, inputs: dict[str, Any]) -> Any:
            inputs.pop("examples", None)
            return super()._prepare_inputs(inputs)

        def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
            inputs.pop("examples", None)
            return super().compute_ref_log_probs(model, inputs)

        def counted(self, inputs: dict[str, Any]) -> list[int]:
            examples = [int(i) for i in inputs.pop("examples")]
            tokens = sum(int(v.sum()) for k, v in inputs.items() if k in ("attention_mask", "chosen_attention_mask", "rejected_attention_mask"))
            learned = sum(int(v.sum()) for k, v in inputs.items() if k == "completion_mask") + sum(int((v != -100).sum()) for k, v in inputs.items() if k.endswith("_labels"))
            self.record.count(tokens, learned or len(inputs["input_ids"]), len(examples))
            return examples

    return Fed


@functools.cache
def _still() -> Any:
    import datasets

    class Still(datasets.Dataset):  # type: ignore[misc]
        """Rows of token ids: who would tokenise them gets them as they are."""

        def map(self, *_: Any, **__: Any) -> Any:
            return self

    return Still


def _as_columns(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that the trainers of ORPO and CPO make out of text, made out of ids."""
    prompt = list(pair["prompt_ids"])
    columns: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for part in ("chosen", "rejected"):
        answer = list(pair[f"{part}_ids"])
        columns[f"{part}_input_ids"] = prompt + answer
        columns[f"{part}_attention_mask"] = [1] * (len(prompt) + len(answer))
        columns[f"{part}_labels"] = [-100] * len(prompt) + answer
    return columns


# --- batches and rows ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbered:
    """TRL's own collator for a method, with the numbers of the examples beside its tensors."""

    method: str
    pad_id: int

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """TRL's batch, and `examples` `[n]`."""
        import torch

        batch: dict[str, Any] = self._collate([self._fields(item) for item in items])
        return {**batch, "examples": torch.tensor([item["example"] for item in items])}

    def _fields(self, item: Mapping[str, Any]) -> dict[str, Any]:
        if self.method == "reward":  # a judge reads prompt and answer as one text
            return {"chosen_ids": [*item["prompt_ids"], *item["chosen_ids"]], "rejected_ids": [*item["prompt_ids"], *item["rejected_ids"]]}
        if self.method in ("orpo", "simpo"):
            return _as_columns(item)
        return {k: v for k, v in item.items() if k != "example"}

    @functools.cached_property
    def _collate(self) -> Any:
        if self.method in ("orpo", "simpo"):
            from trl.experimental.utils import DPODataCollatorWithPadding

            return DPODataCollatorWithPadding(pad_token_id=self.pad_id)
        if self.method == "kto":
            from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

            return DataCollatorForUnpairedPreference(pad_token_id=self.pad_id)
        if self.method == "reward":
            from trl.trainer.reward_trainer import DataCollatorForPreference as ForReward

            return ForReward(pad_token_id=self.pad_id)
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        return DataCollatorForPreference(pad_token_id=self.pad_id)


def unpaired(pairs: Any, batch: int, seed: int) -> Any:
    """Each pair as two rows, a good and a bad answer, in a seeded order: KTO's data.

    Beside each row stands the answer of the row before it in its batch (`KL_completion_ids`), with which TRL estimates the KL term; so the order is fixed here, once.

    Args:
        pairs: a dataset with the columns of `pairs.PairSet`.
        batch: rows of one device in one pass.
        seed: of the order.
    """
    import datasets
    import pyarrow as pa

    table = pairs.data.table
    halves = [
        pa.table({"prompt_ids": table["prompt_ids"], "completion_ids": table[f"{part}_ids"], "label": pa.array([good] * len(table)), "example": table["example"]})
        for part, good in (("chosen", True), ("rejected", False))
    ]
    order = list(range(2 * len(table)))
    random.Random(seed).shuffle(order)
    both = pa.concat_tables(halves).take(order)
    before = [first + (i - 1) % min(batch, len(order) - first) for first in range(0, len(order), batch) for i in range(min(batch, len(order) - first))]
    return datasets.Dataset(both.append_column("KL_completion_ids", both["completion_ids"].take(before)))
