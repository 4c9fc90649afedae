"""Fine-tuning beside an expanded vocabulary: what happens to new rows that the conversations do not use, by how they are trained.

    python benchmarks/training/new_rows.py --shared ../shared --work DIR [--steps 40] [--arms freeze 1e-8 auto]

DIR is that of ../tokenizer/inits.py, with `rows`: an expanded model whose rows were trained on statutes, articles and dialogues. It is fine-tuned
on general dialogues (LoRA, learning rate 1e-3), its new rows frozen or trained beside the adapter with one of Adam's epsilons, and merged.
Measured are 25 held-out statutes (their first 600 characters) and the loss on the answers of 50 dialogues that were not trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from self_model_sop.eval.perplexity import bits_per_byte
from self_model_sop.train.model import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BEGINNING = 600
HELD_OUT = 50


def fine_tuned(args: argparse.Namespace, arm: str) -> tuple[Path, float, float]:
    """(The merged model of an arm, loss on held-out answers before and after)."""
    adapter, merged, data = args.work / f"sft-{arm}", args.work / f"sft-{arm}-merged", args.work / "dialogues"
    rows = "peft.new_rows=freeze" if arm == "freeze" else f"peft.new_rows_epsilon={arm}"
    given = {
        "model_name_or_path": args.work / "rows", "data.train_file": data / "train.jsonl", "data.eval_file": data / "held_out.jsonl", "data.max_length": 256,
        "tokenizer_name_or_path": "null", "template_path": "null", "trace": "none", "training_args.max_steps": args.steps, "training_args.learning_rate": 1e-3,
        "training_args.per_device_train_batch_size": 4, "training_args.gradient_accumulation_steps": 1, "training_args.output_dir": adapter,
    }  # fmt: skip
    command = [sys.executable, "-m", "self_model_sop.cli", "train"]
    subprocess.run([*command, "sft", "--config", str(ROOT / "config/self_model_config/finetune.yaml"), rows, *(f"{k}={v}" for k, v in given.items())], check=True)
    subprocess.run([*command, "merge", "--config", str(ROOT / "config/self_model_config/merge.yaml"), f"adapter={adapter}", f"output_dir={merged}"], check=True)
    stats = json.loads((adapter / "manifest.json").read_text(encoding="utf-8"))["stats"]
    return merged, stats["eval_loss_before"], stats["eval_loss_after"]


def statutes(work: Path) -> list[str]:
    """Beginnings of held-out statutes, chosen by hash."""
    with (work / "texts/validation.jsonl").open(encoding="utf-8") as f:
        texts = [json.loads(line)["text"][:BEGINNING] for line in f]
    return sorted((t for t in texts if "第一条" in t), key=lambda t: hashlib.sha256(t.encode()).digest())[:25]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--arms", nargs="+", default=["freeze", "1e-8", "auto"])
    args = parser.parse_args()
    args.work = args.work.resolve()
    lines = (args.shared / "data/dialogue/sharegpt_zh_1k.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (args.work / "dialogues").mkdir(exist_ok=True)
    for name, part in (("held_out", lines[:HELD_OUT]), ("train", lines[HELD_OUT:])):
        (args.work / f"dialogues/{name}.jsonl").write_text("".join(part), encoding="utf-8")
    texts = statutes(args.work)

    def bits(folder: Path) -> float:
        return bits_per_byte(load_model(folder, dtype="bfloat16"), load_tokenizer(folder), texts, window=1024, batch_size=1).bits_per_byte

    print("| new rows | statutes, bits per byte | held-out answers, nats |\n|---|---|---|")
    found = bits(args.work / "rows")
    for i, arm in enumerate(args.arms):
        merged, before, after = fine_tuned(args, arm)
        if not i:
            print(f"| before | {found:.3f} | {before:.3f} |")
        print(f"| {arm} | {bits(merged):.3f} | {after:.3f} |", flush=True)


if __name__ == "__main__":
    main()
