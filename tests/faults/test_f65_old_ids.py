"""F65: an extension never breaks old ids: ids, order, merges, and the encodings of strings without new tokens stay."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from self_model_sop.tokenizer import bpe, extend, gates, methods
from self_model_sop.tokenizer.base import gather, open_base
from self_model_sop.tokenizer.methods import Corpus
from self_model_sop.tokenizer.settings import SelectionConfig
from tiny_tokenizers import MAKERS, WORDS, chinese, make

STRINGS = 10_000
PARTS = [
    "The ",
    "patient",
    " drinks",
    "\n",
    "  ",
    "def f(x):",
    "return x",
    "123",
    "3.14",
    "Ünïcödé ",
    "Привет ",
    "한국어",
    "かな",
    "カナ",
    "😀",
    "👩‍💻",
    "ＡＢＣ",
    "１２",
    "\u3000",
    "“",
    "”",
    "…",
    "—",
    "&#39;",
    "\t",
    "é",
    "ñ",
]


def strings() -> list[str]:
    """Strings without Chinese, and some with Chinese that may or may not hold a new token."""
    draw = random.Random(65)
    plain = ["".join(draw.choice(PARTS) for _ in range(draw.randint(1, 12))) for _ in range(STRINGS // 2)]
    return plain + ["".join(draw.choice([*PARTS, *"患者的一是了我你他", *WORDS[:2]]) for _ in range(draw.randint(1, 12))) for _ in range(STRINGS // 2)]


@pytest.mark.parametrize("name", MAKERS)
def test_old_ids_order_and_encodings_stay(tmp_path: Path, name: str) -> None:
    gather(make(name, tmp_path), tmp_path / "base")
    base = open_base(tmp_path / "base")
    rows = methods.propose(base, Corpus(lambda: ((t, 1.0) for t in chinese(200))), SelectionConfig(min_freq=2), 150)
    extend.write(base, rows, "test", tmp_path / "extended")
    pair = extend.opened_pair(base, rows, tmp_path / "extended", free=False)
    grown = json.loads((tmp_path / "extended/tokenizer.json").read_text(encoding="utf-8"))
    if "merges" in base.data["model"]:
        old = bpe.merges_of(base.data)
        assert bpe.merges_of(grown)[: len(old)] == old
    assert grown["added_tokens"][: len(base.data["added_tokens"])] == base.data["added_tokens"]
    assert pair.old.convert_ids_to_tokens(list(range(base.next_id))) == pair.new.convert_ids_to_tokens(list(range(base.next_id)))
    first, untouched = rows[0].id, 0
    for before, after in zip(*(gates.ids(t, strings()) for t in (pair.old, pair.new)), strict=True):
        if all(i < first for i in after):
            untouched += 1
            assert before == after
    assert untouched >= STRINGS // 2  # all of the strings without Chinese, at the least
