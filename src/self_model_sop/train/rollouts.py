"""GRPO and RLOO by TRL's trainers over prompts that this project rendered, judged by its rewards: no trainer renders or tokenises anything itself."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import errors
from ..errors import SopError
from . import adapters, ranks, rewards
from .loop import Kind, Phase, Watched
from .prompts import Prompt, Prompts
from .record import Record
from .rewards import Part, Unscored
from .rlhf import RlhfConfig

COMPLETIONS = "completions.jsonl"
GRPO_LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")  # what TRL 1.16 compares loss_type with
_LOGGED = 100  # generations of which one prompt's answers are kept, spread over the run

Finding = tuple[str, str, str]


# --- how many of what ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batches:
    """The batches of `ppo:` in the words of a trainer.

    Args:
        micro: answers in one pass of one device.
        accumulation: passes of one update.
        answers: answers written at once, over all devices.
        updates: updates made of them.
    """

    micro: int
    accumulation: int
    answers: int
    updates: int


def batches(config: RlhfConfig, devices: int) -> Batches:
    """What `findings` has accepted."""
    p = config.ppo
    return Batches(p.ppo_micro_batch_size_per_gpu, p.ppo_mini_batch_size * p.rollout_n // (p.ppo_micro_batch_size_per_gpu * devices), p.train_batch_size * p.rollout_n,
                   p.train_batch_size // p.ppo_mini_batch_size)  # fmt: skip


def findings(config: RlhfConfig, devices: int) -> Iterator[Finding]:
    """Batches that cannot be divided, with the nearest that can."""
    p = config.ppo
    if p.rollout_n < 2:
        yield "ppo.rollout_n", f"{p.rollout_n}: {config.algorithm} compares the answers to one prompt, so it needs at least 2", "write 4 or 8"
    if p.train_batch_size % p.ppo_mini_batch_size:
        fix = f"write {_divisor(p.train_batch_size, p.ppo_mini_batch_size)}"
        yield "ppo.ppo_mini_batch_size", f"{p.train_batch_size} prompts of a step cannot be split into updates of {p.ppo_mini_batch_size}", fix
    answers = p.ppo_mini_batch_size * p.rollout_n
    if answers % (p.ppo_micro_batch_size_per_gpu * devices):
        share = answers // devices if answers % devices == 0 else 0
        fix = f"write {_divisor(share, p.ppo_micro_batch_size_per_gpu)}" if share else f"make ppo_mini_batch_size x rollout_n a multiple of {devices}, the number of devices"
        where = f" on {devices} devices" if devices > 1 else ""
        what = f"an update has {p.ppo_mini_batch_size} x {p.rollout_n} = {answers} answers, which passes of {p.ppo_micro_batch_size_per_gpu}{where} do not fill"
        yield "ppo.ppo_micro_batch_size_per_gpu", what, fix


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(d for d in range(min(most, number), 0, -1) if number % d == 0)


def arguments(config: RlhfConfig, devices: int = 1) -> dict[str, Any]:
    """training_args with the batches, the learning rate and the passes of `ppo:`."""
    made = batches(config, devices)
    ours = {"per_device_train_batch_size": made.micro, "gradient_accumulation_steps": made.accumulation}
    return {**config.training_args, **ours, "learning_rate": config.ppo.actor_lr, "num_train_epochs": config.ppo.total_epochs}


def steps(config: RlhfConfig, prompts: int) -> int:
    """Updates of a run: whole batches of prompts, each answered once."""
    given = int(config.training_args.get("max_steps", -1))
    return given if given > 0 else prompts // config.ppo.train_batch_size * (config.ppo.train_batch_size // config.ppo.ppo_mini_batch_size) * config.ppo.total_epochs


def options(config: RlhfConfig, parts: Sequence[Part], *, vllm: bool) -> dict[str, Any]:
    """What goes into TRL's arguments besides training_args."""
    p = config.ppo
    loss = {"loss_type": config.losses[0]} if config.losses else {}
    served = {"use_vllm": True, "vllm_tensor_parallel_size": p.rollout_tp} if vllm else {}
    return {
        "num_generations": p.rollout_n, "generation_batch_size": batches(config, ranks.world()).answers, "max_completion_length": p.max_response_length,
        "beta": p.kl_loss_coef if p.use_kl_loss else 0.0, "reward_weights": [part.weight for part in parts], **served, **loss, **config.trl,
    }  # fmt: skip


# --- the trainer -----------------------------------------------------------------------------------------------------------------------------


