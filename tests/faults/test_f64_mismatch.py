"""F64: a tokenizer and a model that do not belong together end in an error that says so, before anything is written or measured.

(That `pad = eos` does not hide the end from training, and that new rows train under LoRA, is tested with the trainers.)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.errors import DATA, SopError
from self_model_sop.eval import compare
from self_model_sop.infer import chat
from self_model_sop.tokenizer import mlm_loss, resize
from self_model_sop.tokenizer.settings import TokenizerConfig
from tiny_extensions import WORDS, extend_bpe, extend_wordpiece
from tiny_models import tiny_bert, tiny_llama, tiny_qwen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an extended tokenizer, and models that carry the larger tokenizer without the rows for it."""
    folder = tmp_path_factory.mktemp("f64")
    extend_bpe(tiny_qwen(folder / "qwen"), WORDS, folder / "extended")
    shutil.copytree(folder / "qwen", folder / "too_small")
    for path in (folder / "extended").iterdir():
        shutil.copyfile(path, folder / "too_small" / path.name)
    extend_wordpiece(tiny_bert(folder / "bert"), WORDS, folder / "bert_too_small")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / "bert" / name, folder / "bert_too_small" / name)
    (folder / "text.jsonl").write_text('{"text": "高血压患者应当按时服药。"}\n', encoding="utf-8")
    return folder


def edited(folder: Path, out: Path, change: Callable[[dict[str, Any]], None], name: str = "tokenizer.json") -> Path:
    """A copy of the extended tokenizer with one JSON file changed."""
    shutil.copytree(folder / "extended", out)
    data = json.loads((out / name).read_text(encoding="utf-8"))
    change(data)
    (out / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return out


def swap_two_base_ids(data: dict[str, Any]) -> None:
    vocab = data["model"]["vocab"]
    one, other = list(vocab)[300], list(vocab)[301]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def another_end_token(data: dict[str, Any]) -> None:
    data["eos_token"] = "<|endoftext|>"


def refused(folder: Path, tmp_path: Path, **settings: Any) -> SopError:
    given = {"base_tokenizer": str(folder / "qwen"), "extended_tokenizer": folder / "extended", "extended_model": tmp_path / "model", "work_dir": tmp_path / "work"}
    with pytest.raises(SopError) as caught:
        resize.run(TokenizerConfig(**{**given, **settings}))
    assert caught.value.code == DATA and caught.value.fix
    assert not (tmp_path / "model" / "manifest.json").exists() and not list((tmp_path / "model").glob("*.safetensors"))
    return caught.value


def test_f64_base_ids_that_moved(folder: Path, tmp_path: Path) -> None:
    assert "had id" in refused(folder, tmp_path, extended_tokenizer=edited(folder, tmp_path / "moved", swap_two_base_ids)).what


def test_f64_a_special_token_that_changed_its_role(folder: Path, tmp_path: Path) -> None:
    wrong = edited(folder, tmp_path / "role", another_end_token, "tokenizer_config.json")
    assert "eos_token was '<|im_end|>'" in refused(folder, tmp_path, extended_tokenizer=wrong).what


def test_f64_a_chat_template_that_writes_another_text(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "extended", tmp_path / "template")
    template = tmp_path / "template" / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("helpful", "hopeful"), encoding="utf-8")
    assert "chat template" in refused(folder, tmp_path, extended_tokenizer=tmp_path / "template").what


def test_f64_an_extension_of_another_base(folder: Path, tmp_path: Path) -> None:
    assert "had id" in refused(folder, tmp_path, base_tokenizer=str(tiny_llama(tmp_path / "llama"))).what


def test_f64_a_model_with_fewer_rows_than_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    assert "embedding rows, its tokenizer needs" in refused(folder, tmp_path, base_model=str(tiny_qwen(tmp_path / "small", vocab_size=300))).what


def test_f64_evaluation_of_a_tokenizer_larger_than_the_model(folder: Path, tmp_path: Path) -> None:
    config = compare.Config(models={"wrong": str(folder / "too_small")}, texts={"text": folder / "text.jsonl"}, output_dir=tmp_path / "out")
    with pytest.raises(SopError, match=r"the tokenizer needs 572 embedding rows, the model has 555") as caught:
        compare.run(config)
    assert caught.value.code == DATA


def test_f64_chat_with_a_tokenizer_larger_than_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main(["--model", str(folder / "too_small"), "--prompt", "你好"]) == DATA
    assert "embedding rows" in capsys.readouterr().err


def test_f64_masked_loss_with_a_tokenizer_larger_than_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mlm_loss.main(["--model_path", str(folder / "bert_too_small"), "--test_data", str(folder / "text.jsonl")]) == DATA
    assert "embedding rows" in capsys.readouterr().err
