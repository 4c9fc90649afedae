"""Whatever the text: it comes back, base ids stay, and what has no new token in it is encoded exactly as before."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from self_model_sop.tokenizer import extend, gates, methods
from self_model_sop.tokenizer.base import gather, open_base
from self_model_sop.tokenizer.methods import Corpus
from self_model_sop.tokenizer.plan import Row
from self_model_sop.tokenizer.script import has_script
from self_model_sop.tokenizer.settings import SelectionConfig
from tiny_tokenizers import MAKERS, SPECIALS, WORDS, chinese, make

LOOK_ALIKES = [
    *SPECIALS,
    "<|im_start",
    "im_start|>",
    "<|",
    "|>",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "[MASK]",
    "[CLS]",
    "<0xE6>",
    "<｜begin▁of▁sentence｜>",
    "▁",
    "##者",
    "\u2581患者",
]
INVALID = ["\ufffd", b"\xe6\x82".decode("utf-8", "replace"), b"\xff\xfe\x80".decode("latin-1"), "\x00", "\x1b", "\u200d", "\u0301", "e\u0301", "\ufeff", "\u2028"]
MIXED = ["かな", "漢字", "한국어", "Привет", "naïve", "😀", "👩‍💻", "ＡＢＣ", "１２３", "ａｂ", "\u3000", "def f(x):", " 12.5 ", "\n\n", "\r\n", "\t", "  ", "،", "ไทย", "𠀀", "豈"]
PART = st.one_of(
    st.sampled_from(WORDS), st.sampled_from(MIXED), st.sampled_from(LOOK_ALIKES), st.sampled_from(INVALID), st.text(max_size=6), st.text("患者高血压，。“”…——《》", max_size=12)
)
TEXT = st.lists(PART, max_size=10).map("".join)


class Extended(NamedTuple):
    old: Any
    new: Any
    rows: list[Row]
    kind: str


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Extended]:
    folder, out = tmp_path_factory.mktemp("properties"), {}
    for name in MAKERS:
        gather(make(name, folder), folder / f"{name}-files")
        base = open_base(folder / f"{name}-files")
        rows = methods.propose(base, Corpus(lambda: ((t, 1.0) for t in chinese(200))), SelectionConfig(min_freq=2), 150)
        extend.write(base, rows, "test", folder / f"{name}-extended")
        pair = extend.opened_pair(base, rows, folder / f"{name}-extended", free=False)
        out[name] = Extended(pair.old, pair.new, rows, base.kind)
    return out


def check(extended: dict[str, Extended], text: str) -> None:
    for name, (old, new, rows, kind) in extended.items():
        before, after = (gates.ids(t, [text])[0] for t in (old, new))
        back_before, back_after = (t.decode(i, skip_special_tokens=False, clean_up_tokenization_spaces=False) for t, i in ((old, before), (new, after)))
        assert back_before != text or back_after == text, name
        if not has_script(text) or not any(i >= rows[0].id for i in after):
            assert before == after, name
        if kind == "byte_bpe":
            pieces = {r.id: r.pieces for r in rows}
            assert [p for i in after for p in pieces.get(i, [i])] == before, name


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(text=TEXT)
def test_any_text(extended: dict[str, Extended], text: str) -> None:
    check(extended, text)


@pytest.mark.exhaustive
@settings(max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_any_text_5000(extended: dict[str, Extended], text: str) -> None:
    check(extended, text)
