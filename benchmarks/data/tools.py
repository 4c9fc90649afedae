"""One near-duplicate remover on one corpus, in a process of its own, so that its CPU time and peak memory can be read from outside.

    python benchmarks/data/tools.py TOOL corpus.jsonl dropped.json

All tools get the same: character 5-grams, threshold 0.8, keep first, one thread, 128 permutations unless the name says otherwise, and otherwise their own defaults.
Writes what was dropped, CPU seconds and peak memory as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

N, T, PERMUTATIONS = 5, 0.8, 128


def read(path: str) -> list[str]:
    with open(path, encoding="utf-8") as f:  # noqa: PTH123 (runs in environments of its own)
        return [json.loads(line)["text"] for line in f]


def grams(text: str) -> list[str]:
    return [text[i : i + N] for i in range(len(text) - N + 1)] or [text]


def ours(texts: list[str]) -> list[int]:
    from self_model_sop.data.dedup import near_duplicates

    return [i for i, keeper in enumerate(near_duplicates(texts, n=N, threshold=T)) if keeper >= 0]


def prototype(texts: list[str]) -> list[int]:
    """The numpy prototype that this project began with, where it is at hand."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "shared/prototypes"))
    from near_dups_numpy import near_dups  # type: ignore[import-not-found]

    return [i for i, keep in enumerate(near_dups(texts, N, T)) if not keep]


def rensa_r(texts: list[str]) -> list[int]:
    from rensa import RMinHashDeduplicator

    dedup = RMinHashDeduplicator(threshold=T, num_perm=PERMUTATIONS, use_lsh=True)
    return [i for i, keep in enumerate(dedup.add_pairs((str(i), grams(x)) for i, x in enumerate(texts))) if not keep]


def rensa_c(texts: list[str]) -> list[int]:
    from rensa import CMinHashDeduplicator

    dedup = CMinHashDeduplicator(threshold=T, num_perm=PERMUTATIONS)
    return [i for i, keep in enumerate(dedup.add_pairs((str(i), grams(x)) for i, x in enumerate(texts))) if not keep]


def rensa_rho(texts: list[str]) -> list[int]:
    """The sampling pipeline of rensa's own benchmark: 8 bands; flags of a block against all before it."""
    from rensa import RMinHash, RMinHashLSH

    matrix = RMinHash.digest_matrix_from_token_sets_rho((grams(x) for x in texts), num_perm=PERMUTATIONS, seed=42)
    flags = RMinHashLSH(threshold=T, num_perm=PERMUTATIONS, num_bands=8).query_duplicate_flags_matrix_one_shot(matrix)
    return [i for i, flag in enumerate(flags) if flag]


def gaoya(texts: list[str]) -> list[int]:
    from gaoya.minhash import MinHashStringIndex

    index = MinHashStringIndex(32, T, 20, 6, None, "char", False, (N, N))
    return list(_query_then_insert(texts, index.query, index.insert_document))


def datasketch(texts: list[str]) -> list[int]:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=T, num_perm=PERMUTATIONS)
    dropped = []
    for i, text in enumerate(texts):
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([g.encode("utf-8", "surrogatepass") for g in grams(text)])
        if index.query(sketch):
            dropped.append(i)
        else:
            index.insert(i, sketch)
    return dropped


def datatrove(texts: list[str]) -> list[int]:
    """Its four steps in one process, with character shingles in place of its word tokenizer; its own 14 buckets of 8 hashes."""
    import tempfile

    import numpy as np
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature, minhash

    minhash.load_word_tokenizer = lambda language: None  # not used for characters, and it would want spacy

    class Signature(MinhashDedupSignature):
        def get_shingles(self, text: str) -> object:
            return np.fromiter(map(self._hash_func, grams(text)), np.uint64).reshape(-1, 1)

    def documents() -> Iterator[object]:
        return (Document(text=x, id=str(i)) for i, x in enumerate(texts))

    config = minhash.MinhashConfig(n_grams=N)
    with tempfile.TemporaryDirectory() as folder:
        Signature(f"{folder}/signatures", config).run(documents(), 0, 1)
        for bucket in range(config.num_buckets):
            MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config).run(None, bucket, config.num_buckets)
        MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config).run(None, 0, 1)
        kept = {int(d.id) for d in MinhashDedupFilter(f"{folder}/remove").run(documents(), 0, 1)}
    return [i for i in range(len(texts)) if i not in kept]


