"""Exact and near-duplicate removal against brute force."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from self_model_sop.data import ngram_index, ngrams, similarity_join
from self_model_sop.data.dedup import exact_key, near_duplicates

LAWS = Path(__file__).resolve().parents[3] / "shared/data/laws/laws_zh.jsonl.gz"


def shingles(text: str, n: int) -> set[str]:
    return {text[i : i + n] for i in range(len(text) - n + 1)}


def jaccard(x: set[str], y: set[str]) -> float:
    common = len(x & y)
    return common / (len(x) + len(y) - common) if x and y else 0.0


def scan(texts: list[str], n: int, t: float) -> list[set[int]]:
    """For each text the earlier kept ones that it duplicates, comparing all: empty where it is kept."""
    sets, kept, out = [shingles(x, n) for x in texts], [], []
    for i, x in enumerate(texts):
        out.append({j for j in kept if x == texts[j] or jaccard(sets[i], sets[j]) >= t})
        if not out[-1]:
            kept.append(i)
    return out


def assert_equals_scan(texts: list[str], n: int, t: float) -> None:
    kept_by = near_duplicates(texts, n=n, threshold=t)
    assert kept_by.dtype == np.int64 and kept_by.shape == (len(texts),)
    for i, (got, wanted) in enumerate(zip(kept_by.tolist(), scan(texts, n, t), strict=True)):
        assert (got in wanted) if wanted else got == -1, f"text {i}: {got}, brute force {wanted}"


def edited(text: str, edits: int, draw: random.Random, alphabet: str) -> str:
    chars = list(text)
    for _ in range(edits):
        at = draw.randrange(len(chars) + 1)
        chars[at : at + draw.randrange(2)] = draw.choice(alphabet) if draw.random() < 0.7 else ""
    return "".join(chars)


def family(draw: random.Random, alphabet: str, groups: int, members: int, length: int) -> list[str]:
    """Groups of edited copies, shuffled: Jaccard values on both sides of any threshold."""
    texts = []
    for _ in range(groups):
        base = "".join(draw.choices(alphabet, k=draw.randint(length // 2, length)))
        texts += [edited(base, draw.randint(0, max(1, length // 20)), draw, alphabet) for _ in range(members)]
    draw.shuffle(texts)
    return texts


# Any code point: surrogates, emoji, NUL; and small alphabets, in which everything nearly repeats
character = st.one_of(st.characters(), st.sampled_from("\ud800\udfff😀\0\n 中"), st.sampled_from("ab"))
any_text = st.one_of(st.text(character, max_size=12), st.text(st.sampled_from("ab"), max_size=40), st.text(st.sampled_from("甲乙丙丁"), max_size=60))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_equals_the_sequential_scan_on_anything(data: st.DataObject) -> None:
    base = data.draw(st.lists(any_text, max_size=8))
    draw = data.draw(st.randoms(use_true_random=False))
    texts = [edited(x, draw.randrange(3), draw, "ab甲\ud800😀") for x in base for _ in range(draw.randint(1, 4))]
    draw.shuffle(texts)
    assert_equals_scan(texts, data.draw(st.sampled_from([1, 2, 3, 5, 8])), data.draw(st.sampled_from([0.1, 0.5, 2 / 3, 0.8, 0.9, 1.0])))


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_sequential_scan_on_families(seed: int) -> None:
    draw = random.Random(seed)
    alphabet = "".join(chr(0x4E00 + i) for i in range(draw.choice([3, 30, 3000])))
    assert_equals_scan(family(draw, alphabet, groups=12, members=12, length=draw.choice([12, 60, 300])), 5, draw.choice([0.7, 0.8, 0.9]))


@pytest.mark.parametrize("seed", range(4))
def test_every_path_of_the_join_equals_the_scan(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny limits, so that blocks, ranges of hashes, long lists, rounds and waves all occur on a small input."""
    limits = {
        ngrams: {"_PIECE": 7},
        ngram_index: {"_SORTED": 200, "_COUNTED": 20, "_PIECE": 5, "BATCH_TEXTS": 3},
        similarity_join: {"_PAIRS": 9, "_COMPARED": 5, "_CHARACTERS": 50, "_LONG": 3},
    }
    for module, values in limits.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(ngrams.Grams.__init__, "__kwdefaults__", {"width": 32, "cache": 0, "block": 60})
    draw = random.Random(seed)
    base = "".join(draw.choices("甲乙丙丁戊己庚辛", k=70))
    texts = family(draw, "甲乙丙丁戊己庚辛", groups=5, members=8, length=70) + [edited(base, draw.randint(2, 5), draw, "甲乙丙丁戊己庚辛") for _ in range(40)]
    for t in (0.6, 0.8):
        assert_equals_scan(texts, 5, t)


def test_short_empty_and_repeated_texts() -> None:
    texts = ["", "ab", "abcde", "ab", "", "abcde", "abcdef", "ab\0\0\0", "ababababab", "babababab", "abababa"]
    assert near_duplicates(texts).tolist() == [-1, -1, -1, 1, 0, 2, -1, -1, -1, 8, 8]


