"""Training data larger than memory: read row by row, tokenised to disk, memory-mapped; what is held grows by bytes a row, not by the text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import tiny_qwen
from tiny_runs import rows

_SENTENCES = ("高血压患者应当按时服药，定期测量血压。", "感冒通常由病毒引起，注意休息。", "The patient should rest. ", "人工智能模型可以回答问题。")
_READ = """
import json, sys
from pathlib import Path
import numpy as np
from self_model_sop.train import corpus
from self_model_sop.train.cache import Cache
from self_model_sop.train.machine import peak_mib
from self_model_sop.train.model import load_tokenizer
from self_model_sop.train.packing import Blocks
from self_model_sop.train.template import renderer_for

model, store, kind, *files = sys.argv[1:]
tokenizer = load_tokenizer(model)
peaks = []
for file in map(Path, files):
    if kind == "documents":
        made = corpus.documents([file], Cache(Path(store)), tokenizer, end=0)
        dataset = Blocks(made, np.random.default_rng(0).permutation(len(made)), 256)
        assert sum(len(s.ids) for i in range(0, len(dataset), 1000) for s in dataset[i].segments) >= 256
    else:
        made = corpus.conversations([file], Cache(Path(store)), renderer_for(tokenizer), max_length=4096, overlong="drop", workers=1)
    corpus.keep_apart(made, corpus.documents([Path(files[0])], Cache(Path(store)), tokenizer, end=0), "warn")
    peaks.append([made.meta["tokens"], peak_mib()])
print(json.dumps(peaks))
"""


def _text(draw: random.Random) -> str:
    return "".join(draw.choices(_SENTENCES, k=40))


@pytest.mark.parametrize("kind", ["documents", "conversations"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, kind: str) -> None:
    draw = random.Random(0)
    tiny_qwen(tmp_path / "qwen")

    def row(i: int) -> dict[str, str]:
        return {"text": f"{i} {_text(draw)}"} if kind == "documents" else {"instruction": f"{i}？", "output": _text(draw)}

    files = [rows(tmp_path / f"{n}.jsonl", [row(i) for i in range(n)]) for n in (300, 18_000)]
    argv = [sys.executable, "-c", _READ, str(tmp_path / "qwen"), str(tmp_path / "store"), kind, *map(str, files)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (_, few), (tokens, many) = json.loads(done.stdout.splitlines()[-1])
    on_disk = tokens * 6 >> 20  # ids of 4 bytes and weights of 2
    assert on_disk > 25, "there is something to hold"
    assert many - few < on_disk / 4, f"{many - few} MiB more for {on_disk} MiB of tokens"


def test_long_documents_are_encoded_a_few_at_a_time(tmp_path: Path) -> None:
    """What the library answers takes some hundred bytes a token until a call is done."""
    draw = random.Random(0)
    tiny_qwen(tmp_path / "qwen")
    files = [rows(tmp_path / f"{n}.jsonl", [{"text": f"{i} " + "".join(_text(draw) for _ in range(30))} for i in range(n)]) for n in (60, 250)]
    argv = [sys.executable, "-c", _READ, str(tmp_path / "qwen"), str(tmp_path / "store"), "documents", *map(str, files)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (_, few), (_, many) = json.loads(done.stdout.splitlines()[-1])
    assert many - few < 60, "MiB: 250 documents of 1,200 sentences beside 60"
