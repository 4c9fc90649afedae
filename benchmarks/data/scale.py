"""Many rows within a memory budget: CPU seconds, peak memory of the whole process, temporary bytes on disk, and one hash for any budget, workers and parts.

    python benchmarks/data/scale.py --rows 2000000 --memory 2 --folder DIR

Rows are synthetic (words drawn with the frequencies of natural text, 1 in 20 an edited copy of an earlier row, 1 in 50 an exact one), about 500 bytes each. The folder must lie
outside the repository; everything in it is removed at the end unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def texts(rows: int, seed: int = 0) -> Iterator[str]:
    """Synthetic texts, some of them copies or edited copies of one of the last 50,000."""
    draw = random.Random(seed)
    words = ["".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(draw.choice((1, 2, 2, 2, 3, 4)))) for _ in range(60_000)]
    weights = [1 / (i + 10) for i in range(len(words))]
    stock = draw.choices(words, weights, k=1 << 20)  # one draw for all: the texts are windows into it, shuffled word by word
    recent: list[str] = []
    for i in range(rows):
        kind = draw.random()
        if recent and kind < 0.07:
            text = recent[draw.randrange(len(recent))]
            if kind < 0.05:
                at = draw.randrange(len(text))
                text = text[:at] + draw.choice(words) + text[at + 2 :]
        else:
            at = draw.randrange(len(stock) - 200)
            parts = stock[at : at + 2 * draw.randrange(40, 100) : 2]
            draw.shuffle(parts)
            text = "".join(parts[:20]) + "，" + "".join(parts[20:]) + "。"
        if len(recent) < 50_000:
            recent.append(text)
        else:
            recent[i % 50_000] = text
        yield text


def write(path: Path, rows: int) -> None:
    with path.open("w", encoding="utf-8") as f:
        for i, text in enumerate(texts(rows)):
            f.write(json.dumps({"id": i, "text": text}, ensure_ascii=False) + "\n")


def size(folder: Path) -> int:
    """Bytes below a folder, files that come and go apart."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def run(folder: Path, out: str, *arguments: str) -> dict[str, Any]:
    """`sop data process` in a process of its own, watched by the kernel's accounts (ru_maxrss: the largest resident set)."""
    command = [sys.executable, "-m", "self_model_sop.cli", "data", "process", "--input", str(folder / "in.jsonl"), "--output_dir", str(folder / out), *arguments]
    most = 0
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=folder)
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(1):
            most = max(most, size(folder / out) + size(folder / f"{out}.shards"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(child.pid, 0)
    done.set()
    watcher.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"exit code {child.returncode}: {' '.join(command)}")
    return {
        "arguments": " ".join(arguments), "wall_s": round(time.perf_counter() - begin, 1), "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": usage.ru_maxrss >> 10, "disk_mb": round(most / 1e6),
    }  # fmt: skip


def result(folder: Path, out: str) -> tuple[str, dict[str, Any]]:
    from self_model_sop.artifact import content_hash

    manifest = json.loads((folder / out / "manifest.json").read_text(encoding="utf-8"))
    return content_hash(manifest), manifest["stats"]["sets"]["pretrain"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--memory", type=float, nargs="+", default=[2.0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--parts", type=int, default=0, help="also work in so many parts and merge them")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    if ROOT in args.folder.resolve().parents:
        raise SystemExit("the folder must lie outside the repository")
    args.folder.mkdir(parents=True, exist_ok=True)
    source = args.folder / "in.jsonl"
    if not source.exists():
        write(source, args.rows)
    print(f"{args.rows:,} rows, {source.stat().st_size / 1e6:.0f} MB")
    hashes = set()
    for memory in args.memory:
        measured = run(args.folder, "out", "--memory", str(memory), "--workers", str(args.workers), "--overwrite")
        found, stats = result(args.folder, "out")
        hashes.add(found)
        print(json.dumps(measured | {"kept": stats["kept"], "dropped": stats["dropped"], "hash": found[:12]}), flush=True)
        shutil.rmtree(args.folder / "out")
    if args.parts:
        for part in range(1, args.parts + 1):
            print(json.dumps(run(args.folder, "out", "--memory", str(args.memory[0]), "--shard", f"{part}/{args.parts}")), flush=True)
        print(json.dumps(run(args.folder, "out", "--memory", str(args.memory[0]), "--merge", str(args.parts))), flush=True)
        hashes.add(result(args.folder, "out")[0])
    print("one hash" if len(hashes) == 1 else f"DIFFERENT HASHES: {hashes}")
    if not args.keep:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