def text_dedup(texts: list[str]) -> list[int]:
    """Its MinHash command in one process, on characters instead of runs of letters between spaces and punctuation."""
    import tempfile
    from types import SimpleNamespace

    from datasets import Dataset, load_from_disk
    from text_dedup import minhash

    minhash.NON_ALPHA = SimpleNamespace(split=list)
    with tempfile.TemporaryDirectory() as folder:
        Dataset.from_dict({"id": list(range(len(texts))), "text": texts}).save_to_disk(f"{folder}/in")
        options = {"path": f"{folder}/in", "local": True, "output": f"{folder}/out", "column": "text", "ngram": N, "threshold": T, "num_perm": PERMUTATIONS, "num_proc": 1}
        minhash.main(["--local" if k == "local" else f"--{k}={v}" for k, v in options.items()], standalone_mode=False)
        kept = set(load_from_disk(f"{folder}/out")["id"])
    return [i for i in range(len(texts)) if i not in kept]


def data_juicer(texts: list[str]) -> list[int]:
    """Its MinHash operator on characters, in one process."""
    from data_juicer.ops.deduplicator.document_minhash_deduplicator import DocumentMinhashDeduplicator
    from datasets import Dataset

    remover = DocumentMinhashDeduplicator(tokenization="character", window_size=N, num_permutations=PERMUTATIONS, jaccard_threshold=T)
    rows = Dataset.from_dict({"id": list(range(len(texts))), "text": texts}).map(remover.compute_hash)
    kept = set(remover.process(rows)[0]["id"])
    return [i for i in range(len(texts)) if i not in kept]


def _query_then_insert(texts: list[str], query: Callable[[str], object], insert: Callable[[int, str], object]) -> Iterator[int]:
    for i, text in enumerate(texts):
        if query(text):
            yield i
        else:
            insert(i, text)


def exact(texts: list[str]) -> tuple[list[int], list[int]]:
    """Ground truth by another way: Python sets and hashes, scipy sparse products for all overlaps, then the sequential scan.

    Returns what the scan drops, and every text that resembles an earlier one, kept or dropped.
    """
    import numpy as np
    from scipy.sparse import csr_matrix

    texts_ids: dict[str, int] = {}
    copies = [i for i, x in enumerate(texts) if texts_ids.setdefault(x, i) != i]
    unique = list(texts_ids.values())
    sets = [np.fromiter({hash(texts[i][k : k + N]) for k in range(len(texts[i]) - N + 1)}, np.int64) for i in unique]
    size = np.array([len(s) for s in sets])
    _, column, count = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    del sets
    row = np.repeat(np.arange(len(unique)), size)
    shared = count[column] > 1
    matrix = csr_matrix((np.ones(shared.sum(), np.int32), (row[shared], column[shared])), shape=(len(unique), len(count)))
    by_gram = matrix.T.tocsr()
    kept, resembles = np.ones(len(unique), bool), np.zeros(len(unique), bool)
    for lo in range(0, len(unique), 1000):
        overlap = (matrix[lo : lo + 1000] @ by_gram).tocoo()
        b, a = overlap.row + lo, overlap.col
        ok = (a < b) & (overlap.data / (size[a] + size[b] - overlap.data) >= T)
        for j, i in sorted(zip(b[ok].tolist(), a[ok].tolist(), strict=True)):
            kept[j] &= not kept[i]
            resembles[j] = True
    return [*copies, *np.array(unique)[~kept].tolist()], [*copies, *np.array(unique)[resembles].tolist()]


def peak_mb() -> float:
    """Peak resident memory of this process (the kernel's ru_maxrss would count its parent's too)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


TOOLS = {f.__name__: f for f in (ours, prototype, rensa_r, rensa_c, rensa_rho, gaoya, datasketch, datatrove, text_dedup, data_juicer, exact)}


def main() -> None:
    tool, corpus, output = sys.argv[1:]
    texts = read(corpus)
    reading = time.process_time()
    result = TOOLS[tool](texts)
    dropped, resembling = result if isinstance(result, tuple) else (result, [])
    spent = time.process_time() - reading
    with open(output, "w") as f:  # noqa: PTH123
        json.dump({"reading": reading, "tool": spent, "peak_mb": peak_mb(), "dropped": dropped, "resembling": resembling}, f)


if __name__ == "__main__":
    main()
