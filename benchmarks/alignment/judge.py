"""Does a reward model learn real preferences? Cross-validation over preference pairs, so that every pair is judged once by a model that has not seen it.

    python benchmarks/alignment/judge.py --model MODEL --pairs dpo_zh_500.jsonl --work WORK [--folds 2] [--fold N] [--max_length 640] [key=value ...]

MODEL is a folder. The pairs go through `sop data preference`, then each fold through `sop train reward`; what is given as key=value goes to the training. Prints a table: pairs,
accuracy before and after with 95 % intervals (Wilson), and how far the rule "the longer answer is the better one" would come. A fold that is done is not trained again; `--fold N`
trains that one alone (to have several at a time, on several machines or cores).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from self_model_sop.data.formats import to_preference
from self_model_sop.eval.accuracy import wilson

SETTINGS = ("template_path=null", "tokenizer_name_or_path=null", "trace=none", "algorithm=reward", "peft.new_rows=freeze", "training_args.warmup_steps=2")


def sop(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "self_model_sop.cli", *words], check=True)


def folds_of(pairs: Path, work: Path, folds: int) -> list[list[str]]:
    """The cleaned and deduplicated pairs, as lines, by the hash of their prompt."""
    sop("data", "preference", "--input", str(pairs), "--output_dir", str(work / "data"))
    lines = [line for name in ("train", "validation") for line in (work / "data" / "reward" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]
    found: list[list[str]] = [[] for _ in range(folds)]
    for line in lines:
        prompt = json.dumps(to_preference(json.loads(line))[0], ensure_ascii=False, sort_keys=True)
        found[int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % folds].append(line)
    return found


def train(fold: int, parts: list[list[str]], args: argparse.Namespace) -> dict[str, Any]:
    """Train on the other folds; the manifest's stats."""
    folder = args.work / f"fold-{fold}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("train", [line for i, part in enumerate(parts) if i != fold for line in part]), ("eval", parts[fold])):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = [f"data.train_file={folder / 'train.jsonl'}", f"data.eval_file={folder / 'eval.jsonl'}", f"data.max_length={args.max_length}"]
    sop("train", "reward", f"model_name_or_path={args.model}", f"training_args.output_dir={folder / 'model'}", *SETTINGS, *data, *args.settings)
    stats: dict[str, Any] = json.loads((folder / "model" / "manifest.json").read_text(encoding="utf-8"))["stats"]
    return stats


def longer_wins(parts: list[list[str]]) -> tuple[float, int]:
    """How often the chosen answer has more characters (a tie counts half), and of how many pairs."""
    sizes = [[sum(len(m["content"]) for m in answer) for answer in to_preference(json.loads(line))[1:]] for part in parts for line in part]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in sizes), len(sizes)


def shown(right: float, total: int) -> str:
    low, high = wilson(right, total)
    return f"{right / total:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--fold", type=int, help="train this one alone")
    parser.add_argument("--max_length", type=int, default=640)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    parts = folds_of(args.pairs, args.work, args.folds)
    if args.fold is not None:
        train(args.fold, parts, args)
        return
    done = [train(fold, parts, args) for fold in range(args.folds)]
    total = sum(s["eval_rows"]["kept"] for s in done)
    right = {when: sum(s[f"eval_accuracy_{when}"] * s["eval_rows"]["kept"] for s in done) for when in ("before", "after")}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print("| | pairs | steps | loss: first -> last | accuracy before | after | margin before -> after |\n|---|---|---|---|---|---|---|")
    for fold, s in enumerate(done):
        cells = [f"fold {fold}", s["eval_rows"]["kept"], s["steps"], f"{s['train_loss_first']:.3f} -> {s['train_loss_last']:.3f}"]
        cells += [f"{s['eval_accuracy_before']:.3f}", f"{s['eval_accuracy_after']:.3f}", f"{s['eval_margin_before']:.3f} -> {s['eval_margin_after']:.3f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    print(f"| all | {total} | | | {shown(right['before'], total)} | {shown(right['after'], total)} | |")
    print(f"the longer answer is the chosen one: {shown(*longer_wins(parts))} of all pairs; CPU seconds: {used.ru_utime + used.ru_stime:.0f}")


if __name__ == "__main__":
    main()
