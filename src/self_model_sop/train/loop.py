"""One training phase: transformers.Trainer over our batches, with verified checkpoints, a clean stop on signals, and a loss that must stay finite."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import errors
from ..console import note
from ..errors import Interrupted, SopError
from . import checkpoint, finish, machine, ranks
from .adapters import Group, give_bias
from .precision import Precision
from .record import Record
from .setup import count
from .trace import guard


@dataclass(frozen=True)
class Kind:
    """A trainer of another library, driven by the same loop.

    Args:
        arguments: its class of arguments, derived from TrainingArguments.
        options: what is set in it besides training_args.
        make: (phase, arguments, record, checkpoint folder) -> the trainer; its class has `Watched` before the library's.
    """

    arguments: Any
    options: Mapping[str, Any]
    make: Callable[[Phase, Any, Record, Path], Any]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one call of `train` does.

    Args:
        name: written into checkpoints, so that a later phase never resumes from an earlier one's.
        model: a transformers or peft model; what has `requires_grad` is trained.
        dataset: items of packing.Item; `sequential` ones are read in order.
        collator: items -> tensors.
        next_token_weight: of the next-token loss, where the collator is one of distillation.
        arguments: keys of TrainingArguments.
        groups: substring of a parameter's name -> what its optimizer group has of its own.
        pull: gradient of a row whose token a step holds once, times the step's tokens, in units of a state's coordinate.
        evaluate: dataset whose loss per supervised token is measured where `eval_strategy` says.
        name_of: example numbers -> where they came from, for error messages.
        stop_ids: go into the generation config where the loop itself saves the result (sharded weights).
        kind: another trainer than this project's own.
    """

    name: str
    model: Any
    dataset: Any
    collator: Callable[[Sequence[Any]], dict[str, Any]]
    arguments: Mapping[str, Any]
    precision: Precision
    seed: int
    sequential: bool = False
    next_token_weight: float = 1.0
    groups: Mapping[str, Group] = field(default_factory=dict)
    pull: float = 1.0
    evaluate: Any = None
    name_of: Callable[[Sequence[int]], list[str]] = lambda indices: [str(i) for i in indices]
    reports: Sequence[str] = ()
    patience: int | None = None
    deepspeed: Path | None = None
    fsdp: Path | None = None
    stop_ids: Sequence[int] = ()
    kind: Kind | None = None


def train(phase: Phase, root: Path, record: Record) -> dict[str, Any]:
    """Train, resuming from the last verified checkpoint of this phase below `root`; returns `{steps, resumed_from, best, batch, saved, model}`.

    Raises:
        Interrupted: stopped by SIGTERM or SIGINT, with a checkpoint written (exit 143 or 130).
        SopError: loss not finite (exit 3).
    """
    root.mkdir(parents=True, exist_ok=True)
    resumed = ranks.share(checkpoint.latest(root, phase.name) if ranks.is_main() else None)
    record.begin(phase.name, resumed.marker if resumed else None)
    make = phase.kind.make if phase.kind else _trainer_class()
    trainer = make(phase, _arguments(phase, root, has_eval=phase.evaluate is not None), record, root)
    _require_sharding(phase, trainer)
    record.peak_tokens_per_s = _peak_tokens_per_s(trainer.model)
    with _signals() as stop:
        trainer.add_callback(_flow_class()(trainer, record, root, stop))
        trainer.train(resume_from_checkpoint=str(resumed.folder) if resumed else None)
    record.end(trainer.state.global_step, trainer.state.max_steps)
    if stop.signal and trainer.state.global_step < trainer.state.max_steps:
        name = signal.Signals(stop.signal).name
        raise Interrupted(
            f"stopped by {name} after step {trainer.state.global_step} of {trainer.state.max_steps}; its checkpoint is saved",
            code=128 + stop.signal, fix="the same command resumes there",
        )  # fmt: skip
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded:  # collective: every rank gives its part, rank 0 writes
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if ranks.is_main():
            finish.save_model(trainer.accelerator.unwrap_model(trainer.model), root.parent, stop_ids=list(phase.stop_ids), weights=weights)
    batch = {"per_device": trainer.args.per_device_train_batch_size, "accumulation": trainer.args.gradient_accumulation_steps, "processes": trainer.args.world_size}
    resumed_from = resumed.step if resumed else None
    done = {"steps": trainer.state.global_step, "resumed_from": resumed_from, "best": trainer.state.best_metric, "batch": batch, "saved": sharded}
    return {**done, "model": trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)}  # without the autocast that accelerate wraps around its forward


