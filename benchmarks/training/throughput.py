"""Real (not padding) tokens per CPU second of a LoRA fine-tuning: ours beside plain transformers.Trainer, TRL, LLaMA-Factory and ms-swift.

    python benchmarks/training/throughput.py prepare MODEL DATA.jsonl WORK [--rows 30] [--max_length 512]
    PYTHON benchmarks/training/throughput.py run TOOL WORK       # in the environment of the tool (envs/llamafactory.txt, envs/ms-swift.txt); prints a line of JSON
    python benchmarks/training/throughput.py table WORK          # the lines of WORK/results.jsonl as Markdown

Every tool gets the same rows once (one epoch), the same rank, batch, learning rate and seed, in fp32. The libraries in this environment get the same ids and labels;
LLaMA-Factory and ms-swift tokenise the conversations themselves. What is measured is transformers.Trainer.train(), which all of them end in: CPU seconds of the process, and
the tokens that go through training_step.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK, ALPHA, BATCH, RATE, SEED = 8, 16, 3, 5e-4, 42
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj"]


# --- the same data for all --------------------------------------------------------------------------------------------------------------------


def prepare(model: str, data: str, work: Path, rows: int, max_length: int) -> None:
    """`tokens.jsonl` (ids and labels), `chats.json` (sharegpt) and what every run is set to."""
    from self_model_sop.data.formats import to_messages
    from self_model_sop.train.model import load_tokenizer
    from self_model_sop.train.template import renderer_for

    work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(model)
    renderer = renderer_for(tokenizer)
    lines = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()[:rows]]
    system = re.search(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", tokenizer.decode(renderer.render(to_messages(lines[0])).ids), re.DOTALL)
    if system:  # the template's default, said in the data: other tools bring templates with another
        for line in lines:
            line["conversations"] = [{"from": "system", "value": system[1]}, *line["conversations"]]
    with (work / "tokens.jsonl").open("w", encoding="utf-8") as f:
        for line in lines:
            rendered = renderer.render(to_messages(line))
            f.write(json.dumps({"input_ids": rendered.ids[:max_length], "labels": rendered.labels[:max_length]}) + "\n")
    (work / "chats.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    (work / "messages.jsonl").write_text("".join(json.dumps({"messages": to_messages(line)}, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    listed = {"file_name": "chats.jsonl", "formatting": "sharegpt", "columns": {"messages": "conversations"}}
    (work / "dataset_info.json").write_text(json.dumps({"chats": listed}))
    (work / "settings.json").write_text(json.dumps({"model": str(Path(model).resolve()), "max_length": max_length, "rows": rows}))


# --- what is measured -------------------------------------------------------------------------------------------------------------------------


class Meter:
    """CPU seconds, wall seconds and real tokens inside transformers.Trainer.train()."""

    def __init__(self) -> None:
        import transformers

        self.cpu = self.wall = 0.0
        self.tokens = self.positions = 0
        self.losses: list[float] = []
        train, step = transformers.Trainer.train, transformers.Trainer.training_step

        def timed(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            cpu, wall = time.process_time(), time.perf_counter()
            done = train(trainer, *args, **kwargs)
            self.cpu, self.wall = time.process_time() - cpu, time.perf_counter() - wall
            self.losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
            return done

        def counted(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.positions += inputs["input_ids"].numel()
            if mask is not None and mask.dim() == 4:  # who sees whom: a real token sees itself, padding nothing
                mask = mask.diagonal(dim1=-2, dim2=-1)[:, 0]
                mask = mask if not mask.is_floating_point() else mask == 0
            self.tokens += int((mask != 0).sum()) if mask is not None else inputs["input_ids"].numel()
            return step(trainer, model, inputs, *args, **kwargs)

        transformers.Trainer.train, transformers.Trainer.training_step = timed, counted


def arguments(out: Path, **more: Any) -> dict[str, Any]:
    """What every TrainingArguments gets."""
    return {
        "output_dir": str(out), "per_device_train_batch_size": BATCH, "num_train_epochs": 1, "learning_rate": RATE, "lr_scheduler_type": "linear", "weight_decay": 0.0,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": SEED, "use_cpu": True, "disable_tqdm": True, "bf16": False, "fp16": False, **more,
    }  # fmt: skip


def _model(settings: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(settings["model"], dtype="float32"), AutoTokenizer.from_pretrained(settings["model"])


def _lora() -> Any:
    import peft

    return peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LAYERS)


def _dataset(work: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_list([json.loads(line) for line in (work / "tokens.jsonl").read_text().splitlines()])


# --- the tools --------------------------------------------------------------------------------------------------------------------------------


def ours(work: Path, settings: dict[str, Any], **data: Any) -> int:
    from self_model_sop.config import Setting, load
    from self_model_sop.train.sft import STAGE, SftConfig

    out = work / "out" / "_".join(map(str, data.values()))
    shutil.rmtree(out, ignore_errors=True)  # else it is up to date, and there is nothing to measure
    given = {
        "model_name_or_path": settings["model"], "data.train_file": str(work / "chats.jsonl"), "data.max_length": settings["max_length"], "precision": "fp32", "seed": SEED,
        "peft.lora_r": RANK, "peft.lora_alpha": float(ALPHA), "peft.target_modules": LAYERS, "training_args.output_dir": str(out),
        **{f"training_args.{k}": v for k, v in arguments(work).items() if k in ("num_train_epochs", "learning_rate", "lr_scheduler_type", "weight_decay", "logging_steps")},
        "training_args.per_device_train_batch_size": BATCH, **{f"data.{k}": v for k, v in data.items()},
    }  # fmt: skip
    batch = given.pop("data.batch", None)
    if batch:
        given["training_args.per_device_train_batch_size"] = batch
    config = load(SftConfig, None, [Setting(k, v, "benchmark", Path.cwd()) for k, v in given.items()]).config
    return int(STAGE.run(config).stats["tokens"])


def plain(work: Path, settings: dict[str, Any]) -> None:
    """transformers.Trainer with every row padded to the maximal length."""
    import peft
    import torch
    import transformers

    model, tokenizer = _model(settings)
    length, pad = settings["max_length"], tokenizer.pad_token_id

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        fill = {"input_ids": pad, "labels": -100}
        batch = {key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows]) for key, value in fill.items()}
        batch["attention_mask"] = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
        return batch

    model = peft.get_peft_model(model, _lora())
    transformers.Trainer(model, transformers.TrainingArguments(**arguments(work / "out")), collate, _dataset(work)).train()


def trl(work: Path, settings: dict[str, Any], **options: Any) -> None:
    import trl as library

    model, tokenizer = _model(settings)
    config = library.SFTConfig(**{**arguments(work / "out"), "max_length": settings["max_length"], "gradient_checkpointing": False, **options})
    library.SFTTrainer(model, config, train_dataset=_dataset(work), processing_class=tokenizer, peft_config=_lora()).train()


def llamafactory(work: Path, settings: dict[str, Any], **options: Any) -> None:
    if importlib.util.find_spec("torchaudio") is None:  # imported for audio by a module that text goes through too; the index has no build of it for CPUs
        sys.modules["torchaudio"] = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("torchaudio", None))
    from llamafactory.train.tuner import run_exp

    out = work / "out" / "llamafactory"
    shutil.rmtree(out, ignore_errors=True)
    run_exp({
        **arguments(out), "stage": "sft", "do_train": True, "finetuning_type": "lora", "model_name_or_path": settings["model"], "template": "chatml", "dataset": "chats",
        "dataset_dir": str(work), "cutoff_len": settings["max_length"], "lora_rank": RANK, "lora_alpha": ALPHA, "lora_target": ",".join(LAYERS), "overwrite_cache": True,
        "disable_gradient_checkpointing": True, **options,
    })  # fmt: skip


def swift(work: Path, settings: dict[str, Any], **options: Any) -> None:
    try:
        from swift import sft_main
    except ImportError:
        from swift.llm import sft_main

    given = {
        **{k: v for k, v in arguments(work / "out").items() if k not in ("disable_tqdm", "bf16", "fp16")}, "model": settings["model"], "dataset": str(work / "messages.jsonl"),
        "max_length": settings["max_length"], "lora_rank": RANK, "lora_alpha": ALPHA, "target_modules": LAYERS, "torch_dtype": "float32", "split_dataset_ratio": 0,
        "lora_dropout": 0, "truncation_strategy": "right", "gradient_accumulation_steps": 1,
        "model_type": "llama", "template": "chatml", "gradient_checkpointing": False, "attn_impl": "sdpa", "dataset_num_proc": 1, "warmup_ratio": 0, **options,
    }  # fmt: skip
    argv = []
    for key, value in given.items():
        argv += [f"--{key}", *map(str, value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value])]
    sft_main(argv)


TOOLS: dict[str, tuple[str, Callable[[Path, dict[str, Any]], int | None]]] = {
    "ours, compact": ("self-model-sop", lambda w, s: ours(w, s, batching="compact")),
    "ours, packed": ("self-model-sop", lambda w, s: ours(w, s, packing=True, batch=2)),
    "ours, padding-free": ("self-model-sop", lambda w, s: ours(w, s, batching="padding_free")),
    "Trainer, padded to the maximum": ("transformers", plain),
    "TRL, packed": ("trl", lambda w, s: trl(w, s, packing=True, per_device_train_batch_size=2)),
    "TRL, padding-free": ("trl", lambda w, s: trl(w, s, padding_free=True, max_length=None)),
    "LLaMA-Factory": ("llamafactory", llamafactory),
    "LLaMA-Factory, packed": ("llamafactory", lambda w, s: llamafactory(w, s, packing=True, neat_packing=True, per_device_train_batch_size=2)),
    "ms-swift": ("ms-swift", swift),
}


def run(tool: str, work: Path) -> None:
    """One measurement, appended to WORK/results.jsonl."""
    import torch

    package, call = TOOLS[tool]
    settings = json.loads((work / "settings.json").read_text())
    meter = Meter()
    counted = call(work, settings)
    tokens = counted or meter.tokens
    half = len(meter.losses) // 2
    found = {
        "tool": tool, "version": importlib.metadata.version(package), "transformers": importlib.metadata.version("transformers"), "threads": torch.get_num_threads(),
        "steps": len(meter.losses), "tokens": tokens, "positions": meter.positions, "cpu_s": round(meter.cpu, 1), "wall_s": round(meter.wall, 1),
        "tokens_per_cpu_s": round(tokens / meter.cpu, 1), "first_loss": round(meter.losses[0], 4),
        "loss_of_second_half": round(sum(meter.losses[half:]) / (len(meter.losses) - half), 4),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }  # fmt: skip
    with (work / "results.jsonl").open("a") as f:
        f.write(json.dumps(found) + "\n")
    print(json.dumps(found))


def table(work: Path) -> None:
    lines = [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]
    print("| tool | version | steps | real tokens | of all positions | CPU s | real tokens per CPU s | peak MiB | loss: first step | second half |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in lines:
        numbers = [f"{r['tokens']:,}", f"{r['tokens'] / r['positions']:.0%}", r["cpu_s"], r["tokens_per_cpu_s"], f"{r['peak_mib']:,}", r["first_loss"], r["loss_of_second_half"]]
        print("| " + " | ".join(map(str, [r["tool"], r["version"], r["steps"], *numbers])) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("model")
    first.add_argument("data")
    first.add_argument("work", type=Path)
    first.add_argument("--rows", type=int, default=30)
    first.add_argument("--max_length", type=int, default=512)
    second = commands.add_parser("run")
    second.add_argument("tool", choices=list(TOOLS))
    second.add_argument("work", type=Path)
    third = commands.add_parser("table")
    third.add_argument("work", type=Path)
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # some tools read the command line themselves
    if args.command == "prepare":
        prepare(args.model, args.data, args.work, args.rows, args.max_length)
    elif args.command == "run":
        run(args.tool, args.work.resolve())
    else:
        table(args.work)


if __name__ == "__main__":
    main()
