"""How the time of near-duplicate removal grows where n-grams recur: texts made to hurt a prefix filter, at doubling sizes.

    python benchmarks/data/repetitive.py --documents 2000 4000 8000
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable

from self_model_sop.data.dedup import near_duplicates


def han(draw: random.Random, k: int) -> str:
    return "".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(k))


def substituted(base: str, edits: int, draw: random.Random) -> str:
    chars = list(base)
    for _ in range(edits):
        chars[draw.randrange(len(chars))] = draw.choice(base)
    return "".join(chars)


def cluster(draw: random.Random, number: int) -> list[str]:
    """Copies of one text, 3 edits each: all but one go."""
    base = han(draw, 300)
    return [substituted(base, 3, draw) for _ in range(number)]


def template(draw: random.Random, number: int) -> list[str]:
    """A form of 300 characters with 40 of its own in each: every pair shares most n-grams, and none is a duplicate."""
    form = han(draw, 300)
    return [form[:150] + han(draw, 40) + form[150:] for _ in range(number)]


def phrases(draw: random.Random, number: int) -> list[str]:
    """20 of 100 phrases each."""
    pool = [han(draw, 20) for _ in range(100)]
    return ["".join(draw.sample(pool, 20)) for _ in range(number)]


def threshold(draw: random.Random, number: int) -> list[str]:
    """Copies of one text with 4 edits: every pair lies near the threshold."""
    base = han(draw, 300)
    return [substituted(base, 4, draw) for _ in range(number)]


def below(draw: random.Random, number: int) -> list[str]:
    """Copies of one text with 8 edits: every pair lies below the threshold, every n-gram recurs."""
    base = han(draw, 300)
    return [substituted(base, 8, draw) for _ in range(number)]


def syllable(draw: random.Random, number: int) -> list[str]:
    """One syllable repeated."""
    return [draw.choice(["哈", "ab", "嘿嘿嘻"]) * draw.randrange(1, 2000) for _ in range(number)]


def digits(draw: random.Random, number: int) -> list[str]:
    """Random digits: only 100,000 different n-grams."""
    return ["".join(draw.choices("0123456789", k=300)) for _ in range(number)]


MAKERS: tuple[Callable[[random.Random, int], list[str]], ...] = (cluster, template, phrases, threshold, below, syllable, digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[2000, 4000, 8000])
    args = parser.parse_args()
    near_duplicates(["load numpy", "load numpy."])
    print("| texts | " + " | ".join(f"{n:,}: CPU s" for n in args.documents) + " | dropped | exponent |")
    print("|---|" + "---|" * (len(args.documents) + 2))
    for make in MAKERS:
        seconds = []
        for number in args.documents:
            texts = make(random.Random(1), number)
            begin = time.process_time()
            dropped = int((near_duplicates(texts) >= 0).sum())
            seconds.append(time.process_time() - begin)
        exponent = math.log(seconds[-1] / seconds[0]) / math.log(args.documents[-1] / args.documents[0])
        print(f"| {make.__name__} | " + " | ".join(f"{s:.2f}" for s in seconds) + f" | {dropped:,} | {exponent:.2f} |", flush=True)


if __name__ == "__main__":
    main()
