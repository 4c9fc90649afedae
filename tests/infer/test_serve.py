"""What is served, and whether the native server writes the prompts of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chat_tokenizers import FAMILIES, TEMPLATES
from self_model_sop.errors import DATA, USAGE, SopError
from self_model_sop.infer import serve
from self_model_sop.train import families
from self_model_sop.train.template import renderer_for
from tiny_gguf import tiny_gguf
from tiny_models import tiny_qwen

pytest.importorskip("xllamacpp", reason="the extra `serve` is not installed")
pytest.importorskip("aiohttp")
SMALL = serve.Config(context=64, parallel=1, threads=1, max_requests=4)


def checked(path: Path, template: str | None = None) -> dict[str, object]:
    """Start the native server on a file and compare its prompts with the one rendering (of `template`, or the file's own)."""
    served = serve.read_gguf(path)
    native = serve.start(SMALL, served, "m")
    tokenizer = served.renderer.tokenizer
    if template:
        tokenizer.chat_template = template
    return serve.check_rendering(renderer_for(tokenizer), native.prompt, bos=served.bos)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_server_writes_the_prompts_of_training_for_every_shipped_template(name: str, tmp_path: Path) -> None:
    file = families.read(TEMPLATES / f"{name}.json")
    bos = next((t for t in file.control if "begin" in t or t == "<s>"), None)
    path = tiny_gguf(tmp_path / "m.gguf", template=file.source, control=[*file.control, *file.stop], bos=bos, eos=next(iter(file.stop), None))
    variables = checked(path)
    assert variables == {"qwen3_chatml": {"enable_thinking": False}, "plain": {"bos_token": ""}}.get(name, {})


def test_another_template_than_that_of_training_is_refused(tmp_path: Path) -> None:
    source = families.read(TEMPLATES / "qwen2_chatml.json").source
    path = tiny_gguf(tmp_path / "m.gguf", template=source)
    with pytest.raises(SopError, match="other prompts"):  # a first token that nobody adds must be in the text
        checked(path, "<|endoftext|>" + source)
    with pytest.raises(SopError, match="other prompts than the model was trained on") as caught:
        checked(path, source.replace("<|im_start|>", "<|im_start|> "))
    assert caught.value.code == DATA


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    served = serve.read_gguf(tiny_gguf(tmp_path / "m.gguf"))
    assert served.context == 512 and {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} == set(served.control)


def test_which_file_a_folder_means(tmp_path: Path) -> None:
    with pytest.raises(SopError, match="no GGUF file"):
        serve.find_gguf(tmp_path)
    (tmp_path / "a-00001-of-00002.gguf").touch()
    (tmp_path / "a-00002-of-00002.gguf").touch()
    assert serve.find_gguf(tmp_path).name == "a-00001-of-00002.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(SopError, match="2 GGUF files"):
        serve.find_gguf(tmp_path)


def test_a_folder_of_transformers_is_told_the_command_that_converts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_qwen(tmp_path / "model")
    assert serve.main(["--model", str(folder)]) == USAGE
    assert "sop infer gguf --model_path" in capsys.readouterr().err
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    assert serve.main(["--model", str(adapter)]) == USAGE
    assert "merge it first" in capsys.readouterr().err


def test_what_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOP_API_KEY", "a-key-for-the-tests-only")
    text = tmp_path / "x.gguf"
    text.write_text("no model")
    torn = tiny_gguf(tmp_path / "torn.gguf")
    torn.write_bytes(torn.read_bytes()[:-40_000])
    for argv, code, words in (
        ([], USAGE, "no model to serve"),
        (["--model", str(tmp_path / "nothing")], USAGE, "no such file"),
        (["--model", str(text), "--port", "0"], DATA, "no GGUF file of a language model"),
        (["--model", str(torn), "--port", "0"], DATA, "no GGUF file of a language model"),
        (["--model", str(text), "--port", "70000"], USAGE, "port"),
        (["--model", str(text), "parallel=0"], USAGE, "parallel"),
    ):
        assert serve.main(argv) == code, argv
        assert words in capsys.readouterr().err, argv
