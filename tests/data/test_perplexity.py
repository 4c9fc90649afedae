"""The n-gram model is the distribution that its formula says, and tells usual from unusual text."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.artifact import content_hash
from self_model_sop.data import inspect, process
from self_model_sop.data.filters import FilterConfig
from self_model_sop.data.inspect_page import render
from self_model_sop.data.perplexity import Model, PerplexityConfig, folded, level, train
from self_model_sop.data.process import Config, ProcessConfig
from self_model_sop.data.records import read, write_jsonl
from self_model_sop.errors import DATA, SopError

ALPHABET = "甲乙丙丁戊己"


def sample(seed: int, count: int = 25) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(ALPHABET, weights=(9, 5, 3, 2, 1, 1), k=draw.randrange(0, 30))) for _ in range(count)]


class ByDefinition:
    """Interpolated Kneser-Ney with dictionaries and recursion, straight from the formula."""

    def __init__(self, texts: list[str], order: int) -> None:
        self.counts: dict[int, Counter[str]] = {}
        for k in range(order, 0, -1):
            raw = Counter(t[i : i + k] for t in texts for i in range(len(t) - k + 1))
            if k < order:
                before: dict[str, set[str]] = defaultdict(set)
                for longer in (t[i : i + k + 1] for t in texts for i in range(len(t) - k)):
                    before[longer[1:]].add(longer[0])
                raw = Counter({gram: len(before[gram]) for gram in raw if before[gram]})
            self.counts[k] = raw
        self.characters = len({c for t in texts for c in t})
        self.order = order

    def p(self, context: str, char: str, k: int | None = None) -> float:
        k = min(self.order, len(context) + 1) if k is None else k
        if k == 0:
            return 1 / (self.characters + 1)
        h = context[len(context) - k + 1 :]
        following = {g: c for g, c in self.counts[k].items() if g[:-1] == h}
        lower = self.p(context, char, k - 1)
        if not following:
            return lower
        n1, n2 = (sum(c == n for c in self.counts[k].values()) for n in (1, 2))
        discount = n1 / (n1 + 2 * n2) if n1 else 0.5
        total = sum(following.values())
        return max(following.get(h + char, 0) - discount, 0) / total + discount * len(following) / total * lower


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_probabilities_equal_the_formula_and_add_up_to_one(order: int, seed: int) -> None:
    texts = sample(seed)
    model, reference = Model(texts, order), ByDefinition(texts, order)
    for context in ("", "甲", "甲乙", "乙丙丁", "子", "甲子", "甲乙丙丁戊己己"):
        logs = [float(model.logs(*folded([context + char]))[-1]) for char in ALPHABET + "子"]
        assert logs == pytest.approx([math.log(reference.p(context, char)) for char in ALPHABET + "子"])
        assert sum(map(math.exp, logs)) == pytest.approx(1)


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    model = Model(sample(0), 3)
    texts = [*sample(3, 12), "", "子丑寅", "甲"]
    together, lengths = model.perplexities(texts)
    for text, value, n in zip(texts, together.tolist(), lengths.tolist(), strict=True):
        (alone,), _ = model.perplexities([text])
        assert n == len(text) and (value == alone or (not text and math.isnan(value)))


def test_layout_width_and_amounts_do_not_matter() -> None:
    model = Model(["患者血压140mmHg，應當復查。"] * 3, 3)
    values, _ = model.perplexities(["患者血压140mmHg，應當復查。", "患者 血压９９９mmHg，\n应当复查。", "查复当应，压血者患140mmHg。"])
    assert values[0] == pytest.approx(values[1]) and values[2] > 2 * values[0]


def natural(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = ["患者", "血压", "血糖", "应当", "定期", "复查", "医生", "建议", "饮食", "清淡", "适量", "运动", "按时", "服药", "不可", "自行", "停药", "如有", "不适", "及时", "就医"]
    return ["，".join("".join(draw.choices(words, k=4)) for _ in range(8)) + "。" for _ in range(count)]


def config(folder: Path, **options: Any) -> Config:
    write_jsonl(folder / "sample.jsonl", ({"text": t} for t in natural(300, 0)))
    good, draw = natural(60, 1), random.Random(2)
    shuffled = ["".join(draw.sample(t, len(t))) for t in natural(10, 3)]
    write_jsonl(folder / "in.jsonl", ({"text": t} for t in [*good, *shuffled, "短文本不判断，太短了"]))
    perplexity = PerplexityConfig(sample=(folder / "sample.jsonl",), **options)
    return Config(input=folder / "in.jsonl", output_dir=folder / "out", filters=FilterConfig(perplexity=perplexity), process=ProcessConfig(near_dedup=False))


def test_disordered_text_is_dropped_with_its_perplexity(tmp_path: Path) -> None:
    done = process.run(config(tmp_path))
    stats = done.stats["sets"]["pretrain"]
    assert stats["dropped"]["high_perplexity"] in range(10, 14)  # one in a hundred usual texts may exceed the limit too
    rows = [r.row for r in read(tmp_path / "out" / "pretrain" / "dropped.jsonl") if r.row and r.row["reason"] == "high_perplexity"]
    limit = stats["perplexity"]["limit"]
    assert all(row["perplexity"] > limit for row in rows) and {f"in.jsonl:{i}" for i in range(61, 71)} <= {row["_source"] for row in rows}
    assert sum(stats["perplexity"]["texts"].values()) == 70 and stats["perplexity"]["held_out_texts"] == 30
    assert stats["perplexity"]["held_out_median"] < limit and stats["perplexity"]["sample_texts"] == 270
    manifest, views = inspect.inspect(inspect.Config(input=tmp_path / "out"))
    page = render(manifest, views)
    assert "Perplexity per character" in page and f"limit {limit:,}" in page and "high_perplexity" in page


def test_a_limit_of_ones_own_and_the_same_in_parts_and_workers(tmp_path: Path) -> None:
    from dataclasses import replace

    whole = config(tmp_path, max_perplexity=1.5)
    done = process.run(whole)
    assert done.stats["sets"]["pretrain"]["kept"] == 1  # the text too short to judge
    other = replace(whole, output_dir=tmp_path / "parts", workers=2)
    for part in (1, 2):
        process.run(replace(other, shard=f"{part}/2"))
    merged = process.run(replace(other, merge=2))
    assert content_hash(merged.manifest) == content_hash(done.manifest) and merged.stats == done.stats
    write_jsonl(tmp_path / "sample.jsonl", ({"text": t} for t in natural(299, 0)))
    with pytest.raises(SopError, match="sample"):  # another sample is another artifact
        process.run(whole)


@pytest.mark.parametrize(("texts", "what"), [(["甲乙丙丁" * 20] * 30, "only 3 can be judged"), ([" "] * 3, "no text"), (["短"] * 500, "only 0 can be judged")])
def test_a_sample_that_says_too_little_is_refused(tmp_path: Path, texts: list[str], what: str) -> None:
    write_jsonl(tmp_path / "s.jsonl", ({"text": t} for t in texts))
    with pytest.raises(SopError, match=what) as error:
        train(PerplexityConfig(sample=(tmp_path / "s.jsonl",)), str.strip)
    assert error.value.code == DATA and "s.jsonl" in str(error.value)


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    bad = PerplexityConfig(order=1, max_perplexity=0.5, tolerance=0, min_chars=0)
    found = process.preflight(Config(input=tmp_path, output_dir=tmp_path.parent / "x", filters=FilterConfig(perplexity=bad)))
    assert [key for key, *_ in found] == [f"filters.perplexity.{k}" for k in ("order", "max_perplexity", "tolerance", "min_chars")]


def test_levels() -> None:
    assert [level(p) for p in (1.0, 10.0, 99.99, 1e9)] == ["0", "10", "70", "5000"]
