"""Where the time of `sop data process` goes: CPU seconds of each part of one run in one process, and MB/s of the input.

    python benchmarks/data/throughput.py --input FILE --folder DIR

A part's seconds are its own, without those of the parts inside it. The run pays for the clock: about a microsecond for each row and part.
The hash tells whether a change kept the output's bytes.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = {  # function -> what it does
    "rows:Judge.block": "judge: the rest",
    "records:parse_object": "judge: parse JSON",
    "rows:Judge._read": "judge: recognise formats",
    "rows:Judge._cleaned": "judge: clean",
    "pii:mask_batch": "judge: personal data",
    "rows:Judge._pieces": "judge: structure",
    "rows:Judge._reasons": "judge: filters, the rest",
    "filters:counts_of": "judge: character classes",
    "filters:may_repeat": "judge: repetition, all texts",
    "filters:repetition": "judge: repetition, suspects",
    "rows:Judge._keys": "judge: keys",
    "rows:Judge._outcome": "judge: write JSON",
    "parts:PartWriter.take": "spool",
    "dedup:near_duplicates": "near-duplicates",
    "funnel:_write_rows": "write rows",
    "funnel:_write_reports": "write reports",
    "artifact:sha256_file": "hash files",
    "encodings:detect_encoding": "look at encodings",
}
spent: Counter[str] = Counter()
_inside: list[float] = []


def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    def timing(*args: Any, **options: Any) -> Any:
        _inside.append(0.0)
        begin = time.process_time()
        try:
            return work(*args, **options)
        finally:
            whole = time.process_time() - begin
            spent[name] += whole - _inside.pop()
            if _inside:
                _inside[-1] += whole

    return timing


def watch() -> None:
    """Put a clock around each part, wherever its name is used."""
    package = "self_model_sop"
    modules = [importlib.import_module(f"{package}.data.{m}") for m in ("rows", "records", "pii", "filters", "parts", "dedup", "funnel", "encodings", "process", "collect")]
    modules += [importlib.import_module(f"{package}.{m}") for m in ("artifact", "stage")]
    for place, name in PARTS.items():
        module, _, path = place.partition(":")
        owner = importlib.import_module(f"{package}.{module}" if module == "artifact" else f"{package}.data.{module}")
        *classes, attribute = path.split(".")
        for one in classes:
            owner = getattr(owner, one)
        old = getattr(owner, attribute)
        new = timed(name, old)
        for holder in [owner] if classes else modules:
            if getattr(holder, attribute, None) is old:
                setattr(holder, attribute, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    from self_model_sop.artifact import content_hash
    from self_model_sop.data import process

    watch()
    out = args.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    begin = time.process_time()
    done = process.run(process.Config(input=args.input, output_dir=out, subdir="pretrain"))
    whole = time.process_time() - begin
    size = args.input.stat().st_size / 1e6
    print(f"| part | CPU s | share |\n|---|---|---|\n| all, {size:.0f} MB | {whole:.2f} | {size / whole:.1f} MB/s |")
    for name, seconds in [*spent.most_common(), ("imports, reading lines, the rest", whole - spent.total())]:
        print(f"| {name} | {seconds:.2f} | {seconds / whole:.0%} |")
    print("hash", content_hash(done.manifest)[:16])


if __name__ == "__main__":
    main()
