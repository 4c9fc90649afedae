from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.errors import DATA, SopError
from self_model_sop.tokenizer import extend, gates, regression, select
from self_model_sop.tokenizer.plan import read_plan
from self_model_sop.tokenizer.script import has_script
from self_model_sop.tokenizer.settings import AuxConfig, CorpusConfig, SelectionConfig, TokenizerConfig
from self_model_sop.train.model import load_tokenizer
from tiny_tokenizers import MAKERS, SPECIALS, chinese, make, write_corpus

KINDS = tuple(MAKERS)
METHODS = {"qwen": "continued_bpe", "llama3": "continued_bpe", "smollm2": "continued_bpe", "llama2": "sentencepiece", "t5": "sentencepiece", "bert": "added_tokens"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("extend")
    write_corpus(path / "final")
    return path


def config_of(folder: Path, name: str, **selection: Any) -> TokenizerConfig:
    return TokenizerConfig(
        base_tokenizer=str(make(name, folder)), work_dir=folder / f"work-{name}", extended_tokenizer=folder / f"extended-{name}",
        corpus=CorpusConfig(inputs=(folder / "final",)), aux_tokenizer=AuxConfig(vocab_size=600), selection=SelectionConfig(**({"new_tokens": 80, "min_freq": 3} | selection)),
    )  # fmt: skip


def pair(folder: Path, name: str) -> tuple[Any, Any, Path]:
    """The base and the extended tokenizer, both reloaded, and the extension's folder; made once."""
    config = config_of(folder, name)
    done = extend.run(config)
    return load_tokenizer(config.work_dir / "baseline" / "tokenizer"), load_tokenizer(done.path), done.path


@pytest.mark.parametrize("name", KINDS)
def test_the_extension_saves_tokens_and_moves_nothing(folder: Path, name: str) -> None:
    old, new, path = pair(folder, name)
    record = json.loads((path / "expansion.json").read_text(encoding="utf-8"))
    assert (record["base_vocab_size"], record["tokens"], record["method"]) == (len(old), 80, METHODS[name])
    assert record["new_ids"] == [1 + max(old.get_vocab().values()), 1 + max(old.get_vocab().values()) + 80]
    assert {t: i for t, i in new.get_vocab().items() if i < record["new_ids"][0]} == old.get_vocab()
    assert [t.content for t in old.added_tokens_decoder.values()] == [new.added_tokens_decoder[i].content for i in old.added_tokens_decoder]
    texts = chinese(30, seed=11)
    lengths = [sum(map(len, gates.ids(t, texts))) for t in (old, new)]
    assert lengths[1] < (0.98 if name == "t5" else 0.65) * lengths[0]  # T5 writes unknown runs as one <unk>: it gains knowledge, not brevity


@pytest.mark.parametrize("name", KINDS)
def test_text_without_chinese_is_encoded_as_before(folder: Path, name: str) -> None:
    old, new, _ = pair(folder, name)
    lines = [line for part in regression.NAMES for line in regression.lines(part) if not has_script(line)]
    assert len(lines) > 500
    assert gates.ids(old, lines) == gates.ids(new, lines)


@pytest.mark.parametrize("name", KINDS)
def test_the_plan_explains_every_new_token(folder: Path, name: str) -> None:
    old, new, path = pair(folder, name)
    rows = read_plan(path / "plan.jsonl")
    vocab = new.get_vocab()
    assert [vocab[r.token] for r in rows] == [r.id for r in rows] == list(range(rows[0].id, rows[0].id + 80))
    for row in rows:
        assert all(i < rows[0].id for i in row.pieces) and row.pieces
        if name == "bert":
            assert row.pieces == gates.ids(old, [row.text])[0] and row.merge is None
        elif row.merge:
            assert "".join(row.merge) == row.token and all(vocab[part] < row.id for part in row.merge)
    assert sum(r.gain for r in rows) > 0


@pytest.mark.parametrize("name", KINDS)
def test_any_smaller_number_is_a_prefix_of_the_plan_that_passes_the_gates(folder: Path, tmp_path: Path, name: str) -> None:
    config = config_of(folder, name)
    extend.run(config)
    base = extend.baseline.opened(config)
    rows = read_plan(config.below("selection").folder / select.PLAN)[:30]
    extend.write(base, rows, METHODS[name], tmp_path)
    assert set(gates.check(extend.opened_pair(base, rows, tmp_path, free=False), chinese(20, seed=5)).values()) == {0}


@pytest.mark.parametrize(("name", "model"), [("llama2", "tokenizer.model"), ("t5", "spiece.model")])
def test_the_sentencepiece_model_says_the_same_as_the_json(folder: Path, name: str, model: str) -> None:
    import sentencepiece

    _, new, path = pair(folder, name)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path / model))
    first = json.loads((path / "expansion.json").read_text(encoding="utf-8"))["new_ids"][0]
    assert sp.get_piece_size() == len(new)
    texts = [*chinese(60, seed=21), "Hello world, mixed 患者 text", *regression.lines("english")[:20]]
    assert [sp.encode(t) for t in texts] == gates.ids(new, texts)
    assert any(i >= first for t in texts for i in sp.encode(t))


