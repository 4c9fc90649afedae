"""Streaming clients against an OpenAI-compatible server: are the streams whole, each client's own, and how fast.

    SOP_API_KEY=... sop infer serve --model FILE.gguf --context 512
    SOP_API_KEY=... python benchmarks/serving/clients.py http://127.0.0.1:8000/v1 MODEL --clients 64 --tokens 16 --pid PID

Each client asks for its own code word. With --pid the processor time and the largest resident set of that process (Linux) are shown too. Needs the package openai.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from openai import AsyncOpenAI, OpenAIError


class Answer(NamedTuple):
    text: str
    first: float
    ids: int
    pieces: int
    error: str = ""


def word(client: int) -> str:
    return f"K{client:03d}"


async def ask(api: AsyncOpenAI, model: str, client: int, tokens: int) -> Answer:
    started, first, text, ids = time.perf_counter(), 0.0, [], set()
    messages = [{"role": "user", "content": f"The code word is {word(client)}. Repeat the code word."}]
    try:
        async for piece in await api.chat.completions.create(model=model, messages=messages, max_tokens=tokens, temperature=0, stream=True):  # type: ignore[arg-type, union-attr]
            ids.add(piece.id)
            if piece.choices and piece.choices[0].delta.content:
                first = first or time.perf_counter() - started
                text.append(piece.choices[0].delta.content)
    except OpenAIError as error:
        return Answer("", 0.0, 0, 0, str(error)[:200])
    return Answer("".join(text), first, len(ids), len(text))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(args: argparse.Namespace) -> None:
    before, started = cpu_seconds(args.pid) if args.pid else 0.0, time.perf_counter()
    async with AsyncOpenAI(base_url=args.url, api_key=os.environ.get("SOP_API_KEY", "none"), max_retries=0, timeout=args.timeout) as api:
        answers = await asyncio.gather(*(ask(api, args.model, i, args.tokens) for i in range(args.clients)))
    wall, whole = time.perf_counter() - started, [a for a in answers if not a.error]
    foreign = sum(any(word(j) in a.text for j in range(args.clients) if j != i) for i, a in enumerate(answers))
    own = sum(word(i) in a.text for i, a in enumerate(answers))
    print(f"clients {args.clients}: whole streams {len(whole)}, own word {own}, another's word {foreign}, one id {sum(a.ids == 1 for a in whole)}")
    pieces, firsts = sum(a.pieces for a in whole), [a.first for a in whole if a.first] or [0.0]
    print(f"wall {wall:.1f} s, {pieces / wall:.1f} pieces/s, first piece median {statistics.median(firsts):.1f} s, slowest {max(firsts):.1f} s")
    if args.pid:
        peak = next(line.split()[1] for line in Path(f"/proc/{args.pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(f"processor {cpu_seconds(args.pid) - before:.1f} s, largest resident set {int(peak) / 2**20:.2f} GiB")
    for error in sorted({a.error for a in answers if a.error})[:3]:
        print(f"error: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pid", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
