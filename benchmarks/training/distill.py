"""Steps on the new rows alone, by the next-token loss or by token distillation: held-out bits per byte, and how far the states are from those that the old pieces give.

    python benchmarks/training/distill.py QUICKSTART WORK [--pulls] [--steps 60] [--arms next_token distill:0.03 distill:0.3]

QUICKSTART is the folder of a quickstart that has come to its expanded model (`expanded`, `process`); everything but the arm and the number of steps is as its first phase has it.
`distill:W` weighs the next-token loss by W; `next_token:N` takes N steps instead. CPU seconds are those of the whole command, imports included; the distance is that of the first
256 tokens of 12 held-out documents. What is in WORK is not trained again. `--pulls` trains nothing: it says how hard each part of the loss
pulls at the rows at the start, on two documents, and how many documents are spelled in base pieces as the base tokenizer writes them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from self_model_sop.eval.perplexity import bits_per_byte
from self_model_sop.train import distill
from self_model_sop.train.adapters import attach_rows, new_rows
from self_model_sop.train.batches import CausalCollator
from self_model_sop.train.model import load_model, load_tokenizer
from self_model_sop.train.packing import Item
from self_model_sop.train.tokens import Segment

ROOT = Path(__file__).resolve().parents[2]


def trained(quickstart: Path, out: Path, arm: str, steps: int) -> float:
    """Train the arm into `out`; CPU seconds."""
    name, _, value = arm.partition(":")
    phase: dict[str, Any] = {"name": "rows", "train": "new_rows", "objective": name, "max_steps": steps, "learning_rate": 3e-3}
    if value:
        phase["next_token_weight" if name == "distill" else "max_steps"] = float(value) if name == "distill" else int(value)
    given = {
        "model_name_or_path": quickstart / "expanded", "data.train_file": quickstart / "process/pretrain/train.jsonl", "data.block_size": 256, "phases": json.dumps([phase]),
        "training_args.per_device_train_batch_size": 2, "training_args.gradient_accumulation_steps": 1, "training_args.adam_beta2": 0.98, "training_args.output_dir": out,
    }  # fmt: skip
    settings = ["--config", str(ROOT / "config/self_model_config/pretrain.yaml"), *(f"{key}={value}" for key, value in given.items())]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "self_model_sop.cli", "train", "pretrain", *settings], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _collator(tokenizer: Any, new: range) -> distill.DistillCollator:
    return distill.DistillCollator(CausalCollator(0), distill.pieces_for(tokenizer, new))


def _item(tokenizer: Any, text: str, most: int = 256) -> Item:
    ids = np.array(tokenizer(text)["input_ids"][:most], np.int32)
    return Item([0], [Segment(ids, np.ones(len(ids), np.float16))], 0)


def pulls(quickstart: Path) -> str:
    """Distance and next-token loss before the training, and the norms of their gradients row by row."""
    folder = quickstart / "expanded"
    tokenizer, new = load_tokenizer(folder), new_rows(folder)
    assert new is not None
    model = attach_rows(load_model(folder), new)
    texts = [json.loads(line)["text"] for line in (quickstart / "process/pretrain/train.jsonl").read_text(encoding="utf-8").splitlines()]
    collator, body, base = _collator(tokenizer, new), distill.body_of(model), load_tokenizer(quickstart / "model")
    spelled = sum(collator.spelled(np.array(tokenizer(text)["input_ids"], np.int32))[0].tolist() == base(text)["input_ids"] for text in texts)
    batch = collator([_item(tokenizer, text) for text in texts[:2]])
    teacher, compared = distill.targets(body, batch, contextlib.nullcontext)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "labels")}
    with distill.watched(body) as seen:
        next_token = model(**inputs, use_cache=False).loss
    away = distill.distance(seen[0], teacher, compared) / (batch["labels"] != -100).sum()
    rows = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first, second = (torch.cat([g.norm(dim=1) for g in torch.autograd.grad(loss, rows, retain_graph=True, allow_unused=True) if g is not None]) for loss in (away, next_token))
    read = first > 0
    quotient = float((first / second)[read].median())
    return (
        f"distance {float(away):.3f}, next-token loss {float(next_token):.2f}, quotient {float(away / next_token):.3f}; "
        f"gradients of the {int(read.sum())} rows that are read: {float(first.norm()):.3f} and {float(second[read].norm()):.2f}, median quotient {quotient:.3f}; "
        f"{spelled} of {len(texts)} documents spelled as the base writes them"
    )


def distance(model: Any, tokenizer: Any, new: range, texts: list[str]) -> float:
    """Mean over the compared positions of the beginnings of `texts`."""
    collator, body, sums = _collator(tokenizer, new), distill.body_of(model), [0.0, 0]
    for text in texts:
        batch = collator([_item(tokenizer, text)])
        teacher, compared = distill.targets(body, batch, contextlib.nullcontext)
        with torch.no_grad(), distill.watched(body) as seen:
            body(input_ids=batch["input_ids"], use_cache=False)
        sums = [sums[0] + float(distill.distance(seen[0], teacher, compared)), sums[1] + int(compared.sum())]
    return sums[0] / sums[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--arms", nargs="+", default=["next_token", "distill:0.03", "distill:0.3"])
    parser.add_argument("--pulls", action="store_true")
    args = parser.parse_args()
    if args.pulls:
        print(pulls(args.quickstart))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    texts = [json.loads(line)["text"] for line in (args.quickstart / "process/pretrain/validation.jsonl").read_text(encoding="utf-8").splitlines()]
    path = args.work / "found.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    print("| trained by | bits per byte | distance | CPU s |\n|---|---|---|---|")
    for arm in ["before", *args.arms]:
        if arm not in found:
            folder = args.quickstart / "expanded" if arm == "before" else args.work / arm.replace(":", "-")
            seconds = 0.0 if arm == "before" else trained(args.quickstart, folder, arm, args.steps)
            model, tokenizer, new = load_model(folder, dtype="bfloat16"), load_tokenizer(folder), new_rows(folder)
            assert new is not None
            bits = bits_per_byte(model, tokenizer, texts, window=2048, batch_size=1).bits_per_byte
            found[arm] = {"bits_per_byte": bits, "distance": distance(model, tokenizer, new, texts[:12]), "cpu_s": seconds}
            path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"| {arm} | {found[arm]['bits_per_byte']:.3f} | {found[arm]['distance']:.3f} | {found[arm]['cpu_s']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
