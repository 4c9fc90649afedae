"""Near-duplicate removal beside other tools: CPU seconds of the whole process, peak memory, recall on planted edits, precision.

    python benchmarks/data/near_duplicates.py --cache DIR --documents 30000 100000 --tools ours rensa_r datasketch

The peers get virtual environments in the cache folder (wheels from PyPI). Results are merged into benchmarks/data/results.json, and results.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from corpus import ROOT, corpus, jaccard  # noqa: E402
from tools import TOOLS, N, T  # noqa: E402

PEERS = {  # environment -> what it holds
    "peers": ["rensa==0.5.0", "gaoya==0.2.2", "datasketch==2.0.0"],
    "datatrove": ["datatrove[processing]==0.10.1"],
    "text_dedup": ["text-dedup==0.4.0"],
    "data_juicer": ["py-data-juicer==1.6.1", "aiohttp"],
}
_SOURCES = ("text_dedup", "data_juicer")  # depend on small packages that exist as source only
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def python_of(tool: str, cache: Path) -> str:
    """The interpreter that runs a tool: this one for ours, else that of an environment in the cache."""
    if tool in ("ours", "prototype"):
        return sys.executable
    name = tool if tool in PEERS else "peers"
    if not (cache / name).exists():
        venv.create(cache / name, with_pip=True)
        subprocess.run([cache / name / "bin/python", "-m", "pip", "install", "--quiet", *([] if name in _SOURCES else ["--only-binary", ":all:"]), *PEERS[name]], check=True)
    return str(cache / name / "bin/python")


def build_corpus(cache: Path, documents: int) -> Path:
    path = cache / f"corpus-{documents}.jsonl"
    if not path.exists():
        with path.open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in corpus(cache, documents, 0))
    return path


def run(python: str, tool: str, path: Path, output: Path) -> dict[str, Any]:
    """Run one tool; CPU seconds of the whole process from the kernel's accounts."""
    child = subprocess.Popen([python, str(HERE / "tools.py"), tool, str(path), str(output)], env={**os.environ, **ONE_THREAD})
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{tool} failed")
    result: dict[str, Any] = json.loads(output.read_text())
    return {**result, "cpu": usage.ru_utime + usage.ru_stime}


def scores(rows: list[dict[str, Any]], dropped: set[int], truth: dict[str, Any] | None) -> dict[str, Any]:
    """Recall on planted edits; with the truth at hand also recall (of what the exact scan drops), precision (dropped texts that do resemble an earlier one), equality."""
    planted = [r for r in rows if r.get("jaccard", 0) >= T]
    out: dict[str, Any] = {"dropped": len(dropped), "planted_recall": sum(r["id"] in dropped or r["of"] in dropped for r in planted) / len(planted)}
    if truth is not None:
        wanted = set(truth["dropped"])
        out |= {"recall": len(dropped & wanted) / len(wanted), "precision": len(dropped & set(truth["resembling"])) / max(1, len(dropped)), "equals_exact_scan": dropped == wanted}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/self-model-sop/benchmarks")
    parser.add_argument("--documents", type=int, nargs="+", default=[30000])
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--repeat", type=int, default=3, help="runs of each tool; the least CPU time counts")
    args = parser.parse_args()
    if ROOT in args.cache.resolve().parents:
        raise SystemExit("the cache folder must lie outside the repository")
    args.cache.mkdir(parents=True, exist_ok=True)
    for documents in args.documents:
        measure(args.cache, documents, args.tools, args.repeat)
    write_table()


def measure(cache: Path, documents: int, tools: list[str], repeat: int) -> None:
    path = build_corpus(cache, documents)
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    for row in rows[:: max(1, len(rows) // 50)]:
        if "of" in row:
            assert row["jaccard"] == jaccard(rows[row["of"]]["text"], row["text"])
    truth = cache / f"exact-{documents}.json"
    if "exact" in tools and not truth.exists():
        run(python_of("exact", cache), "exact", path, truth)
    known = json.loads(truth.read_text()) if truth.exists() else None
    results = load_results()
    for tool in tools:
        if tool == "exact":
            continue
        runs = [run(python_of(tool, cache), tool, path, cache / f"{tool}.json") for _ in range(repeat)]
        best = min(runs, key=lambda r: r["cpu"])
        entry = {"tool": tool, "documents": documents, "megabytes": path.stat().st_size / 1e6, "cpu": best["cpu"], "kernel_cpu": best["tool"], "peak_mb": best["peak_mb"]}
        entry |= scores(rows, set(best["dropped"]), known)
        results = [r for r in results if (r["tool"], r["documents"]) != (tool, documents)] + [entry]
        print(json.dumps(entry), flush=True)
        save_results(results)


def load_results() -> list[dict[str, Any]]:
    file = HERE / "results.json"
    return json.loads(file.read_text())["results"] if file.exists() else []


def save_results(results: list[dict[str, Any]]) -> None:
    results.sort(key=lambda r: (r["documents"], r["cpu"]))
    about = {"python": platform.python_version(), "n": N, "threshold": T, "peers": PEERS}
    (HERE / "results.json").write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


def write_table() -> None:
    lines = ["| documents | tool | CPU s | of it after reading | peak MB | planted recall | recall | precision |", "|---|---|---|---|---|---|---|---|"]
    for r in load_results():
        shares = [f"{r[k]:.4f}" if k in r else "" for k in ("planted_recall", "recall", "precision")]
        lines.append(f"| {r['documents']:,} | {r['tool']} | {r['cpu']:.2f} | {r['kernel_cpu']:.2f} | {r['peak_mb']:.0f} | {' | '.join(shares)} |")
    (HERE / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
