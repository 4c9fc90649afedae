from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from self_model_sop.config import ConfigError, load
from self_model_sop.errors import SopError
from self_model_sop.eval import compare
from self_model_sop.eval.generate import Answer, Decoding, distinct, generate, measure, repetition
from self_model_sop.eval.models import open_model
from self_model_sop.eval.perplexity import bits_per_byte
from self_model_sop.stage import load_for
from self_model_sop.train.template import renderer_for
from tiny_models import sentences, tiny_llama, tiny_qwen

TURNS = (("user", "什么是高血压？"), ("assistant", "一种慢性病。"), ("user", "谢谢"), ("assistant", "不客气！"))
TALKS: list[dict[str, Any]] = [
    {"messages": [{"role": role, "content": content} for role, content in TURNS]},
    {"instruction": "感冒怎么办", "input": "", "output": "多喝水，注意休息。"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tiny_qwen(folder / "qwen")
    tiny_llama(folder / "llama")
    write(folder / "text.jsonl", [{"text": t} for t in list(sentences())[:6]])
    write(folder / "talks.jsonl", [*TALKS, {"instruction": "no answer", "output": ""}, {"nothing": 1}])
    return folder


def config_of(folder: Path, out: Path, **changes: Any) -> compare.Config:
    given = {
        "models": {"small": str(folder / "qwen"), "other": str(folder / "llama")}, "texts": {"domain": folder / "text.jsonl"}, "sft_file": folder / "talks.jsonl",
        "prompts": ("你好",), "answers": Decoding(max_new_tokens=4), "window": 128, "output_dir": out,
    }  # fmt: skip
    return compare.Config(**{**given, **changes})


def test_a_table_of_two_models(folder: Path, tmp_path: Path) -> None:
    done = compare.run(config_of(folder, tmp_path / "out"))
    stats = done.stats
    assert list(stats["models"]) == ["small", "other"]
    for name in stats["models"]:
        assert stats["bits"][name]["domain"]["bits_per_byte"] > 0 and stats["bits"][name]["domain"]["documents"] == 6
        assert stats["sft"][name]["conversations"] == 2
        assert len(stats["answers"][name]["greedy"]) == 1 and stats["answers"][name]["greedy"][0]["tokens"] <= 4
    assert stats["bits"]["small"]["domain"]["bytes"] == stats["bits"]["other"]["domain"]["bytes"]
    assert stats["sft"]["small"]["bytes"] == stats["sft"]["other"]["bytes"] == sum(len(t.encode()) for t in ("一种慢性病。", "不客气！", "多喝水，注意休息。"))
    assert json.loads((done.path / "results.json").read_text())["bits"] == stats["bits"]
    page = (done.path / "results.md").read_text()
    assert "| model | parameters | vocabulary | domain: bits/byte | change | tokens/char |" in page and "| other | 0.2 M |" in page and "你好" in page
    assert any(line.startswith("other") and "%" in line for line in compare.STAGE.summary(done))


def test_the_loss_on_assistant_tokens_is_that_of_the_trainer(folder: Path) -> None:
    config = config_of(folder, folder / "unused", window=512)
    opened = open_model(folder / "qwen")
    talk = TALKS[0]["messages"]
    rendered = renderer_for(opened.tokenizer).render(talk)
    with torch.inference_mode():
        loss = float(opened.model(torch.tensor([rendered.ids]), labels=torch.tensor([rendered.labels]), use_cache=False).loss)
    found = compare.measure_sft(opened, config, [talk])
    assert found["nats_per_token"] == pytest.approx(loss, rel=1e-5) and found["tokens"] == sum(rendered.supervised)
    assert found["nats_per_byte"] == pytest.approx(found["nll_nats"] / len("一种慢性病。不客气！".encode()))


def test_measuring_a_text_first_changes_nothing_of_what_follows(folder: Path, tmp_path: Path) -> None:
    """Reading a text with special tokens as text must not leave the tokenizer so: control tokens of the template would come out as text."""
    opened = open_model(folder / "qwen")
    renderer = renderer_for(opened.tokenizer)
    before = renderer.render(TALKS[0]["messages"]).ids
    bits_per_byte(*opened, ["高血压<|im_end|>"], window=64, batch_size=1)
    assert renderer.render(TALKS[0]["messages"]).ids == before == renderer_for(opened.tokenizer).render(TALKS[0]["messages"]).ids
    assert opened.tokenizer.backend_tokenizer.encode("<|im_end|>").ids == [opened.tokenizer.eos_token_id]
    opened.tokenizer("x", split_special_tokens=True)  # what the library leaves behind does not matter to the rendering either
    assert renderer.render(TALKS[0]["messages"]).ids == before
    alone = compare.run(config_of(folder, tmp_path / "alone", texts={}))
    together = compare.run(config_of(folder, tmp_path / "together"))
    assert alone.stats["sft"] == together.stats["sft"] and alone.stats["answers"] == together.stats["answers"]


def test_only_what_changed_is_measured_again(folder: Path, tmp_path: Path) -> None:
    changing = tmp_path / "changing"
    shutil.copytree(folder / "llama", changing)
    config = config_of(folder, tmp_path / "out", models={"small": str(folder / "qwen"), "changing": str(changing)})
    first = compare.run(config)
    assert (first.stats["measured"], first.stats["from_cache"]) == (8, 0)
    assert compare.run(config).skipped
    tiny_llama(changing, seed=1)
    second = compare.STAGE.run(config, overwrite=True)
    assert (second.stats["measured"], second.stats["from_cache"]) == (4, 4)
    assert second.stats["bits"]["small"] == first.stats["bits"]["small"] and second.stats["bits"]["changing"] != first.stats["bits"]["changing"]
    more = compare.STAGE.run(replace(config, texts={**config.texts, "again": folder / "talks.jsonl"}), overwrite=True)
    assert (more.stats["measured"], more.stats["from_cache"]) == (2, 8)
    assert compare.STAGE.run(replace(config, window=64), overwrite=True).stats["from_cache"] == 4  # what does not depend on the window
    assert not [o for o in more.manifest["outputs"] if ".cache" in o["path"]]


def test_an_adapter_folder_is_a_model_and_its_base_decides_too(folder: Path, tmp_path: Path) -> None:
    import peft

    base = tmp_path / "base"
    shutil.copytree(folder / "llama", base)
    torch.manual_seed(0)
    model = peft.get_peft_model(open_model(base).model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    config = config_of(folder, tmp_path / "out", models={"base": str(base), "tuned": str(tmp_path / "adapter")}, sft_file=None, prompts=())
    done = compare.run(config)
    assert done.stats["bits"]["tuned"]["domain"]["bits_per_byte"] != done.stats["bits"]["base"]["domain"]["bits_per_byte"]
    assert "model tuned base" in done.manifest["inputs"]
    tiny_llama(base, seed=3)
    again = compare.STAGE.run(config, overwrite=True)
    assert again.stats["from_cache"] == 0


def test_the_same_documents_for_every_model(folder: Path, tmp_path: Path) -> None:
    done = compare.run(config_of(folder, tmp_path / "out", sft_file=None, prompts=(), max_documents=3))
    assert {name: bits["domain"]["documents"] for name, bits in done.stats["bits"].items()} == {"small": 3, "other": 3}
    assert len({bits["domain"]["bytes"] for bits in done.stats["bits"].values()}) == 1


def test_long_documents_are_read_up_to_a_limit_and_long_conversations_left_out(folder: Path, tmp_path: Path) -> None:
    whole = compare.run(config_of(folder, tmp_path / "whole", prompts=())).stats
    short = compare.run(config_of(folder, tmp_path / "short", prompts=(), max_chars=15, cache_dir=tmp_path / "whole" / ".cache")).stats
    assert short["bits"]["small"]["domain"]["documents"] == whole["bits"]["small"]["domain"]["documents"]
    assert short["bits"]["small"]["domain"]["chars"] < whole["bits"]["small"]["domain"]["chars"]
    assert short["sft"]["small"]["conversations"] < whole["sft"]["small"]["conversations"]


def test_sampled_answers_are_seeded(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "a", sft_file=None, texts={}, samples=2, answers=Decoding(max_new_tokens=6, temperature=1.5, seed=3))
    first, second = compare.run(config), compare.run(replace(config, output_dir=tmp_path / "b"))
    assert first.stats["answers"] == second.stats["answers"]
    texts = [a["text"] for a in first.stats["answers"]["small"]["sampled"][0]]
    assert len(texts) == 2 and texts[0] != texts[1]


def test_yaml_with_names_paths_and_mistakes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "models").symlink_to(folder)
    yaml = tmp_path / "config" / "compare.yaml"
    yaml.write_text("models:\n  base: models/qwen\n  hub: owner/name\ntexts:\n  domain: models/text.jsonl\n", encoding="utf-8")
    config = load_for(compare.STAGE, yaml, []).config
    assert config.models == {"base": str(tmp_path / "models" / "qwen"), "hub": "owner/name"} and config.texts["domain"] == tmp_path / "models" / "text.jsonl"
    yaml.write_text("models:\n  base: ./models/qwem\ntexts:\n  domain: models/text.jsonl\n  more: models/nothing.jsonl\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(compare.Config, yaml)
    assert [p.where.rsplit(":", 1)[1] for p in caught.value.problems] == ["2", "5"] and "qwen" in caught.value.problems[0].fix
    yaml.write_text("samples: 2\nwindow: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_for(compare.STAGE, yaml, [])
    assert len(caught.value.problems) == 4


def test_texts_that_hold_nothing_are_named(folder: Path, tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl", [{"nothing": 1}])
    with pytest.raises(SopError, match=r"no texts in this file") as caught:
        compare.run(config_of(folder, tmp_path / "out", texts={"empty": empty}))
    assert caught.value.code == 3 and "unknown_format" in (caught.value.fix or "")


# --- answers ------------------------------------------------------------------------------------------------------------------------------


def test_greedy_answers_ignore_the_models_own_sampling_and_stop_at_stop_ids(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(folder / "qwen", own)
    settings = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0}
    (own / "generation_config.json").write_text(json.dumps({**json.loads((own / "generation_config.json").read_text()), **settings}))
    prompt = [10, 11, 12]
    answers = [generate(*open_model(p), prompt, [554], Decoding(max_new_tokens=8)) for p in (folder / "qwen", own)]
    assert answers[0] == answers[1] and not answers[0].stopped and answers[0].tokens == 8
    stop = answers[0].ids[2]
    cut = generate(*open_model(own), prompt, [stop], Decoding(max_new_tokens=8))
    assert cut.stopped and cut.ids == answers[0].ids[: answers[0].ids.index(stop) + 1] and len(cut.ids) <= 3


def test_streamed_text_is_the_answer(folder: Path) -> None:
    pieces: list[str] = []
    opened = open_model(folder / "qwen")
    answer = generate(*opened, [10, 11, 12], [], Decoding(max_new_tokens=24), on_text=pieces.append)
    assert "".join(pieces) == answer.text and len(pieces) > 1


def test_counts() -> None:
    assert distinct(["abab"], 2) == pytest.approx(2 / 3) and distinct([], 1) == 0.0 and distinct(["aa", "ab"], 1) == 0.5
    assert repetition("abcdefgh") == 0.0 and repetition("abcabcabcabc") == pytest.approx(1 - 3 / 9) and repetition("ab") == 0.0
    counts = measure([Answer("好好好好好", 5, True), Answer("", 1, False)])
    assert counts["stopped"] == 0.5 and counts["chars"] == 2.5 and counts["repetition"] == pytest.approx(0.25)


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"repetition_penalty": 0.0}])
def test_decoding_refuses_nonsense(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs max_new_tokens"):
        Decoding(**bad)
