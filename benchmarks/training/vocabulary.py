"""Does an expanded vocabulary pay? Two models of one base, the same training FLOPs: expanded, pretrained and fine-tuned, beside fine-tuned alone with all of them.

    python benchmarks/training/vocabulary.py QUICKSTART DATA.jsonl WORK [--sft_tokens 28000] [--held_out 60]

QUICKSTART is the folder of a finished quickstart: its `model` (the base) and `pretrain` (expanded and pretrained; its FLOPs are counted from its own record). DATA are
conversations; those longer than 512 tokens of the base are left out, so that none is cut, and the same held-out ones are measured for both. Every weight is trained, with the
same settings. FLOPs: 2 a token and weight for the forward pass, 2 for the activations' gradients, 2 for the weights' where they are trained; the output layer only where a
token is learned; attention scores are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH, LENGTH = 8, 512


@dataclass(frozen=True)
class Arm:
    """A model and what its tokenizer makes of the data: tokens and learned tokens of the training rows (in all) and of the held-out ones."""

    folder: Path
    rows: int
    tokens: int
    learned: int
    held_out_learned: int
    body: int
    head: int

    def flops(self, tokens: float, learned: float, each: int = 6) -> float:
        return each * (tokens * self.body + learned * self.head)


def _weights(folder: Path) -> tuple[int, int]:
    """Weights of the layers, and of the (tied) output layer."""
    from self_model_sop.train.plan import shape_of

    shape = shape_of(folder)
    assert shape
    return shape.parameters - shape.embedding, shape.embedding


def _messages(line: str) -> list[dict[str, Any]]:
    from self_model_sop.data.formats import to_messages

    return to_messages(json.loads(line))


def split(base: Path, data: Path, work: Path, held_out: int) -> tuple[Path, Path, int]:
    """Training and held-out rows by content hash, those that fit; and the bytes of the held-out answers."""
    from self_model_sop.train.model import load_tokenizer
    from self_model_sop.train.template import renderer_for

    renderer = renderer_for(load_tokenizer(base))
    lines = sorted((x for x in data.read_text(encoding="utf-8").splitlines() if x), key=lambda x: hashlib.sha256(x.encode()).digest())
    fitting = [line for line in lines if len(renderer.render(_messages(line)).ids) <= LENGTH]
    paths = work / "train.jsonl", work / "held_out.jsonl"
    for path, chosen in zip(paths, (fitting[held_out:], fitting[:held_out]), strict=True):
        path.write_text("".join(line + "\n" for line in chosen), encoding="utf-8")
    return *paths, sum(len(m["content"].encode()) for line in fitting[:held_out] for m in _messages(line) if m["role"] == "assistant")


def arm(folder: Path, train: Path, held_out: Path) -> Arm:
    from self_model_sop.train.model import load_tokenizer
    from self_model_sop.train.template import renderer_for

    renderer = renderer_for(load_tokenizer(folder))
    rendered = [[renderer.render(_messages(line)) for line in path.read_text(encoding="utf-8").splitlines()] for path in (train, held_out)]
    learned = [sum(sum(r.supervised[1:]) for r in part) for part in rendered]
    body, head = _weights(folder)
    return Arm(folder, len(rendered[0]), sum(len(r.ids) for r in rendered[0]), learned[0], learned[1], body, head)


def pretraining(folder: Path, body: int, head: int) -> tuple[float, int, float]:
    """(FLOPs, tokens, seconds) of a finished pretraining, from its record: a phase that trains new rows alone needs no gradient of the layers' weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    flops, before = 0.0, 0
    phases = json.loads((folder / "manifest.json").read_text())["config"]["phases"]
    for phase in phases:
        tokens = max(line["tokens"] for line in lines if line["phase"] == phase["name"]) - before
        flops += (4 if phase["train"] == "new_rows" else 6) * tokens * (body + head)
        before += tokens
    return flops, before, lines[-1]["seconds"]


def finetune(name: str, model: Path, work: Path, steps: int) -> dict[str, Any]:
    """`sop train sft` on every weight; the stats of its manifest."""
    (work / "empty.yaml").touch()
    settings = {
        "model_name_or_path": model, "data.train_file": work / "train.jsonl", "data.eval_file": work / "held_out.jsonl", "data.max_length": LENGTH, "peft.enabled": "false",
        "precision": "fp32", "training_args.output_dir": work / name, "training_args.max_steps": steps, "training_args.per_device_train_batch_size": BATCH // 2,
        "training_args.gradient_accumulation_steps": 2, "training_args.learning_rate": 2e-4, "training_args.lr_scheduler_type": "cosine", "training_args.warmup_steps": 0.1,
        "training_args.logging_steps": 5, "training_args.adam_beta2": 0.98, "training_args.per_device_eval_batch_size": 4, "training_args.save_strategy": "no",
    }  # fmt: skip
    argv = [sys.executable, "-m", "self_model_sop.cli", "train", "sft", "--config", str(work / "empty.yaml"), *(f"{k}={v}" for k, v in settings.items())]
    subprocess.run(argv, check=True, env=os.environ)
    return dict(json.loads((work / name / "manifest.json").read_text())["stats"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sft_tokens", type=int, default=28_000)
    parser.add_argument("--held_out", type=int, default=60)
    parser.add_argument("--plan", action="store_true", help="count, train nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    base, grown = args.quickstart.resolve() / "model", args.quickstart.resolve() / "pretrain"
    train, held_out, answer_bytes = split(base, args.data, args.work, args.held_out)
    plain, expanded = arm(base, train, held_out), arm(grown, train, held_out)
    spent, cpt_tokens, cpt_seconds = pretraining(grown, expanded.body, expanded.head)
    steps = round(args.sft_tokens / (expanded.tokens / expanded.rows) / BATCH)
    share = steps * BATCH / expanded.rows
    budget = spent + expanded.flops(expanded.tokens * share, expanded.learned * share)
    more = round(budget / plain.flops(plain.tokens / plain.rows, plain.learned / plain.rows) / BATCH)
    print(json.dumps({"rows": plain.rows, "steps": [steps, more], "tokens_per_row": [round(a.tokens / a.rows) for a in (expanded, plain)], "pretraining_flops": f"{spent:.3g}",
                      "expected_tokens": [round(expanded.tokens * share), round(plain.tokens * more * BATCH / plain.rows)]}), flush=True)  # fmt: skip
    if args.plan:
        return
    found = []
    for name, side, count, extra in (("expanded", expanded, steps, (spent, cpt_tokens, cpt_seconds)), ("unexpanded", plain, more, (0.0, 0, 0.0))):
        stats = finetune(name, side.folder, args.work, count)
        bits = [stats[f"eval_loss_{when}"] * side.held_out_learned / (math.log(2) * answer_bytes) for when in ("before", "after")]
        flops = extra[0] + side.flops(stats["tokens"], stats["supervised_tokens"])
        found.append({
            "model": name, "pretraining_tokens": extra[1], "sft_tokens": stats["tokens"], "sft_rows": count * BATCH, "steps": count, "flops": f"{flops:.4g}",
            "seconds": round(extra[2] + stats["train_seconds"]), "sft_seconds": round(stats["train_seconds"]), "bits_per_byte_before_sft": round(bits[0], 4),
            "bits_per_byte": round(bits[1], 4), "held_out_rows": args.held_out, "held_out_bytes": answer_bytes, "held_out_tokens": side.held_out_learned,
        })  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    (args.work / "results.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