def _peak_tokens_per_s(model: Any) -> float | None:
    """Tokens per second at which all GPUs would work at their peak in half precision: 6 operations a token and weight, 4 where most weights are frozen (PaLM, arXiv 2204.02311)."""
    import torch

    peak = machine.peak_flops(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None
    if peak is None:
        return None
    counts = count(model)
    return peak * ranks.world() / (counts["total"] * (4 if counts["trainable"] < counts["total"] / 2 else 6))


def _require_sharding(phase: Phase, trainer: Any) -> None:
    """The library quietly falls back to whole copies on every process where it cannot shard (on CPUs, or with a single process)."""
    wanted = {"fsdp": (phase.fsdp, trainer.is_fsdp_enabled), "deepspeed": (phase.deepspeed, trainer.is_deepspeed_enabled)}
    for key, (path, active) in wanted.items():
        if path and not active:
            kind = trainer.accelerator.distributed_type.value
            fix = f"start it with torchrun on at least two GPUs, or leave `{key}` out"
            raise SopError(f"{key}: the weights would not be sharded here (accelerate runs {kind})", where=str(path), fix=fix, code=errors.ENVIRONMENT)


def _arguments(phase: Phase, root: Path, *, has_eval: bool) -> Any:
    import torch
    import transformers

    from .arguments import known

    given = {k: int(v) if isinstance(v, float) and v.is_integer() and "float" not in known()[k].types else v for k, v in phase.arguments.items() if k not in ("fp16", "bf16")}
    ours = {
        "output_dir": str(root), "report_to": list(phase.reports) or "none", "disable_tqdm": True, "remove_unused_columns": False, "logging_nan_inf_filter": False,
        "save_total_limit": None, "seed": phase.seed, **(phase.kind.options if phase.kind else {"label_names": ["labels"]}), **phase.precision.flags,
    }  # fmt: skip
    gpu = torch.cuda.is_available()
    defaults = {"run_name": f"{root.parent.parent.name}-{phase.name}", "logging_steps": 5, "logging_first_step": True, "dataloader_pin_memory": gpu, "use_cpu": not gpu}
    defaults |= {"gradient_checkpointing": False}  # TRL's own default is the slower way
    if not has_eval:
        ours["eval_strategy"] = "no"
    if phase.deepspeed:
        ours["deepspeed"] = str(phase.deepspeed)
    if phase.fsdp:
        ours |= {"fsdp": True, "fsdp_config": json.loads(phase.fsdp.read_text(encoding="utf-8"))}
    kind = phase.kind.arguments if phase.kind else transformers.TrainingArguments
    return kind(**{**defaults, **given, **ours})


class Watched:
    """Mixed in before a library's trainer: tokens are counted, groups of parameters have learning rates of their own, and the loss must stay finite."""

    phase: Phase
    record: Record
    root: Path
    args: Any
    state: Any
    model: Any
    optimizer: Any

    def watch(self) -> None:
        """Called after the trainer's own start: it prints nothing more, and its trackers cannot raise."""
        import transformers

        self.remove_callback(transformers.PrinterCallback)  # type: ignore[attr-defined]
        guard(self.callback_handler.callbacks, self.phase.reports)  # type: ignore[attr-defined]
        give_bias(self.model)

    def create_optimizer(self, *args: Any) -> Any:
        """The library's own, but where a group that is trained has something of its own."""
        if self.optimizer is None and self.phase.groups:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[attr-defined]
            own = {part: self._own(group, options) for part, group in self.phase.groups.items()}
            groups = self._groups({part: values for part, values in own.items() if values})
            if any(group.keys() - {"params", "weight_decay"} for group in groups):
                self.optimizer = kind(groups, **options)
        return super().create_optimizer(*args)  # type: ignore[misc]

    def _groups(self, own: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(self.model))  # type: ignore[attr-defined]
        groups: dict[tuple[str | None, bool], list[Any]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                part = next((part for part in own if part in name), None)
                groups.setdefault((part, name in decayed), []).append(parameter)
        return [
            {"params": parameters, "weight_decay": self.args.weight_decay if decay else 0.0, **(own[part] if part else {})}
            for (part, decay), parameters in groups.items()
        ]

    def _own(self, group: Group, options: Mapping[str, Any]) -> dict[str, float]:
        """What a group has of its own, in the optimizer's words; an epsilon where the optimizer is one of Adam's kind."""
        own = {} if group.learning_rate is None else {"lr": group.learning_rate}
        epsilon = group.epsilon
        if epsilon == "auto":
            epsilon = self.phase.pull / self._learned_in_a_step() if self.phase.kind is None and self.phase.pull else None
        if epsilon is not None and isinstance(options.get("eps"), float):
            own["eps"] = epsilon
        elif group.epsilon not in (None, "auto"):
            fix = "leave the epsilon of new rows out, or choose adamw_torch"
            raise SopError(f"optim {self.args.optim.value} has no epsilon", where="training_args.optim", fix=fix)
        return own

    def _learned_in_a_step(self) -> float:
        """Tokens that an optimiser step learns from, on average over up to 64 items of the data; the same after a resumption."""
        items = self.phase.dataset
        spread = range(0, len(items), max(1, len(items) // 64))
        learned = sum(float(segment.weights.sum(dtype="float64")) for i in spread for segment in items[i].segments) / len(spread)
        each = int(self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size)
        return max(1.0, learned * each)

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
        import torch

        examples = self.counted(inputs)
        loss = super().training_step(model, inputs, *args)  # type: ignore[misc]
        if not torch.isfinite(loss):
            self._not_finite(float(loss), examples)
        return loss

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """TRL writes one beside every checkpoint; a model card is a step of its own."""

    def _send_telemetry(self) -> None:
        """TRL reports every training to its makers; this project reports to nobody."""

    def counted(self, inputs: Any) -> list[int]:
        """Take out of a batch what no model reads, count it, and answer the numbers of its examples."""
        examples, tokens = inputs.pop("examples"), inputs.pop("tokens")
        self.record.count(int(tokens), int((inputs["labels"] != -100).sum()), len(examples))
        return [int(i) for i in examples]

    def _not_finite(self, loss: float, examples: list[int]) -> None:
        names = self.phase.name_of(examples)
        path = self.root.parent / "not_finite.json"
        step = self.state.global_step + 1
        path.write_text(json.dumps({"phase": self.phase.name, "step": step, "loss": str(loss), "records": names}, ensure_ascii=False, indent=1), encoding="utf-8")
        raise SopError(
            f"the loss became {loss} at step {step}; the records of its batch: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else ""),
            where=str(path), fix="lower learning_rate, set max_grad_norm: 1.0, add warmup_steps, or use precision: fp32", code=errors.DATA,
        )  # fmt: skip


@functools.cache
def _trainer_class() -> Any:
    """The subclass is made on first use, so that importing this module stays light."""
    import torch
    import transformers

    from . import distill
    from .batches import MaskedCollator

    class MeasuredTrainer(Watched, transformers.Trainer):  # type: ignore[misc]
        """transformers.Trainer with evaluation per supervised token."""

        control: Any

        def __init__(self, phase: Phase, args: Any, record: Record, root: Path) -> None:
            self.phase, self.record, self.root = phase, record, root
            self.parts, self.since = None, 0  # distance and next-token loss, summed since a step
            callbacks = [transformers.EarlyStoppingCallback(phase.patience)] if phase.patience else None
            super().__init__(model=phase.model, args=args, data_collator=phase.collator, train_dataset=phase.dataset, eval_dataset=phase.evaluate, callbacks=callbacks)
            self.watch()

        def _get_train_sampler(self, *args: Any) -> Any:
            if self.phase.sequential:
                return torch.utils.data.SequentialSampler(self.train_dataset)
            return super()._get_train_sampler(*args)

        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            if isinstance(self.phase.collator, distill.DistillCollator):
                return self._distilled(model, inputs, num_items_in_batch)
            if isinstance(self.phase.collator, MaskedCollator):  # masked models ignore num_items_in_batch: with accumulation their own loss would count several times
                inputs |= {"weights": (inputs["labels"] != -100).float(), "shift_labels": inputs["labels"]}
            if "weights" not in inputs:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            weights, labels = inputs.pop("weights"), inputs.pop("labels")
            shifted = inputs.pop("shift_labels", None)
            outputs = model(**inputs)
            loss = weighted_loss(outputs.logits, labels, weights, shifted, num_items_in_batch)
            loss = loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss
            return (loss, outputs) if return_outputs else loss

        def _distilled(self, model: Any, inputs: dict[str, Any], items: Any) -> Any:
            """The distance from the teacher for each learned token of the whole step, and the next-token loss by its weight."""
            body = distill.body_of(self.model)
            teacher, compared = distill.targets(body, inputs, self.accelerator.autocast)
            learned = (inputs["labels"] != -100).sum().clamp(min=1) if items is None else items
            with distill.watched(body) as seen:
                next_token = super().compute_loss(model, inputs, num_items_in_batch=items)
            scale = self.accelerator.num_processes if items is not None and self.args.average_tokens_across_devices else 1
            away = distill.distance(seen[0], teacher, compared) / learned * scale
            if self.parts is None:
                self.parts, self.since = torch.zeros(2, device=away.device), self.state.global_step
            self.parts += torch.stack([away.detach(), next_token.detach()])
            return away + self.phase.next_token_weight * next_token

        def log(self, logs: dict[str, float], *args: Any) -> None:
            if self.parts is not None and "loss" in logs:  # the loss in the record is that of next tokens in every phase
                parts = self.accelerator.reduce(self.parts, "mean") / max(self.state.global_step - self.since, 1)
                logs["distance"], logs["loss"], self.parts = float(parts[0]), float(parts[1]), None
            super().log(logs, *args)

        def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
            data = self.eval_dataset if eval_dataset is None else eval_dataset
            loss, tokens = supervised_loss(self.model, data, self.data_collator, batch_size=self.args.per_device_eval_batch_size, autocast=self.compute_loss_context_manager)
            metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_tokens": float(tokens)}
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return MeasuredTrainer


def supervised_loss(
    model: Any, dataset: Any, collator: Callable[[Sequence[Any]], dict[str, Any]], *, batch_size: int, autocast: Callable[[], Any] = contextlib.nullcontext
) -> tuple[float, int]:
    """Mean loss in nats per supervised token, and how many tokens that is; every token weighs the same, whatever its batch.

    Under several processes each measures its share and the sums are added; all take the same number of passes, since sharded weights are gathered together.
    """
    import torch
    import torch.distributed as dist

    spread = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    device = next(p.device for p in model.parameters())
    sums = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for first in range(0, len(dataset), batch_size * world):
            start = first + rank * batch_size
            mine = start < len(dataset)
            if not mine:
                start = 0  # this pass only takes part in the gathering; it is not counted
            batch = collator([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
            for key in ("examples", "tokens", "weights"):
                batch.pop(key, None)
            labels = batch["labels"] if "shift_labels" in batch or "attention_mask" in batch else batch["labels"][:, 1:]
            inputs = {k: v.to(device) for k, v in batch.items()}
            with autocast():
                sums += torch.tensor([float(_summed(model, inputs)), float((labels != -100).sum())], dtype=torch.float64) * mine
    model.train(was_training)
    if spread:
        sums = sums.to(device if device.type == "cuda" else "cpu")
        dist.all_reduce(sums)
    return float(sums[0] / sums[1]) if sums[1] else float("nan"), int(sums[1])


def _summed(model: Any, inputs: dict[str, Any]) -> Any:
    """The loss of a batch, summed over its learned tokens."""
    import torch

    if "attention_mask" not in inputs:
        return model(**inputs, num_items_in_batch=1, use_cache=False).loss
    labels = inputs.pop("labels")  # masked models average by themselves, whatever they are asked for
    logits = model(**inputs).logits.float()
    return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=-100, reduction="sum")


def weighted_loss(logits: Any, labels: Any, weights: Any, shifted: Any, items: Any) -> Any:
    """Cross-entropy of each learned token times its weight, summed and divided by the number of learned tokens of the whole step (`items`).

    Args:
        logits: `[rows, width, vocabulary]`, or of the kept positions only.
        labels: `[rows, width]`, -100 where nothing is learned.
        weights: shape of the labels.
        shifted: labels that are shifted already, one for each logit; else labels and weights are shifted here.
        items: a number; None: the learned tokens of this batch. Of a step without any, the loss is 0.
    """
    import torch

    if shifted is None:
        labels, weights = (torch.nn.functional.pad(t[:, 1:], (0, 1), value=fill) for t, fill in ((labels, -100), (weights, 0)))
    each = torch.nn.functional.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100, reduction="none")
    count = torch.as_tensor(items, device=each.device) if items is not None else (labels != -100).sum()
    return (each * weights.reshape(-1)).sum() / count.clamp(min=1)


@dataclass
class _Stop:
    signal: int = 0


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """SIGTERM and SIGINT ask for a stop at the end of the step; a second one stops at once."""
    stop = _Stop()

    def ask(number: int, frame: object) -> None:
        if stop.signal:
            raise Interrupted("stopped at once; the last complete checkpoint is kept", code=128 + number)
        stop.signal = number
        note(f"{signal.Signals(number).name}: stopping after this step with a checkpoint (again: at once)")

    earlier = {}
    with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
        for number in (signal.SIGTERM, signal.SIGINT):
            earlier[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@functools.cache
def _flow_class() -> Any:
    import transformers

    class Flow(transformers.TrainerCallback):  # type: ignore[misc]
        """Marks checkpoints complete, writes the record, and stops at a step's end when a signal asks for it."""

        def __init__(self, trainer: Any, record: Record, root: Path, stop: _Stop) -> None:
            self.trainer, self.record, self.root, self.stop = trainer, record, root, stop
            self.keep = int(trainer.phase.arguments.get("save_total_limit") or 2)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.record.start(state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.record.step(state.global_step)
            finished = state.global_step >= state.max_steps
            if self._asked() and not finished:
                control.should_save = control.should_training_stop = True
            if finished and not args.load_best_model_at_end:
                control.should_save = False  # the result itself is written next

        def _asked(self) -> bool:
            import torch
            import torch.distributed as dist

            if not (dist.is_available() and dist.is_initialized()):
                return bool(self.stop.signal)
            flag = torch.tensor([self.stop.signal], device=self.trainer.args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.stop.signal = int(flag)
            return bool(self.stop.signal)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= state.max_steps and not args.load_best_model_at_end:
                control.should_save = False

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            self.record.gather()
            self.record.log(state.global_step, logs or {})

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.record.gather()
            ranks.barrier()  # each rank has written its random state
            if not args.should_save:
                return
            folder = self.root / f"checkpoint-{state.global_step}"
            checkpoint.mark_complete(folder, phase=self.trainer.phase.name, step=state.global_step, **self.record.totals())
            checkpoint.prune(self.root, self.keep, state.best_model_checkpoint)

    return Flow
