from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from self_model_sop.errors import DATA, SopError
from self_model_sop.tokenizer import resize
from self_model_sop.tokenizer.new_rows import Counts, mix
from self_model_sop.tokenizer.settings import ResizeConfig, TokenizerConfig
from self_model_sop.train.model import load_model, load_tokenizer
from tiny_extensions import WORDS, extend_bpe, extend_wordpiece
from tiny_models import tiny_bert, tiny_llama, tiny_qwen

MAKERS = {"qwen": (tiny_qwen, extend_bpe, "causal"), "llama": (tiny_llama, extend_bpe, "causal"), "bert": (tiny_bert, extend_wordpiece, "masked")}
INITS = ("random", "library", "mean_of_pieces", "weighted", "count_bias")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resize")


def pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Base folder and extended tokenizer folder, made once."""
    make, extend, _ = MAKERS[name]
    base, extended = folder / name, folder / f"{name}-extended"
    if not base.exists():
        extend(make(base), WORDS, extended)
    return base, extended


def config_of(folder: Path, name: str, out: Path, **settings: Any) -> TokenizerConfig:
    base, extended = pair(folder, name)
    corpus = out.parent / "work" / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    texts = [f"{first}、{second}" for first in WORDS for second in ("高山高楼", "感谢感想", "定位定价", "喝茶喝酒", "糖果糖浆")]
    text = "".join(json.dumps({"text": t, "source": "s", "weight": 1.0}, ensure_ascii=False) + "\n" for t in texts)
    (corpus / "train.jsonl").write_text(text, encoding="utf-8")
    return TokenizerConfig(base_tokenizer=str(base), extended_tokenizer=extended, extended_model=out, work_dir=out.parent / "work", resize=ResizeConfig(**settings))


def tables(model: Any) -> dict[str, torch.Tensor]:
    head = model.get_output_embeddings()
    found = {"input": model.get_input_embeddings().weight, "output": head.weight, "bias": head.bias}
    return {k: v.detach() for k, v in found.items() if v is not None}


@pytest.mark.parametrize(("name", "init"), [*(("llama", init) for init in INITS), *((name, init) for name in ("qwen", "bert") for init in ("mean_of_pieces", "count_bias"))])
def test_old_rows_stay_bit_identical_and_the_tie_stays(folder: Path, tmp_path: Path, name: str, init: str) -> None:
    config = config_of(folder, name, tmp_path / "model", init=init)
    done = resize.run(config)
    kind = MAKERS[name][2]
    before, after = load_model(config.base_tokenizer, kind=kind), load_model(done.path, kind=kind)
    old, new = tables(before), tables(after)
    rows, expansion = old["input"].shape[0], json.loads((config.extended_tokenizer / "expansion.json").read_text())
    assert done.stats["rows_after"] == expansion["new_ids"][1] == new["input"].shape[0] == rows + done.stats["new_rows"]
    assert done.stats["init"] == init and done.stats["kind"] == kind
    assert all(torch.equal(new[k][:rows], old[k]) for k in old)
    assert resize.is_tied(after) == resize.is_tied(before) == done.stats["tied"] == (name != "llama")
    assert all(torch.isfinite(v).all() for v in new.values())
    assert after.config.vocab_size == new["input"].shape[0]


def test_new_rows_are_what_each_method_says(folder: Path, tmp_path: Path) -> None:
    made = {init: resize.run(config_of(folder, "llama", tmp_path / init / "model", init=init)) for init in INITS}
    model = load_model(pair(folder, "llama")[0])
    new = {init: tables(load_model(done.path)) for init, done in made.items()}
    old, start = tables(model), made["random"].stats["new_ids"][0]
    base, extended = (load_tokenizer(p) for p in pair(folder, "llama"))
    pieces = [t.id for t in base.backend_tokenizer.model.tokenize(extended.convert_ids_to_tokens(start + 3))]
    assert len(pieces) > 1 and extended.decode([start + 3]) == base.decode(pieces)
    rows = {init: (t["input"][start + 3], t["output"][start + 3]) for init, t in new.items()}
    weights = torch.arange(1.0, len(pieces) + 1)
    last = (weights / weights.sum()) @ old["input"][pieces]
    for i, table in enumerate(("input", "output")):
        assert torch.allclose(rows["mean_of_pieces"][i], old[table][pieces].mean(0), atol=1e-6)
    assert torch.allclose(rows["weighted"][0], last, atol=1e-6) and torch.equal(rows["weighted"][1], old["output"][pieces[0]])
    assert torch.allclose(rows["library"][0], old["input"][:start].mean(0), atol=1e-6)
    assert torch.equal(new["count_bias"]["input"], new["weighted"]["input"]) and not torch.equal(new["count_bias"]["output"], new["weighted"]["output"])
    assert 0.01 < new["random"]["input"][start:].std() < 0.03


def test_the_count_bias_lowers_the_logits_of_tokens_rarer_than_their_first_piece(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "llama", tmp_path / "count_bias" / "model", init="count_bias")
    plain, biased = resize.run(config_of(folder, "llama", tmp_path / "weighted" / "model", init="weighted")), resize.run(config)
    text = "".join(resize.training_text(config)[:10])
    ids = torch.tensor([load_tokenizer(config.base_tokenizer)(text, add_special_tokens=False)["input_ids"][:128]])
    start = plain.stats["new_ids"][0]
    with torch.inference_mode():
        difference = (load_model(biased.path)(ids).logits - load_model(plain.path)(ids).logits)[0].mean(0)
    assert torch.equal(difference[:start], torch.zeros(start))
    assert (difference[start:] < 1e-4).all() and difference[start:].min() < -0.2


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_calibrated_rows_are_expected_as_often_as_they_occur(folder: Path, tmp_path: Path, name: str) -> None:
    config = config_of(folder, name, tmp_path / "calibrated" / "model", init="calibrated")
    plain, done = resize.run(config_of(folder, name, tmp_path / "plain" / "model", init="mean_of_pieces" if name == "qwen" else "weighted")), resize.run(config)
    tokenizer, ids = load_tokenizer(done.path), range(*done.stats["new_ids"])
    texts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in resize.training_text(config)]
    found = torch.zeros(len(ids)).index_add_(0, torch.tensor([i - ids.start for t in texts for i in t[1:] if i in ids]), torch.ones(sum(i in ids for t in texts for i in t[1:])))
    off = {}
    for model in (plain, done):
        loaded = load_model(model.path)
        with torch.inference_mode():
            expected = sum(torch.softmax(loaded(torch.tensor([t])).logits[0, :-1].float(), 1)[:, ids.start : ids.stop].sum(0) for t in texts)
        off[model.path] = (torch.log((expected + 0.5) / (found + 0.5))).abs().mean()
    assert off[done.path] < off[plain.path]
    base, after = tables(load_model(config.base_tokenizer)), tables(load_model(done.path))
    assert all(torch.equal(after[k][: len(base[k])], base[k]) for k in base) and resize.is_tied(load_model(done.path)) == (name == "qwen")


def test_calibrated_rows_need_a_causal_model_and_this_is_known_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "bert", tmp_path / "model", init="calibrated")
    assert resize.STAGE.preflight is not None and [key for key, _, _ in resize.STAGE.preflight(config)] == ["resize.init"]
    with pytest.raises(SopError, match="calibrated is for causal models"):
        resize.run(config)


def test_auto_calibrates_tied_causal_models_and_takes_the_count_bias_for_untied_ones(folder: Path, tmp_path: Path) -> None:
    chosen = {name: resize.run(config_of(folder, name, tmp_path / name / "model")).stats["init"] for name in MAKERS}
    assert chosen == {"qwen": "calibrated", "llama": "count_bias", "bert": "mean_of_pieces"}
    shutil.rmtree((textless := config_of(folder, "qwen", tmp_path / "textless" / "model")).work_dir / "corpus")
    assert resize.run(textless).stats["init"] == "mean_of_pieces"


def test_spare_rows_are_used_and_a_multiple_never_shrinks(folder: Path, tmp_path: Path) -> None:
    base, _ = pair(folder, "qwen")
    spare = tmp_path / "spare"
    shutil.copytree(base, spare)
    model = load_model(base)
    with torch.random.fork_rng():
        model.resize_token_embeddings(600, mean_resizing=False)
    model.save_pretrained(spare)
    config = replace(config_of(folder, "qwen", tmp_path / "model", pad_to_multiple_of=16), base_model=str(spare))
    done = resize.run(config)
    first, last = done.stats["new_ids"]
    old, new = model.get_input_embeddings().weight.detach(), load_model(done.path).get_input_embeddings().weight.detach()
    assert last < 600 and done.stats["rows_before"] == 600 and done.stats["rows_after"] == 608 == new.shape[0]
    assert torch.equal(new[:first], old[:first]) and torch.equal(new[last:600], old[last:])
    assert not torch.equal(new[first:last], old[first:last])
    assert torch.allclose(new[600:], old[:first].mean(0).expand(8, -1), atol=1e-6)


@pytest.mark.parametrize(("rows", "last", "multiple", "expected"), [(600, 572, None, 600), (600, 572, 64, 640), (555, 572, None, 572), (640, 600, 64, 640), (100, 101, 1, 101)])
def test_rows_needed(rows: int, last: int, multiple: int | None, expected: int) -> None:
    assert resize.rows_needed(rows, last, multiple) == expected >= max(rows, last)


def test_the_tokenizer_beside_the_model_is_the_extended_one_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "qwen", tmp_path / "model")
    done = resize.run(config)
    for path in config.extended_tokenizer.iterdir():
        assert (done.path / path.name).read_bytes() == path.read_bytes(), path.name
    base, saved = load_tokenizer(config.base_tokenizer), load_tokenizer(done.path)
    talk = [{"role": "user", "content": "高血压？"}]
    assert saved.apply_chat_template(talk, tokenize=False) == base.apply_chat_template(talk, tokenize=False)
    assert len(saved("高血压患者应当定期测量血压")["input_ids"]) < len(base("高血压患者应当定期测量血压")["input_ids"])
    assert (done.path / "generation_config.json").is_file() and not list(done.path.glob("*.bin"))


def test_the_same_settings_are_up_to_date_and_others_are_refused(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "qwen", tmp_path / "model")
    first, again = resize.run(config), resize.run(config)
    assert again.skipped and again.manifest["fingerprint"] == first.manifest["fingerprint"]
    assert resize.run(replace(config, seed=config.seed, corpus=replace(config.corpus, held_out=0.2))).skipped  # a key that this stage does not read
    with pytest.raises(SopError, match=r"resize\.init"):
        resize.run(replace(config, resize=ResizeConfig(init="random")))


def test_the_checkpoints_dtype_is_kept(folder: Path, tmp_path: Path) -> None:
    base, _ = pair(folder, "qwen")
    half = tmp_path / "half"
    shutil.copytree(base, half)
    load_model(base, dtype="bfloat16").save_pretrained(half)
    done = resize.run(replace(config_of(folder, "qwen", tmp_path / "model"), base_model=str(half)))
    assert done.stats["dtype"] == "bfloat16"
    assert torch.equal(load_model(done.path, dtype="auto").get_input_embeddings().weight[:555], load_model(half, dtype="auto").get_input_embeddings().weight)


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_sequence_to_sequence_models(folder: Path, tmp_path: Path, architecture: str) -> None:
    import transformers

    base, _ = pair(folder, "qwen")
    common: dict[str, Any] = {"vocab_size": 555, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 0}
    if architecture == "t5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(d_ff=32, d_kv=16, num_layers=1, num_heads=2, **common))
    else:
        sizes = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in (("layers", 1), ("ffn_dim", 32), ("attention_heads", 2))}
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(bos_token_id=1, eos_token_id=2, **sizes, **common))
    own = tmp_path / architecture
    model.save_pretrained(own)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, own / name)
    extended = extend_bpe(own, WORDS, tmp_path / "extended")
    config = TokenizerConfig(base_tokenizer=str(own), extended_tokenizer=extended, extended_model=tmp_path / "model", work_dir=tmp_path / "work")
    done = resize.run(config)
    after = load_model(done.path, kind="seq2seq")
    assert done.stats["kind"] == "seq2seq" and torch.equal(after.get_input_embeddings().weight[:555], model.get_input_embeddings().weight)
    assert after.generate(torch.tensor([[5, 6, 570]]), max_new_tokens=3, do_sample=False).shape[0] == 1


def test_without_a_corpus_the_plans_counts_serve(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "llama", tmp_path / "model")
    shutil.rmtree(config.below("corpus").folder)
    extended = tmp_path / "extended"
    shutil.copytree(config.extended_tokenizer, extended)
    tokenizer, base = load_tokenizer(extended), load_tokenizer(config.base_tokenizer)
    ids = json.loads((extended / "expansion.json").read_text())["new_ids"]
    rows = []
    for n, i in enumerate(range(*ids)):
        pieces = [t.id for t in base.backend_tokenizer.model.tokenize(tokenizer.convert_ids_to_tokens(i))]
        rows.append({"id": i, "text": tokenizer.decode([i]), "pieces": pieces, "train_count": 1 + n})
    (extended / "plan.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    done = resize.run(replace(config, extended_tokenizer=extended))
    assert done.stats["init"] == "count_bias" and not (done.path / "plan.jsonl").exists()


def test_mix_and_log_ratios() -> None:
    table = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(mix(table, [[0, 2]], "mean")[0], (table[0] + table[2]) / 2)
    assert torch.allclose(mix(table, [[0, 2]], "last")[0], (table[0] + 2 * table[2]) / 3)
    assert torch.equal(mix(table, [[1, 2], []], "first"), torch.stack([table[1], table.mean(0)]))
    ratios = Counts([10, 0, 3], {7: 40, 8: 5, 9: 3}).log_ratios([[7, 8], [8], [6]])
    assert ratios[0] == pytest.approx(-1.350, abs=1e-3) and ratios[1] < -2 and ratios[2] == 0.0


# --- what does not belong together --------------------------------------------------------------------------------------------------------


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "qwen", tmp_path / "model")
    with pytest.raises(SopError) as caught:
        resize.run(replace(config, base_tokenizer=str(tiny_qwen(tmp_path / "other", vocab_size=500))))
    assert caught.value.code == DATA and "had id" in caught.value.what and not (tmp_path / "model" / "manifest.json").exists()


def test_a_model_smaller_than_its_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, "qwen", tmp_path / "model")
    with pytest.raises(SopError, match=r"has \d+ embedding rows, its tokenizer needs 555") as caught:
        resize.run(replace(config, base_model=str(tiny_qwen(tmp_path / "small", vocab_size=400))))
    assert caught.value.code == DATA


def changed_record(folder: Path, tmp_path: Path, change: dict[str, Any]) -> TokenizerConfig:
    config = config_of(folder, "qwen", tmp_path / "model")
    extended = tmp_path / "extended"
    shutil.copytree(config.extended_tokenizer, extended)
    record = json.loads((extended / "expansion.json").read_text())
    (extended / "expansion.json").write_text(json.dumps({**record, **change}))
    return replace(config, extended_tokenizer=extended)


@pytest.mark.parametrize(
    ("change", "words"), [({"new_ids": [555, 560]}, "do not follow"), ({"new_ids": [550, 572]}, "do not follow"), ({"base_vocab_size": 3}, "extended from a base of 3")]
)
def test_a_record_that_does_not_match_is_refused(folder: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(SopError, match=words):
        resize.run(changed_record(folder, tmp_path, change))


def test_a_row_that_no_token_uses_is_the_mean_row(folder: Path, tmp_path: Path) -> None:
    done = resize.run(changed_record(folder, tmp_path, {"new_ids": [556, 572]}))
    table = load_model(done.path).get_input_embeddings().weight.detach()
    assert torch.allclose(table[555], table[:555].mean(0), atol=1e-4)


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, extended = pair(folder, "qwen")
    yaml = tmp_path / "config.yaml"
    yaml.write_text(f"base_tokenizer: {base}\nextended_tokenizer: {extended}\nextended_model: {tmp_path / 'model'}\nwork_dir: {tmp_path / 'w'}\n", encoding="utf-8")
    assert resize.main(["--config", str(yaml), "resize.init=weighted"]) == 0
    assert "new ones by weighted" in capsys.readouterr().out
    assert resize.main(["--config", str(yaml), "resize.init=weighted"]) == 0
    assert "up to date" in capsys.readouterr().out
    assert resize.main(["--config", str(yaml), "resize.pad_to_multiple_of=0"]) == 2
    assert "pad_to_multiple_of" in capsys.readouterr().err
