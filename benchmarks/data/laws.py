"""3,502 statutes (20 million characters) through every filter and near-duplicate removal: CPU seconds of the process, what was dropped, and near-duplicates against brute force.

    python benchmarks/data/laws.py --folder DIR [--shared ../shared]

Every filter of the stage is on: Han ratio, language, symbols, lines, repetition, boilerplate, perplexity (a model of every tenth statute), sentiment, personal data, overlap
with two law exams. Brute force compares each kept text with all before it whose number of 5-grams allows the threshold, by sets of the 5-grams themselves (no hashes).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
N, T = 5, 0.8


def run(folder: Path, out: str, *arguments: str) -> dict[str, Any]:
    """`sop data process` in a process of its own with one thread; CPU seconds and peak memory by the kernel's accounts."""
    command = [sys.executable, "-m", "self_model_sop.cli", "data", "process", "--input", str(folder / "laws.jsonl"), "--output_dir", str(folder / out), *arguments]
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}, cwd=folder)
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {' '.join(command)}")
    stats = json.loads((folder / out / "manifest.json").read_text(encoding="utf-8"))["stats"]["sets"]["pretrain"]
    return {"cpu_s": round(usage.ru_utime + usage.ru_stime, 1), "wall_s": round(time.perf_counter() - begin, 1), "peak_mib": usage.ru_maxrss >> 10, **stats}


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as f:
        return [json.loads(line) for line in f]


def brute_force(texts: list[str]) -> tuple[list[int], list[tuple[int, int]]]:
    """(what the sequential scan drops, all pairs with Jaccard >= T), indices of texts; equal sets by Python's own strings."""
    ids: dict[str, int] = {}
    sets = [np.array(sorted({ids.setdefault(t[i : i + N], len(ids)) for i in range(len(t) - N + 1)}), np.int64) for t in texts]
    size = np.array([len(s) for s in sets])
    by_size = np.argsort(size, kind="stable")
    everything, begins = np.concatenate([sets[i] for i in by_size]), np.concatenate([[0], np.cumsum(size[by_size])])
    marked = np.zeros(len(ids), bool)
    pairs = []
    for j, s in enumerate(sets):
        low, high = np.searchsorted(size[by_size], [np.ceil(T * len(s) - 1e-6), np.floor(len(s) / T + 1e-6) + 1])
        marked[s] = True
        part = marked[everything[begins[low] : begins[high]]]
        marked[s] = False
        common = np.add.reduceat(part, begins[low:high] - begins[low], dtype=np.int64)
        others = by_size[low:high]
        near = others[common * (1 + T) >= T * (size[others] + len(s)) - 1e-9]
        pairs += [(int(i), j) for i in near if i < j]
    dropped: set[int] = set()
    for i, j in sorted(pairs, key=lambda p: (p[1], p[0])):
        if i not in dropped:
            dropped.add(j)
    return sorted(dropped), pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    args = parser.parse_args()
    if ROOT in args.folder.resolve().parents:
        raise SystemExit("the folder must lie outside the repository")
    shared, folder = args.shared.resolve(), args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(shared / "data/laws/laws_zh.jsonl.gz", "rt", encoding="utf-8") as f:
        lines = list(f)
    (folder / "laws.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "sample.jsonl").write_text("".join(lines[::10]), encoding="utf-8")
    exams = [str(shared / f"data/eval/agieval_{name}.jsonl") for name in ("jec-qa-kd", "jec-qa-ca")]
    options = [
        "--sentiment_filter", "filters.min_han_ratio=0.3", "filters.languages=[zh]", "filters.refusals=[default]",
        f"filters.perplexity.sample=[{folder / 'sample.jsonl'}]", "--overwrite", "--decontaminate", *exams,
    ]  # fmt: skip
    found = run(folder, "out", *options)
    print(json.dumps(found, ensure_ascii=False), flush=True)
    run(folder, "before", *options, "--no-near_dedup", "--validation_ratio", "0")
    before = rows(folder / "before/pretrain/train.jsonl")
    begin = time.process_time()
    dropped, pairs = brute_force([r["text"] for r in before])
    spent = time.process_time() - begin
    place = {r["_source"]: i for i, r in enumerate(before)}
    stage = {place[r["_source"]]: place[r["of"]] for r in rows(folder / "out/pretrain/dropped.jsonl") if r["reason"] == "near_duplicates"}
    print(f"brute force over {len(before):,} texts: {len(pairs):,} pairs, {len(dropped):,} dropped, {spent:.0f} CPU s")
    known = set(pairs)
    equal = sorted(stage) == dropped and all((keeper, i) in known for i, keeper in stage.items())
    print("the stage drops the same texts, each for a pair of brute force" if equal else f"DIFFERENT: {sorted(set(stage) ^ set(dropped))[:10]}")
    shutil.rmtree(folder / "before")
    raise SystemExit(not equal)


if __name__ == "__main__":
    main()
