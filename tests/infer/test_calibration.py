"""What quantisation is calibrated on: which rows, in which order, how written, and never what the result is judged on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.errors import DATA, SopError
from self_model_sop.infer.calibration import Calibration, collect, training_files
from self_model_sop.train.model import load_tokenizer
from self_model_sop.train.template import renderer_for
from tiny_models import tiny_qwen
from tiny_runs import chats, rows, texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and a folder as processing leaves it."""
    path = tmp_path_factory.mktemp("calibration")
    tiny_qwen(path / "model")
    texts(path / "final/pretrain/train.jsonl", 60)
    texts(path / "final/pretrain/validation.jsonl", 10, seed=9)
    chats(path / "final/finetune/train.jsonl", 20)
    rows(path / "final/reward/train.jsonl", [{"prompt": "问", "chosen": "好", "rejected": "坏"}])
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder / "model")


def _collect(folder: Path, tokenizer: Any, files: list[Path] | None = None, **more: Any) -> Calibration:
    return collect(files or training_files([folder / "final"]), tokenizer, **{"samples": 8, "length": 64, "seed": 0, **more})


def test_a_processed_folder_stands_for_passages_and_conversations(folder: Path, tmp_path: Path) -> None:
    assert training_files([folder / "final"]) == [folder / "final/pretrain/train.jsonl", folder / "final/finetune/train.jsonl"]
    assert training_files([folder / "final/finetune"]) == [folder / "final/finetune/train.jsonl"]
    assert training_files([folder / "final/reward/train.jsonl"]) == [folder / "final/reward/train.jsonl"]  # a file is what the user says
    with pytest.raises(SopError, match="no processed training data"):
        training_files([tmp_path])


def test_windows_are_full_counted_and_of_both_kinds(folder: Path, tokenizer: Any) -> None:
    made = _collect(folder, tokenizer)
    assert [len(ids) for ids in made.samples] == [64] * 8
    facts = made.facts
    assert facts["tokens"] == 512 and facts["rows"] == 80 and facts["rows_used"] == facts["passages"] + facts["conversations"]
    assert facts["passages"] > 0 and facts["conversations"] > 0 and facts["unread"] == {}


def test_the_seed_and_the_texts_decide_and_neither_files_nor_lines(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    made = _collect(folder, tokenizer)
    assert _collect(folder, tokenizer) == made
    assert _collect(folder, tokenizer, seed=1).samples != made.samples
    lines = [line for file in training_files([folder / "final"]) for line in file.read_text(encoding="utf-8").splitlines()]
    for name, part in (("a", lines[1::2]), ("b", lines[::2][::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in part), encoding="utf-8")
    assert _collect(folder, tokenizer, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]) == made


def test_a_conversation_is_written_by_the_template_and_a_passage_ends_as_in_pretraining(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "高血压患者应当注意什么？"}, {"role": "assistant", "content": "按时服药，定期测量血压，注意休息，多喝水。"}]
    wanted = renderer_for(tokenizer).render(talk).ids
    file = rows(tmp_path / "talk.jsonl", [{"messages": talk}])
    assert _collect(folder, tokenizer, [file], samples=1, length=len(wanted)).samples == [wanted]
    passage = rows(tmp_path / "passage.jsonl", [{"text": "感冒通常由病毒引起。<|im_start|>多喝水。"}])
    ids = _collect(folder, tokenizer, [passage], samples=1, length=16).samples[0]
    marks = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|endoftext|>"])
    assert marks[0] not in ids, "what looks like a control token in a text is text"
    whole = tokenizer("感冒通常由病毒引起。", add_special_tokens=False)["input_ids"]
    short = rows(tmp_path / "short.jsonl", [{"text": "感冒通常由病毒引起。"}, {"text": "多喝水"}])
    found = _collect(folder, tokenizer, [short], samples=1, length=len(whole) + 1).samples[0]
    assert marks[1] in found


def test_many_texts_take_part_before_the_rest_of_a_long_one(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    long = [{"text": f"第{i}段。" + "多喝水，注意休息。" * 200} for i in range(6)]
    file = rows(tmp_path / "long.jsonl", long)
    assert _collect(folder, tokenizer, [file], samples=6).facts["passages"] == 6
    assert len(_collect(folder, tokenizer, [file], samples=20).samples) == 20, "the rest follows where all texts together do not suffice"


def test_equal_rows_count_once_and_unreadable_ones_are_counted(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    file = rows(tmp_path / "double.jsonl", [{"text": "多喝水，注意休息。" * 40}] * 3 + [{"text": "多喝水， 注意休息。" * 40}, {"unknown": 1}])
    file.write_text(file.read_text(encoding="utf-8") + "{broken\n", encoding="utf-8")
    facts = _collect(folder, tokenizer, [file], samples=1).facts
    assert facts["rows"] == 6 and facts["equal_rows"] == 3 and facts["rows_used"] == 1 and sum(facts["unread"].values()) == 2


def test_too_little_text_is_refused_with_the_numbers(folder: Path, tokenizer: Any) -> None:
    with pytest.raises(SopError, match=r"has [\d,]+ tokens; 512 samples of 64 need 32,768") as caught:
        _collect(folder, tokenizer, samples=512)
    assert caught.value.code == DATA
    enough = int(str(caught.value.fix).rsplit(" ", 1)[1])
    assert len(_collect(folder, tokenizer, samples=enough).samples) == enough


def test_a_row_of_the_held_out_text_is_refused_wherever_it_hides(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    heldout = folder / "final/pretrain/validation.jsonl"
    assert _collect(folder, tokenizer, heldout=heldout).facts["rows"] == 80
    text = json.loads(heldout.read_text(encoding="utf-8").splitlines()[3])["text"]
    mixed = rows(tmp_path / "mixed.jsonl", [{"text": "别的。"}, {"text": f" {text}\n"}])
    with pytest.raises(SopError, match="1 of the 82 calibration rows are in the held-out text too") as caught:
        _collect(folder, tokenizer, [*training_files([folder / "final"]), mixed], heldout=heldout)
    assert caught.value.code == DATA and caught.value.where == f"{mixed}:2"


def test_without_a_chat_template_conversations_are_plain_text(folder: Path, tokenizer: Any) -> None:
    bare = load_tokenizer(folder / "model")
    bare.chat_template = None
    made = _collect(folder, bare, [folder / "final/finetune/train.jsonl"], samples=2)
    assert made.facts["conversations"] == 0 and made.facts["passages"] > 0