def test_a_copy_of_a_dropped_text_follows_it_to_its_keeper() -> None:
    first = "一二三四五六七八九十百千万亿兆" * 3 + "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉戌亥"
    near = first + "也"
    assert near_duplicates([first, near, "无关的另一段文字", near]).tolist() == [-1, 0, -1, 0]


def test_a_dropped_text_drops_no_other() -> None:
    """y resembles x and z, but z does not resemble x: keep first keeps x and z."""
    x = "".join(chr(0x4E00 + i) for i in range(100))
    y, z = x[8:] + "甲乙丙丁戊己庚辛", x[16:] + "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳"
    assert jaccard(shingles(x, 5), shingles(z, 5)) < 0.8 <= jaccard(shingles(y, 5), shingles(z, 5))
    assert near_duplicates([x, y, z]).tolist() == [-1, 0, -1]
    assert near_duplicates([y, x, z]).tolist() == [-1, 0, 0]


@pytest.mark.parametrize(("n", "t"), [(0, 0.8), (5, 0.0), (5, 1.1), (5, float("nan"))])
def test_impossible_settings_are_refused(n: int, t: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        near_duplicates(["a"], n=n, threshold=t)


def test_no_input() -> None:
    assert near_duplicates([]).tolist() == []


def test_importing_the_module_loads_no_numpy() -> None:
    code = "import sys, self_model_sop.data.dedup, self_model_sop.data.decontaminate; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- robustness ---------------------------------------------------------------------------------------------------------------------------


def random_han(draw: random.Random, k: int) -> str:
    return "".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(k))


def template(draw: random.Random, number: int) -> list[str]:
    """One form filled in: every pair just below 0.8."""
    form = random_han(draw, 300)
    return [form[:150] + random_han(draw, 40) + form[150:] for _ in range(number)]


def one_cluster(draw: random.Random, number: int) -> list[str]:
    base = random_han(draw, 300)
    return [edited(base, 3, draw, base) for _ in range(number)]


def around_the_threshold(draw: random.Random, number: int) -> list[str]:
    base = random_han(draw, 300)
    return [edited(base, 6, draw, base) for _ in range(number)]


def phrases(draw: random.Random, number: int) -> list[str]:
    pool = [random_han(draw, 20) for _ in range(60)]
    return ["".join(draw.sample(pool, 15)) for _ in range(number)]


@pytest.mark.parametrize("make", [template, one_cluster, around_the_threshold, phrases])
def test_lists_in_which_everything_occurs_stay_affordable(make) -> None:  # type: ignore[no-untyped-def]
    """Two million pairs share n-grams here, most of them many; comparing each would take a minute."""
    texts = make(random.Random(1), 1000 if make is around_the_threshold else 2000)
    begin = time.process_time()
    kept_by = near_duplicates(texts)
    assert time.process_time() - begin < 10
    assert (kept_by[:150] >= 0).tolist() == [bool(x) for x in scan(texts[:150], 5, 0.8)]  # later texts change nothing


def test_repetitive_and_very_long_texts() -> None:
    draw = random.Random(0)
    long = random_han(draw, 1_000_000)
    texts = [long, "哈" * 500_000, "哈" * 7, long[:500_000] + "插入" + long[500_000:], "ab" * 300_000, long[:700_000], "ba" * 10]
    assert near_duplicates(texts).tolist() == [-1, -1, 1, 0, -1, -1, 4]


def test_memory_per_document_is_bounded() -> None:
    """Beside the texts themselves: tables and hashes, about 10 bytes a character."""
    draw = random.Random(0)
    texts = [random_han(draw, 100) for _ in range(30_000)]
    tracemalloc.start()
    near_duplicates(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / len(texts) < 1300


# --- real texts ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.skipif(not LAWS.exists(), reason="../shared is absent")
def test_laws_equal_brute_force() -> None:
    """Versions of the same statutes: real near-duplicates, long texts."""
    with gzip.open(LAWS, "rt", encoding="utf-8") as f:
        texts = [json.loads(line)["text"] for line in f][:2000:12]
    texts += [text[: len(text) * 9 // 10] for text in texts[:20]]
    assert_equals_scan(texts, 5, 0.8)
    assert (near_duplicates(texts) >= 0).sum() > 10


# --- exact keys ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ("ＡＢＣ１２３，你好！", "abc123,你好!"),
        ("血压 140 / 90", "血压140/90"),
        ("第一段。\n\n第二段。", "第一段。 第二段。\u3000"),
        ("使用 Python 编程", "使用Python编程"),
        ("高血壓患者應當注意飲食", "高血压患者应当注意饮食"),
    ],
)
def test_equal_after_folding(x: str, y: str) -> None:
    assert exact_key(x) == exact_key(y)


@pytest.mark.parametrize(("x", "y"), [("now here", "nowhere"), ("可以服用。", "可以服用？"), ("<140", ">140"), ("", "a"), ("\ud800", "\udfff")])
def test_different_after_folding(x: str, y: str) -> None:
    assert exact_key(x) != exact_key(y)
