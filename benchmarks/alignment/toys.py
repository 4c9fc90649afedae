"""GRPO and RLOO on toy tasks whose answers a rule can judge, with a small model on one CPU core.

    sop data model output_dir=models/base                                        # SmolLM2-135M-Instruct
    python benchmarks/alignment/toys.py copy --model models/base --work WORK [--algorithms grpo rloo] [--steps 20]
    python benchmarks/alignment/toys.py sums --model models/base --work WORK     # two-digit sums in Chinese numerals, after a short fine-tuning

Prints a line of JSON for each run and appends it to WORK/results.jsonl: the mean reward of the sampled answers at the first and the last update, of greedy answers on held-out
prompts before and after, and the CPU seconds of the whole stage.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

LETTERS = "ABCDEFGH"
DIGITS = "零一二三四五六七八九"


def numeral(n: int) -> str:
    """A number below 200 in Chinese numerals."""
    if n >= 100:
        return "一百" + ("" if n == 100 else "零" + DIGITS[n % 100] if n < 110 else ("一" if n < 120 else "") + numeral(n % 100))
    if n < 10:
        return DIGITS[n]
    tens, units = divmod(n, 10)
    return ("" if tens == 1 else DIGITS[tens]) + "十" + (DIGITS[units] if units else "")


def copy_rows(draw: random.Random, n: int) -> list[dict[str, str]]:
    """Prompts that ask for one letter back."""
    return [{"system": "Repeat the letter.", "question": letter, "answer": letter} for letter in (draw.choice(LETTERS) for _ in range(n))]


def sum_rows(draw: random.Random, n: int, most: int = 99) -> list[dict[str, str]]:
    """Sums of two numbers below 100, both and the answer in Chinese numerals."""
    pairs = ((draw.randint(10, most), draw.randint(10, most)) for _ in range(n))
    return [{"system": "算", "question": f"{numeral(a)}加{numeral(b)}", "answer": numeral(a + b)} for a, b in pairs]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def stage(name: str, values: dict[str, Any]) -> float:
    """Run `sop train NAME` in a process of its own; CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
    subprocess.run([sys.executable, "-m", "self_model_sop.cli", "train", name, "--overwrite", *words], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


def reinforce(algorithm: str, task: str, model: str, work: Path, options: argparse.Namespace, reward: str) -> dict[str, Any]:
    out = work / f"{task}-{algorithm}"
    cpu = stage("grpo", {
        "algorithm": algorithm, "model_name_or_path": model, "tokenizer_name_or_path": "null", "template_path": "null", "ppo.train_file": str(work / task / "train.jsonl"),
        "ppo.eval_file": str(work / task / "eval.jsonl"), "rewards": [{"name": reward}], "ppo.rollout_backend": "transformers", "ppo.max_prompt_length": 128,
        "ppo.max_response_length": options.tokens, "ppo.train_batch_size": options.prompts, "ppo.ppo_mini_batch_size": options.prompts, "ppo.rollout_n": options.answers,
        "ppo.ppo_micro_batch_size_per_gpu": options.prompts * options.answers, "ppo.actor_lr": options.rate, "ppo.total_epochs": 100, "precision": "fp32",
        "peft.target_modules": "all-linear", "peft.lora_r": 16, "peft.lora_alpha": 32, "training_args.max_steps": options.steps, "training_args.lr_scheduler_type": "constant",
        "training_args.logging_steps": 1, "training_args.output_dir": str(out),
    })  # fmt: skip
    stats = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["stats"]
    curve = [line["reward"] for line in map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) if "reward" in line]
    return {
        "task": task, "algorithm": algorithm, "steps": stats["steps"], "answers_per_step": options.prompts * options.answers, "sampled_first": round(curve[0], 3),
        "sampled_last": round(curve[-1], 3), "sampled_best": round(max(curve), 3), "greedy_before": stats["reward_before"]["sum"], "greedy_after": stats["reward_after"]["sum"],
        "train_seconds": stats["train_seconds"], "cpu_seconds": cpu, "rate": options.rate, "curve": [round(v, 3) for v in curve],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("copy", "sums"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--algorithms", nargs="+", default=["grpo", "rloo"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--warm_up", type=int, default=24, help="sums: steps of fine-tuning on worked sums first")
    options = parser.parse_args()
    draw, work, model = random.Random(0), options.work.absolute(), str(Path(options.model).absolute())
    make = copy_rows if options.task == "copy" else sum_rows
    write(work / options.task / "train.jsonl", make(draw, 256))
    write(work / options.task / "eval.jsonl", make(draw, 32))
    if options.task == "sums":
        warm = [{"system": row["system"], "instruction": row["question"], "input": "", "output": row["answer"]} for row in sum_rows(draw, 2000)]
        write(work / "sums" / "warm.jsonl", warm)
        cpu = stage("sft", {
            "model_name_or_path": model, "tokenizer_name_or_path": "null", "template_path": "null", "data.train_file": str(work / "sums" / "warm.jsonl"), "data.eval_file": "null",
            "data.max_length": 128, "peft.target_modules": "all-linear", "peft.lora_r": 16, "peft.lora_alpha": 32, "precision": "fp32", "trace": "none",
            "training_args.fp16": False, "training_args.max_steps": options.warm_up, "training_args.per_device_train_batch_size": 8,
            "training_args.gradient_accumulation_steps": 1, "training_args.learning_rate": 1e-3, "training_args.output_dir": str(work / "sums-sft"),
        })  # fmt: skip
        stage("merge", {"adapter": str(work / "sums-sft"), "output_dir": str(work / "sums-warm")})
        model = str(work / "sums-warm")
        print(json.dumps({"task": "sums", "algorithm": "sft", "steps": options.warm_up, "cpu_seconds": cpu}))
    for algorithm in options.algorithms:
        line = reinforce(algorithm, options.task, model, work, options, "exact" if options.task == "copy" else "number")
        print(json.dumps(line))
        with (work / "results.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
