from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from self_model_sop.tokenizer import bpe, merges, methods
from self_model_sop.tokenizer.base import Base, open_base
from self_model_sop.tokenizer.counts import Units, count_pretokens
from self_model_sop.tokenizer.methods import Corpus
from self_model_sop.tokenizer.script import has_script
from self_model_sop.tokenizer.settings import SelectionConfig
from tiny_tokenizers import chinese, make


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return open_base(make("qwen", tmp_path_factory.mktemp("merges")))


def corpus(number: int = 200, seed: int = 0, weight: float = 1.0) -> Corpus:
    def texts() -> Iterator[tuple[str, float]]:
        return ((t, weight) for t in chinese(number, seed))

    return Corpus(texts)


def test_counted_pretokens_are_what_the_base_encodes(base: Base) -> None:
    texts = [*chinese(50), "plain English text & code(x)", "<|im_start|>用户<|im_end|>"]
    units = count_pretokens(base, ((t, 2.0) for t in texts))
    written = sum(len(base.tokenizer.encode(t, add_special_tokens=False).ids) for t in texts)
    single = sum(1 for t in texts for e in [base.tokenizer.encode(t, add_special_tokens=False)] for w in set(e.word_ids) if w is not None and e.word_ids.count(w) == 1)
    assert sum(len(ids) * count for ids, count in units.items()) == 2 * (written - single)


def test_every_candidate_holds_chinese_and_never_starts_or_ends_inside_a_character_but_for_beginnings(base: Base) -> None:
    rows = methods.propose(base, corpus(), SelectionConfig(min_freq=2), 300)
    assert len(rows) > 100
    for row in rows:
        assert row.data[0] < 0x80 or row.data[0] >= 0xC0, row
        assert row.fragment or has_script(row.text), row
        assert b"".join(base.bytes_of[i] for i in row.pieces) == row.data


def test_a_smaller_limit_gives_a_prefix(base: Base) -> None:
    settings = SelectionConfig(min_freq=2)
    many = methods.propose(base, corpus(), settings, 120)
    few = methods.propose(base, corpus(), settings, 40)
    assert few == many[:40]


def test_gains_are_exactly_what_each_prefix_saves_on_the_encoded_text(base: Base) -> None:
    rows = methods.propose(base, corpus(), SelectionConfig(min_freq=2), 150)
    held_out = corpus(60, seed=7)
    gains = methods.gains(base, rows, held_out)
    before = methods.counts(base.data, held_out).sum()
    for n in (1, 2, 17, 60, len(rows)):
        after = methods.counts(methods.appended(base, rows[:n]), held_out).sum()
        assert before - after == sum(gains[:n])


def test_uses_in_id_space_are_the_uses_in_the_encoded_text(base: Base) -> None:
    rows, held_out = methods.propose(base, corpus(), SelectionConfig(min_freq=2), 150), corpus(60, seed=7, weight=0.5)
    fast, real = methods.uses(base, rows, held_out), methods.counts(methods.appended(base, rows), held_out)
    assert [fast[r.id] for r in rows] == [real[r.id] for r in rows]


def test_simulation_agrees_with_the_library_and_with_the_fast_count() -> None:
    draw = random.Random(0)
    triples = [(0, 1, 5), (1, 2, 6), (5, 2, 7), (3, 3, 8), (7, 8, 9), (2, 0, 10)]
    counted = {}
    for _ in range(300):
        unit = bytes(b for _ in range(draw.randint(2, 12)) for b in draw.randint(0, 4).to_bytes(4, "little"))
        counted[unit] = float(draw.randint(1, 5))
    units = Units.of(counted)
    slow = merges.simulate(units.items(), {(a, b): (n, new) for n, (a, b, new) in enumerate(triples)})
    uses = merges.segmented(units, triples, 11)
    assert merges.fired(triples, uses) == [slow.get(n, 0.0) for n in range(len(triples))]
    assert sum(slow.values()) > 500


def test_weights_shift_the_choice(base: Base) -> None:
    def texts(weight: float) -> Corpus:
        return Corpus(lambda: [("糖尿病患者", 1.0)] * 10 + [("冠心病检查", weight)] * 10)

    first = {w: methods.propose(base, texts(w), SelectionConfig(min_freq=1), 4) for w in (0.2, 5.0)}
    assert first[0.2] != first[5.0]
    assert all("冠" in r.text or "检" in r.text or r.fragment or r.text in "冠心病检查" for r in first[5.0])


def test_free_scope_learns_other_text_too_and_script_scope_does_not(base: Base) -> None:
    texts = Corpus(lambda: [("zyxw zyxw qqqj", 50.0), ("患者患者", 20.0)])
    script = methods.propose(base, texts, SelectionConfig(min_freq=2), 20)
    free = methods.propose(base, texts, SelectionConfig(min_freq=2, scope="free"), 20)
    assert all("z" not in r.text for r in script)
    assert any("z" in r.text for r in free)


def test_a_step_whose_part_is_missing_is_left_out(base: Base) -> None:
    steps = [merges.Step(9, "患".encode(), "者".encode()), merges.Step(8, b"q", b"q")]
    assert list(merges._possible(iter(steps), {b"q"}, 5, 16)) == [steps[1]]


def test_free_merges_to_base_tokens_cost_no_token_and_are_measured(base: Base) -> None:
    """Two tokens whose join is a base token already: the merge rides along with the next row."""
    first, second = merges.Step(9, b"q", b"z"), merges.Step(8, b"qz", b"j")
    stray = replace(bpe.rows(base, [first, second])[1], id=base.next_id, merge=None)
    grown = Base(base.folder, bpe.append(base, [stray]))  # `qzj` is in the vocabulary, and no merge leads there
    rows = bpe.rows(grown, [first, second, merges.Step(7, b"qzj", b"q")])
    assert [(r.text, r.also) for r in rows] == [("qz", ()), ("qzjq", (("qz", "j"),))]
    text = Corpus(lambda: [("qzjq qzj qz", 1.0)])
    gains = methods.gains(grown, rows, text)
    before, after = (methods.counts(d, text).sum() for d in (grown.data, methods.appended(grown, rows)))
    assert before - after == sum(gains) == 6