@pytest.mark.parametrize("name", ["qwen", "llama3", "smollm2"])
def test_special_tokens_keep_their_ids_one_by_one(folder: Path, name: str) -> None:
    """Appending to the vocabulary alone would renumber them on reload (`<|im_start|>` of Qwen3: 151644 -> 151654)."""
    old, new, path = pair(folder, name)
    named = json.loads((path / "gates.json").read_text(encoding="utf-8"))["special_ids"]
    for special in SPECIALS:
        assert named[special] == old.convert_tokens_to_ids(special)
        assert new.convert_tokens_to_ids(special) == old.convert_tokens_to_ids(special) is not None
        assert gates.ids(new, [f"患者{special}高血压"])[0].count(old.convert_tokens_to_ids(special)) == 1
    naive = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    if name != "smollm2":  # there they stand inside the vocabulary from the start
        for special in SPECIALS:
            del naive["model"]["vocab"][special]
        from tokenizers import Tokenizer

        moved = Tokenizer.from_str(json.dumps(naive))
        assert moved.token_to_id("<|im_start|>") != old.convert_tokens_to_ids("<|im_start|>")


def test_the_same_config_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    _, _, path = pair(folder, "qwen")
    config = config_of(folder, "qwen")
    again = extend.run(TokenizerConfig(**{**vars(config), "work_dir": tmp_path / "work", "extended_tokenizer": tmp_path / "out"}))
    for name in ("tokenizer.json", "plan.jsonl", "expansion.json"):
        assert (again.path / name).read_bytes() == (path / name).read_bytes()


def test_only_what_depends_on_a_key_runs_again(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "qwen", new_tokens=40)
    config = TokenizerConfig(**{**vars(config), "work_dir": tmp_path / "work", "extended_tokenizer": tmp_path / "out"})
    extend.run(config)
    times = {s: (tmp_path / "work" / s / "manifest.json").stat().st_mtime_ns for s in ("baseline", "corpus", "selection")}
    changed = TokenizerConfig(**{**vars(config), "aux_tokenizer": AuxConfig(vocab_size=500), "seed": 3})
    assert extend.run(changed).skipped
    fewer = TokenizerConfig(**{**vars(config), "selection": SelectionConfig(new_tokens=30, min_freq=3)})
    with pytest.raises(SopError, match="made with other settings"):
        extend.run(fewer)
    assert extend.STAGE.run(fewer, overwrite=True).stats["tokens"] == 30
    after = {s: (tmp_path / "work" / s / "manifest.json").stat().st_mtime_ns for s in times}
    assert [s for s in times if after[s] != times[s]] == ["selection"]


def test_a_plan_for_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    qwen, smol = (extend.baseline.opened(config_of(folder, n)) for n in ("qwen", "smollm2"))
    rows = read_plan(config_of(folder, "qwen").below("selection").folder / select.PLAN)
    extend.check_plan(qwen, rows)
    with pytest.raises(SopError, match="ids begin at") as caught:
        extend.check_plan(smol, rows)
    assert caught.value.code == DATA


def test_manifest_stats_hold_what_the_summary_needs(folder: Path) -> None:
    done = extend.run(config_of(folder, "qwen"))
    assert {"tokens_per_char_before", "tokens_per_char_after", "reduction", "changed_regression_lines"} <= done.stats.keys()
    assert set(done.stats["changed_regression_lines"]) == set(regression.NAMES)
    assert done.stats["changed_regression_lines"]["english"] == done.stats["changed_regression_lines"]["code"] == 0
    assert done.stats["reduction"] == pytest.approx(1 - done.stats["tokens_per_char_after"] / done.stats["tokens_per_char_before"], abs=1e-3)
