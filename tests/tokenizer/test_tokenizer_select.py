from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.errors import DATA, ENVIRONMENT, SopError
from self_model_sop.tokenizer import methods, select, wordpiece
from self_model_sop.tokenizer.base import Base, gather, open_base
from self_model_sop.tokenizer.methods import Corpus
from self_model_sop.tokenizer.plan import Row, read_plan, write_plan
from self_model_sop.tokenizer.settings import AuxConfig, CorpusConfig, SelectionConfig, TokenizerConfig
from tiny_tokenizers import chinese, make, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("select")


def opened(folder: Path, name: str) -> Base:
    path = folder / f"{name}-files"
    if not path.exists():
        gather(make(name, folder), path)
    return open_base(path)


def corpus(number: int, seed: int = 0) -> Corpus:
    def texts() -> Iterator[tuple[str, float]]:
        return ((t, 1.0) for t in chinese(number, seed))

    return Corpus(texts)


def test_the_stopping_rule_looks_at_windows_of_100() -> None:
    gains = [50.0] * 100 + [10.0] * 100 + [30.0] * 100
    assert select.stop(gains, 1e6, 20) == 100
    assert select.stop(gains, 1e6, 5) == 300
    assert select.stop(gains, 1e6, 60) == 0
    assert select.stop(gains, 2e6, 20) == 100 and select.stop(gains, 4e6, 20) == 0  # per million held-out tokens


def test_without_a_fixed_number_it_stops_where_the_held_out_gain_ends(folder: Path) -> None:
    base = opened(folder, "qwen")
    chosen = {g: select.choose(base, corpus(300), corpus(60, seed=5), SelectionConfig(min_freq=2, min_gain=g))[0] for g in (200.0, 3000.0)}
    assert 0 < len(chosen[3000.0]) < len(chosen[200.0])
    with pytest.raises(SopError, match="save") as caught:
        select.choose(base, corpus(300), corpus(60, seed=5), SelectionConfig(min_gain=1e6))
    assert caught.value.code == DATA


def test_min_freq_drops_what_the_training_text_hardly_uses(folder: Path) -> None:
    base, training = opened(folder, "qwen"), corpus(100)
    rows = select.choose(base, training, corpus(20, seed=5), SelectionConfig(new_tokens=200, min_freq=8))[0]
    parts = {p for r in rows for p in select.parts_of(r)}
    assert all(r.train_count >= 8 for r in rows if r.token not in parts)


def test_max_base_pieces_drops_long_candidates_and_keeps_the_parts_of_the_rest(folder: Path) -> None:
    rows = select.choose(opened(folder, "qwen"), corpus(200), corpus(20, seed=5), SelectionConfig(new_tokens=150, min_freq=2, max_base_pieces=4))[0]
    made = {r.token for r in rows} | set(opened(folder, "qwen").vocab)
    assert rows and all(len(r.pieces) <= 4 and set(select.parts_of(r)) <= made for r in rows)


@pytest.mark.parametrize("name", ["qwen", "llama2", "t5", "bert"])
def test_counts_and_curve_are_those_of_the_encoded_text(folder: Path, name: str) -> None:
    base, held_out = opened(folder, name), corpus(60, seed=5)
    rows, measured = select.choose(base, corpus(200), held_out, SelectionConfig(new_tokens=70, min_freq=2))
    uses = methods.counts(methods.appended(base, rows), held_out)
    assert [r.heldout_count for r in rows] == [uses[r.id] for r in rows]
    assert measured["heldout_tokens_after"] == uses.sum()
    if name != "t5":
        saved = measured["heldout_tokens_before"] - measured["heldout_tokens_after"]
        assert sum(r.gain for r in rows) == saved
        assert measured["curve"][-1]["reduction"] == pytest.approx(saved / measured["heldout_tokens_before"], abs=1e-4)


def test_more_tokens_than_the_corpus_supports_are_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = select.choose(opened(folder, "qwen"), corpus(30), corpus(10, seed=5), SelectionConfig(new_tokens=5000))[0]
    assert 0 < len(rows) < 5000
    assert f"supports {len(rows)} new tokens" in capsys.readouterr().err


