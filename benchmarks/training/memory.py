"""What `--dry-run` says a training will take beside what it took: peak resident set of the whole process, through the real command, each run in a process of its own.

    python benchmarks/training/memory.py MODEL_FOLDER TEXTS.jsonl CHATS.jsonl [--steps 3] [--only NAME]
    python benchmarks/training/memory.py --saved

The rows are full (blocks, or packed conversations): the estimate is for rows of the length that is set.
`--saved` counts what a layer of SmolLM2's shape keeps for its backward pass, beside the formula of train/plan.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# name -> (command, settings)
RUNS: dict[str, tuple[str, list[str]]] = {
    "every weight, 2 x 256": ("pretrain", ["data.block_size=256", "training_args.per_device_train_batch_size=2"]),
    "every weight, 4 x 256": ("pretrain", ["data.block_size=256", "training_args.per_device_train_batch_size=4"]),
    "every weight, 2 x 512": ("pretrain", ["data.block_size=512", "training_args.per_device_train_batch_size=2"]),
    "every weight, 4 x 256, checkpointing": (
        "pretrain", ["data.block_size=256", "training_args.per_device_train_batch_size=4", "training_args.gradient_checkpointing=true"]
    ),
    "LoRA on attention, 2 x 512": ("sft", ["data.packing=true", "data.max_length=512", "training_args.per_device_train_batch_size=2"]),
    "LoRA on every layer, 4 x 512": ("sft", ["data.packing=true", "data.max_length=512", "training_args.per_device_train_batch_size=4", "peft.target_modules=all-linear"]),
}  # fmt: skip


def measure(name: str, model: Path, texts: Path, chats: Path, steps: int) -> dict[str, object]:
    """Estimate and measured peak of one run, MiB."""
    command, settings = RUNS[name]
    with tempfile.TemporaryDirectory() as work:
        empty = Path(work, "empty.yaml")
        empty.touch()
        data = chats if command == "sft" else texts
        phases = [f"phases=[{{name: full, max_steps: {steps}}}]"] if command == "pretrain" else [f"training_args.max_steps={steps}"]
        common = [f"model_name_or_path={model}", f"data.train_file={data}", f"training_args.output_dir={work}/out", "training_args.logging_steps=1", *phases, *settings]
        argv = [sys.executable, "-m", "self_model_sop.cli", "train", command, "--config", str(empty), *common]
        plan = subprocess.run([*argv, "--dry-run"], capture_output=True, text=True, check=True).stdout
        estimate = float(re.search(r"memory: .* = ([\d.]+) GiB", plan)[1]) * 1024  # type: ignore[index]
        subprocess.run(argv, capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
        manifest = json.loads(Path(work, "out", "manifest.json").read_text())
    peak = float(manifest["peak_memory_mib"])
    return {"run": name, "estimate_mib": round(estimate), "peak_mib": round(peak), "off_by": round(estimate / peak - 1, 3), "tokens": manifest["stats"]["tokens"]}


def saved(*, lora: object = None, packed: bool = False) -> tuple[float, float]:
    """(counted, estimated) floats that one layer keeps of one token: what a model of two layers saves more than a model of one."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from self_model_sop.train.adapters import PeftSettings
    from self_model_sop.train.plan import Rows, Shape, _kept

    hidden, intermediate, heads, groups, width = 576, 1536, 9, 3, 256
    sums = []
    for layers in (1, 2):
        config = LlamaConfig(
            vocab_size=1000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
            tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM(config).train()
        if lora:
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=lora))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, weights: set[int] = weights, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.zeros((1, width), dtype=torch.long)
        positions = {"position_ids": torch.cat([torch.arange(width // 2)] * 2)[None]} if packed else {}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            held = model(input_ids=ids, labels=ids, use_cache=False, **positions)
        sums.append(sum(kept.values()))
        del held
    settings = PeftSettings(target_modules=tuple(lora) if isinstance(lora, list) else lora) if lora else None  # type: ignore[arg-type]
    shape = Shape(0, 0, 1, hidden, intermediate, heads, hidden * groups // heads, 1000, 0)
    return (sums[1] - sums[0]) / width / 4, _kept(shape, Rows(width, packed=packed), width, settings, frozen=bool(lora))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("texts", type=Path, nargs="?")
    parser.add_argument("chats", type=Path, nargs="?")
    parser.add_argument("--saved", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only")
    args = parser.parse_args()
    if args.saved:
        for lora in (None, ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear"):
            for packed in (False, True):
                counted, estimated = saved(lora=lora, packed=packed)
                off = round(estimated / counted - 1, 3)
                print(json.dumps({"trained": lora or "every weight", "packed": packed, "floats_a_token": counted, "estimate": estimated, "off_by": off}))
        return
    for name in [args.only] if args.only else RUNS:
        print(json.dumps(measure(name, args.model.resolve(), args.texts.resolve(), args.chats.resolve(), args.steps)), flush=True)


if __name__ == "__main__":
    main()