def dataset(prompts: Prompts) -> Any:
    """What TRL reads: the number of each prompt as its text (the trainer asks `ids` for its tokens), and again for the rewards."""
    import datasets

    numbers = range(len(prompts))
    return datasets.Dataset.from_dict({"prompt": [str(i) for i in numbers], "example": list(numbers)})


def kind_of(config: RlhfConfig, tokenizer: Any, adapter: Any, prompts: Prompts, parts: Sequence[Part], *, vllm: bool) -> Kind:
    """The trainer of `config.algorithm`.

    Args:
        tokenizer: decodes answers; it tokenises nothing.
        adapter: peft's config, or None to train every weight.
    """
    import trl

    trainer, arguments = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}[config.algorithm]

    def make(phase: Phase, args: Any, record: Record, root: Path) -> Any:
        return _rolled(trainer)(phase, args, record, root, prompts, parts, processing_class=tokenizer, peft_config=adapter)

    return Kind(arguments, options(config, parts, vllm=vllm), make)


@functools.cache
def _rolled(trainer: Any) -> Any:
    class Rolled(Watched, trainer):  # type: ignore[misc]
        """TRL's trainer over prompts by number, with a sample of the answers and their rewards kept on disk."""

        def __init__(self, phase: Phase, args: Any, record: Record, root: Path, prompts: Prompts, parts: Sequence[Part], **given: Any) -> None:
            self.phase, self.record, self.root = phase, record, root
            self.prompts, self.parts, self.sampled = prompts, parts, Completions(root.parent / COMPLETIONS, phase.name, _LOGGED)
            functions = [function(part, prompts) for part in parts]
            super().__init__(model=phase.model, args=args, reward_funcs=functions, train_dataset=phase.dataset, **given)
            adapters.give_bias(self.model)
            self.watch()
            self._resumed = False

        def _tokenize_prompts(self, prompts: Sequence[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [self.prompts.kept[int(number)].ids for number in prompts], None, {}

        def _get_train_sampler(self, *args: Any) -> Any:
            """TRL's own order; but a resumed run takes up that of its epoch, where TRL's sampler would start with the first one again."""
            import torch

            sampler = super()._get_train_sampler(*args)

            def set_epoch(epoch: int) -> None:
                sampler.generator.manual_seed(sampler.seed)
                for _ in range(epoch):
                    torch.randperm(sampler.num_samples, generator=sampler.generator)

            if sampler.shuffle:
                sampler.set_epoch = set_epoch
            return sampler

        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            if not self._resumed:  # TRL counts passes from 0 after a resume, and would write answers in the middle of a batch
                self._step = self.state.global_step * self.args.gradient_accumulation_steps
                self.sampled.begin(self.state.global_step, self.state.max_steps)
                self._resumed = True
            try:
                return super().training_step(model, inputs, *args)
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                return self._not_finite(math.nan, self.counted(inputs))  # the weights broke in the update before: nothing can be sampled

        def counted(self, inputs: Any) -> list[int]:
            return sorted({int(row["example"]) for row in inputs})

        def _prepare_inputs(self, inputs: Any) -> Any:
            made = super()._prepare_inputs(inputs)
            if isinstance(made, dict) and "completion_mask" in made:
                learned = int(made["completion_mask"].sum())
                self.record.count(int(made["prompt_mask"].sum()) + learned, learned, len(made["completion_mask"]))
            return made

        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Sequence[str], ids: Any) -> Any:
            found = super()._calculate_rewards(inputs, prompts, completions, ids)
            if ranks.is_main():
                same = [i for i, row in enumerate(inputs) if row["example"] == inputs[0]["example"]]
                self.sampled.write(self.state.global_step, self.prompts.kept[inputs[0]["example"]], [completions[i] for i in same], [found[i].tolist() for i in same], self.parts)
            return found

    return Rolled


def function(part: Part, prompts: Prompts) -> Callable[..., list[float]]:
    """A summand as TRL calls it: all answers of a batch at once."""

    def judged(completions: Sequence[str], example: Sequence[int], **_: Any) -> list[float]:
        rows = [prompts.kept[i] for i in example]
        return score([part], completions, rows)[part.name]

    judged.__name__ = part.name
    return judged


def score(parts: Sequence[Part], answers: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, list[float]]:
    """What each summand gives each answer.

    Raises:
        SopError: exit 3, with the row on which a function failed.
    """
    out: dict[str, list[float]] = {}
    for part in parts:
        if isinstance(part, Judged):
            out[part.name] = part.batch(answers, [prompt.row for prompt in prompts])
            continue
        values = out.setdefault(part.name, [])
        for answer, prompt in zip(answers, prompts, strict=True):
            try:
                values.append(rewards.each([part], answer, prompt.row)[part.name])
            except Unscored as error:
                raise SopError(f"a reward failed: {error}", where=prompt.source, fix=f"the answer was {answer[:80]!r}", code=errors.DATA) from error
    return out


@dataclass(frozen=True)
class Judged(Part):
    """The summand of a reward model, which judges many answers at once."""

    batch: Callable[[Sequence[str], Sequence[Mapping[str, Any]]], list[float]] = lambda answers, rows: []


def judged_by(source: str, weight: float, name: str, batch_size: int, *, hub: Any = None) -> Judged:
    """The reward model of a folder as a summand.

    Raises:
        SopError: where it is no reward model.
    """
    from .reward import load_judge

    judge = load_judge(source, hub)

    def batch(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        spoken = [answer if answer.strip() else "…" for answer in answers]  # it judges no empty turn
        talks = [[*row["prompt"], {"role": "assistant", "content": answer}] for answer, row in zip(spoken, rows, strict=True)]
        return judge.score(talks, batch_size=batch_size)

    return Judged(name, weight, lambda answer, row: batch([answer], [row])[0], True, batch)


# --- what is kept of the answers -------------------------------------------------------------------------------------------------------------


class Completions:
    """`completions.jsonl`: answers to one prompt of a generation with their rewards; lines of steps after a checkpoint go when a run resumes there."""

    def __init__(self, path: Path, phase: str, most: int) -> None:
        self.path, self.phase, self._most, self._every, self._last = path, phase, most, 1, -1

    def begin(self, step: int, steps: int) -> None:
        """A run starts or resumes after `step`."""
        self._every = max(1, math.ceil(steps / self._most))
        if ranks.is_main():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step] if step and self.path.exists() else []
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, step: int, prompt: Prompt, answers: Sequence[str], values: Sequence[Sequence[float]], parts: Sequence[Part]) -> None:
        """The answers that the update after `step` learns from; one line each."""
        if step == self._last or step % self._every:
            return
        self._last = step
        with self.path.open("a", encoding="utf-8") as f:
            for answer, row in zip(answers, values, strict=True):
                scores = {part.name: round(value, 4) for part, value in zip(parts, row, strict=True)}
                line = {"step": step + 1, "source": prompt.source, "prompt": prompt.row["prompt"][-1]["content"], "ground_truth": prompt.row["ground_truth"], "answer": answer}
                f.write(json.dumps({**line, "reward": round(rewards.total(parts, scores), 4), "rewards": scores}, ensure_ascii=False) + "\n")