def test_unused_families_make_room_while_there_are_later_rows(folder: Path) -> None:
    base, training = opened(folder, "qwen"), corpus(200)
    rows = methods.propose(base, training, SelectionConfig(min_freq=2), 400)
    before = sum(methods.uses(base, rows[:100], training)[r.id] == 0 for r in rows[:100])
    leaner, found = select.lean(base, rows, 100, training, 0.01)
    after = sum(methods.uses(base, leaner, training)[r.id] == 0 for r in leaner)
    assert len(leaner) == 100 and after < before
    made = {r.token for r in leaner} | set(base.vocab)
    assert all(set(select.parts_of(r)) <= made for r in leaner)
    assert [found[r.id] for r in leaner] == [methods.uses(base, leaner, training)[r.id] for r in leaner]
    assert select.lean(base, rows[:100], 100, training, 0.01)[0] == rows[:100]


# --- added tokens: candidates of several sources compete -----------------------------------------------------------------------------------


def test_leftmost_longest_is_what_the_library_matches(folder: Path) -> None:
    base = opened(folder, "bert")
    terms = ["患者", "高血压", "血压", "压患者", "定期测量", "测量血压"]
    rows = wordpiece.rows(base, terms, {})
    held_out = corpus(50, seed=4)
    uses = methods.counts(methods.appended(base, rows), held_out)
    found = wordpiece.used(held_out.runs(), dict.fromkeys(terms))
    assert [uses[r.id] for r in rows] == [found[r.token] for r in rows] and sum(found.values()) > 40


def test_lexicon_and_auxiliary_terms_compete_by_gain(folder: Path, tmp_path: Path) -> None:
    lexicon = tmp_path / "terms.txt"
    lexicon.write_text("\ufeff糖尿病患者\t120\n不存在的词\t9\nEnglish\t5\n\n", encoding="utf-8")
    write_corpus(tmp_path / "final")
    config = TokenizerConfig(
        base_tokenizer=str(make("bert", folder)), work_dir=tmp_path / "work", corpus=CorpusConfig(inputs=(tmp_path / "final",)),
        aux_tokenizer=AuxConfig(vocab_size=500), selection=SelectionConfig(new_tokens=70, min_freq=3, lexicon=lexicon),
    )  # fmt: skip
    done = select.run(config)
    rows = read_plan(done.path / select.PLAN)
    sources = {r.text: r.source for r in rows}
    assert sum(done.stats["sources"].values()) == len(rows)
    assert "不存在的词" not in sources and "English" not in sources  # never used; not Chinese
    assert sources.get("糖尿病患者", "lexicon") == "lexicon"
    assert (config.below("aux").folder / "aux.model").is_file()
    gains = [r.gain for r in rows]
    assert sum(gains[:35]) > sum(gains[35:])


@pytest.mark.parametrize("name", ["qwen", "llama2"])
def test_where_tokens_are_built_by_merges_a_lexicon_is_further_text(folder: Path, tmp_path: Path, name: str) -> None:
    lexicon, final = tmp_path / "terms.txt", write_corpus(tmp_path / "final")
    lexicon.write_text("脊髓灰质炎\t90\nEnglish\t5\n心肌\t0\n", encoding="utf-8")
    texts = {}
    for share in (0.0, 0.3):
        config = TokenizerConfig(
            base_tokenizer=str(make(name, folder)), work_dir=tmp_path / f"work{share}", corpus=CorpusConfig(inputs=(final,)),
            selection=SelectionConfig(new_tokens=150, min_freq=3, lexicon=lexicon, lexicon_share=share),
        )  # fmt: skip
        rows = read_plan(select.run(config).path / select.PLAN)
        texts[share] = {r.text: r for r in rows}
    assert "脊髓灰质炎" not in texts[0.0]  # no text uses it
    assert texts[0.3]["脊髓灰质炎"].source == "lexicon" and texts[0.3]["脊髓灰质炎"].train_count > 3 and texts[0.3]["脊髓灰质炎"].heldout_count == 0
    assert "English" not in texts[0.3] and {r.source for r in texts[0.3].values()} == {"corpus", "lexicon"}


def test_the_lexicon_makes_up_its_share_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "患者" * 95, "source": "s", "weight": 2.0}) + "\n", encoding="utf-8")
    texts = list(select.training_text(tmp_path / "train.jsonl", None, [("高血压", 2.0), ("冠心", 1.0)], 0.05).texts())
    assert [t for t, _ in texts] == ["患者" * 95, "高血压", "冠心"] and texts[1][1] == 2 * texts[2][1]
    assert sum(len(t) * w for t, w in texts[1:]) == pytest.approx(0.05 * sum(len(t) * w for t, w in texts))


