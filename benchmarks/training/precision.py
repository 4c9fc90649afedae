"""Seconds a step in bf16 autocast beside fp32, on this CPU: the same batch, full fine-tuning, the two formats taking turns in one process.

    python benchmarks/training/precision.py MODEL_FOLDER [--threads 2] [--rows 4] [--length 128] [--rounds 3]

What `precision: auto` chooses on a CPU rests on the ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any


def _step(model: Any, ids: Any, half: bool, optimizer: Any) -> tuple[float, float]:
    """(seconds, CPU seconds) of one step: forward, backward, update."""
    import torch

    wall, used = time.perf_counter(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - wall, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM

    from self_model_sop.train.precision import choose

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").train()
    ids = torch.randint(0, model.config.vocab_size, (args.rows, args.length), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for number in range(args.rounds + 1):
        for half in (False, True):
            taken = _step(model, ids, half, optimizer)
            if number:  # the first round warms up
                found[half].append(taken)
    best = {half: min(taken) for half, taken in found.items()}
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    facts = {"threads": args.threads, "tokens": ids.numel(), "cpu_flags": [f for f in ("avx512f", "avx512_bf16", "amx_bf16") if f in flags], "chosen": choose("auto", {}).mode}
    seconds = {f"{name}_{kind}": round(best[half][i], 3) for half, name in ((False, "fp32"), (True, "bf16")) for i, kind in enumerate(("s", "cpu_s"))}
    print(json.dumps({**facts, **seconds, "bf16_over_fp32": round(best[True][0] / best[False][0], 3)}))


if __name__ == "__main__":
    main()