# --- measuring -------------------------------------------------------------------------------------------------------------------------------


def mean_reward(model: Any, prompts: Sequence[Prompt], parts: Sequence[Part], tokenizer: Any, stop: Sequence[int], *, length: int, size: int, autocast: Any) -> dict[str, float]:
    """The mean of each reward and of their weighted `sum` on the model's most likely (greedy) answers.

    Args:
        length: tokens of an answer at most.
        size: answers written at once.
    """
    answers = greedy(model, [p.ids for p in prompts], tokenizer, stop, length=length, size=size, autocast=autocast)
    found = score(parts, answers, prompts)
    sums = [rewards.total(parts, {part.name: found[part.name][i] for part in parts}) for i in range(len(prompts))]
    return {name: float(f"{fmean(values):.6g}") for name, values in {**found, "sum": sums}.items()}


def greedy(model: Any, prompts: Sequence[Sequence[int]], tokenizer: Any, stop: Sequence[int], *, length: int, size: int, autocast: Any) -> list[str]:
    """The most likely answer to each prompt (token ids), in the order of the prompts."""
    import torch
    from transformers import GenerationConfig

    pad, device = tokenizer.pad_token_id, next(model.parameters()).device
    settings = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=list(stop), pad_token_id=pad, use_cache=True)
    order, found = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [""] * len(prompts)
    training = model.training
    model.eval()
    with torch.no_grad(), autocast():
        for first in range(0, len(order), size):
            places = order[first : first + size]
            width = max(len(prompts[i]) for i in places)
            ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in places], device=device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in places], device=device)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for place, row in zip(places, out[:, width:].tolist(), strict=True):
                end = next((i for i, token in enumerate(row) if token in stop), len(row))
                found[place] = tokenizer.decode(row[:end], skip_special_tokens=True)
    model.train(training)
    return found