@pytest.mark.parametrize("source", ["lexicon", "auxiliary"])
def test_a_term_of_another_source_wins_where_it_saves_more(folder: Path, source: str) -> None:
    text = Corpus(lambda: [("患者定期测量血压，", 1.0)] * 20)
    settings = SelectionConfig(min_freq=2)
    assert len(methods.propose(opened(folder, "bert"), text, settings, 1)[0].text) < 8
    best = methods.propose(opened(folder, "bert"), text, settings, 1, [("患者定期测量血压", source), ("血压", source)])
    assert [(r.text, r.source) for r in best] == [("患者定期测量血压", source)]


def test_a_lexicon_with_a_broken_frequency_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("高血压\t12\n糖尿病\tmany\n", encoding="utf-8")
    with pytest.raises(SopError) as caught:
        select.lexicon(tmp_path / "terms.txt")
    assert caught.value.where == f"{tmp_path / 'terms.txt'}:2" and caught.value.code == DATA


def test_marginal_gains_add_up(folder: Path) -> None:
    runs = corpus(80).runs()
    terms = wordpiece.choose(runs, {r[i : i + n] for r in runs for i in range(len(r)) for n in (2, 3, 4)}, 40, 2)
    gains = wordpiece.marginal(runs, terms)
    for n in (1, 7, 40):
        uses = wordpiece.used(runs, dict.fromkeys(terms[:n]))
        assert sum(gains[:n]) == sum(c * (len(t) - 1) for t, c in uses.items())


# --- method and plan -----------------------------------------------------------------------------------------------------------------------


def test_a_method_that_does_not_fit_the_base_is_refused(folder: Path) -> None:
    assert methods.method_of(opened(folder, "qwen"), SelectionConfig()) == "continued_bpe"
    with pytest.raises(SopError, match="does not fit a wordpiece tokenizer"):
        methods.method_of(opened(folder, "bert"), SelectionConfig(method="continued_bpe"))


def test_word_scope_needs_its_package_or_keeps_to_words(folder: Path) -> None:
    settings: dict[str, Any] = {"new_tokens": 50, "min_freq": 2, "scope": "word"}
    try:
        import jieba  # type: ignore[import-not-found]
    except ImportError:
        with pytest.raises(SopError, match="jieba") as caught:
            select.choose(opened(folder, "qwen"), corpus(50), corpus(10, seed=5), SelectionConfig(**settings))
        assert caught.value.code == ENVIRONMENT
        return
    rows = select.choose(opened(folder, "qwen"), corpus(50), corpus(10, seed=5), SelectionConfig(**settings))[0]
    assert all(r.text in jieba.dt.FREQ or len(r.text) == 1 or r.fragment for r in rows)


def test_tokens_do_not_cross_given_edges(folder: Path) -> None:
    from self_model_sop.tokenizer import bpe, merges

    base, training = opened(folder, "qwen"), corpus(100)
    known = {base.bytes_of[i] for i in base.vocab.values()}
    found = []
    for cut in (None, lambda text: {i for i, c in enumerate(text) if c == "糖"}):
        atoms = merges.atoms_of(training.units(base), base.bytes_of, free=False, cut=cut)
        found.append([r.text for r in bpe.rows(base, merges.candidates(atoms, known, 300, min_freq=2, max_chars=16))])
    assert any("糖" in text[1:] for text in found[0])
    assert any("糖" in text for text in found[1]) and not any("糖" in text[1:] for text in found[1])


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    rows = [Row(9, "çĹ", b"\xe7\x97", ("ç", "Ĺ"), [1, 2], (("a", "b"),), 3, 4.5, 6), Row(10, "患者", "患者".encode(), None, [3], source="lexicon")]
    write_plan(tmp_path / "plan.jsonl", rows)
    assert read_plan(tmp_path / "plan.jsonl") == rows
    assert {"id", "text", "bytes", "merge", "pieces", "train_count", "heldout_count", "gain"} <= json.loads(
        (tmp_path / "plan.jsonl").read_text(encoding="utf-8").split("\n")[1]
    ).keys()
    (tmp_path / "plan.jsonl").write_text('{"id": 1}\n', encoding="utf-8")
    with pytest.raises(SopError, match="no plan row"):
        read_plan(tmp_path / "plan.jsonl")
