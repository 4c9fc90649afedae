"""GPTQ: what is refused before anything is loaded, and (where gptqmodel is installed) a real quantisation of a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from self_model_sop.config import ConfigError
from self_model_sop.errors import DATA, ENVIRONMENT, SopError
from self_model_sop.infer import awq, gptq
from self_model_sop.infer.quantize import half, inputs_of_layers
from self_model_sop.train.model import load_model, load_tokenizer
from tiny_models import tiny_qwen
from tiny_runs import chats, expanded, run, texts

ROOT = Path(__file__).parents[2]
LIBRARY = importlib.util.find_spec("gptqmodel") is not None and importlib.util.find_spec("optimum") is not None
needs_library = pytest.mark.skipif(not LIBRARY, reason="gptqmodel is not installed here: pip install 'self-model-sop[quantize]' (its numpy and protobuf differ from the core's)")
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "expansion.json")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied model of an expanded vocabulary whose weights matter, and processed data."""
    path = tmp_path_factory.mktemp("gptq")
    model = load_model(tiny_qwen(path / "model"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj.weight" in name:
                parameter.mul_(6)
    model.save_pretrained(path / "model")
    expanded(path / "model")
    texts(path / "final/pretrain/train.jsonl", 60)
    texts(path / "final/pretrain/validation.jsonl", 10, seed=9)
    chats(path / "final/finetune/train.jsonl", 20)
    return path


def settings(root: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "model_path": root / "model", "output_path": out, "group_size": 32, "calib_data": [str(root / "final")], "calib_samples": 8, "calib_seq_len": 64, "device": "cpu",
        "parity__heldout": root / "final/pretrain/validation.jsonl", "parity__prompts": 4, "parity__tokens": 8, "parity__lines": 50,
        "parity__bounds__q4": {"agreement": 0.3, "kl": 0.3, "bits": 0.1}, **more,  # the first of 640 random words is nobody's by much
    }  # fmt: skip


def _refused(root: Path, out: Path, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        run(gptq.STAGE, settings(root, out, **more))
    assert not out.exists()
    return str(caught.value)


# --- before anything is loaded -----------------------------------------------------------------------------------------------------------------


def test_a_group_size_that_does_not_divide_names_the_nearest_that_does(root: Path, tmp_path: Path) -> None:
    assert inputs_of_layers(root / "model") == {64, 128}  # hidden size, and the inputs of down_proj: not the embeddings'
    said = _refused(root, tmp_path / "out", group_size=128)
    assert "128 does not divide the inputs of its layers (64)" in said and "--group_size 64" in said
    assert "48 is no group size that vLLM reads" in _refused(root, tmp_path / "out", group_size=48)


@pytest.mark.parametrize(("more", "words"), [
    ({"bits": 3}, "3 bits are not written here"),
    ({"calib_seq_len": 4}, "at least 16 tokens"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(root: Path, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    assert words in _refused(root, tmp_path / "out", **more)


def test_calibrating_on_the_held_out_text_is_refused(root: Path, tmp_path: Path) -> None:
    heldout = root / "final/pretrain/validation.jsonl"
    assert "this is the text that the result is judged on" in _refused(root, tmp_path / "out", calib_data=[str(heldout)])


def test_what_is_no_model_to_quantise_is_refused(root: Path, tmp_path: Path) -> None:
    for name, files, words in (
        ("adapter", {"adapter_config.json": "{}"}, "holds an adapter"),
        ("pickled", {"config.json": "{}", "pytorch_model.bin": ""}, "holds no model"),
        ("done", {"config.json": '{"quantization_config": {"quant_method": "awq"}}', "model.safetensors": ""}, "quantised already (awq)"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        assert words in _refused(root, tmp_path / "out", model_path=folder)
    torn = shutil.copytree(root / "model", tmp_path / "torn")
    (torn / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(SopError, match="no safetensors file") as caught:
        run(gptq.STAGE, settings(root, tmp_path / "out", model_path=torn))
    assert caught.value.code == DATA


def test_a_missing_library_is_exit_4_with_the_line_that_installs_it(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    with pytest.raises(SopError, match="'gptqmodel' is not installed") as caught:
        run(gptq.STAGE, settings(root, tmp_path / "out"))
    assert caught.value.code == ENVIRONMENT and "self-model-sop[quantize]" in str(caught.value.fix)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("stage", [gptq, awq], ids=["gptq", "awq"])
def test_the_documented_flags(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: Any) -> None:
    monkeypatch.chdir(ROOT)
    flags = {"--model_path": root / "model", "--output_path": tmp_path / "out", "--bits": 4, "--group_size": 32, "--calib_data": root / "final"}
    flags |= {"--calib_samples": 16, "--calib_seq_len": 64}
    given = [str(part) for pair in flags.items() for part in pair]
    assert stage.main([*given, "--dry-run", f"parity.heldout={root / 'final/pretrain/validation.jsonl'}"]) == 0
    said = capsys.readouterr().out
    assert f"{root / 'model'} -> {tmp_path / 'out'}: 4 bits, groups of 32" in said and f"calibrated on 16 x 64 tokens of {root / 'final'}" in said
    assert not (tmp_path / "out").exists()


def test_what_is_not_quantised_keeps_16_bits(tmp_path: Path) -> None:
    for stored, device, wanted in (("float16", "cuda", "float16"), ("float16", "cpu", "bfloat16"), ("bfloat16", "cuda", "bfloat16"), ("float32", "cuda", "bfloat16")):
        (tmp_path / "config.json").write_text(json.dumps({"dtype": stored}), encoding="utf-8")
        assert half(tmp_path, device) == wanted


@pytest.mark.skipif(LIBRARY, reason="gptqmodel is installed here")
def test_loading_a_quantised_model_without_the_library_names_the_extra(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / "model", tmp_path / "model")
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    (folder / "config.json").write_text(json.dumps(named), encoding="utf-8")
    with pytest.raises(SopError, match="package that is not installed") as caught:
        load_model(folder)
    assert caught.value.code == ENVIRONMENT and "self-model-sop[quantize]" in str(caught.value.fix)


# --- for real --------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(root: Path) -> Any:
    """Quantised from a working directory of its own, in which nothing may be left."""
    before = Path.cwd()
    (root / "cwd").mkdir()
    os.chdir(root / "cwd")
    try:
        return run(gptq.STAGE, settings(root, root / "out"))
    finally:
        os.chdir(before)


@needs_library
def test_the_result_loads_and_answers_nearly_as_its_source(root: Path, done: Any) -> None:
    stats = done.stats
    assert stats["layers"] == 2 * 7 and stats["bytes"] < stats["source_bytes"] and stats["calibration"]["tokens"] == 512
    assert stats["parity"]["bits_per_byte"]["change"] < 0.10 and stats["parity"]["kl"] > 0 and not stats["parity"]["violations"]
    assert stats["answer"]["text"] and json.loads((done.path / "parity.json").read_text(encoding="utf-8"))["allowed"] is False
    loaded, source = load_model(done.path), load_model(root / "model")
    ids = torch.arange(3, 400)[None]
    with torch.no_grad():
        a, b = loaded(ids).logits.float(), source(ids).logits
    assert not torch.equal(a, b) and float(torch.cosine_similarity(a, b, dim=-1).mean()) > 0.8, "wrong packing would leave nothing alike"
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight, "still tied"
    assert run(gptq.STAGE, settings(root, root / "out")).skipped


@needs_library
def test_the_vocabulary_is_as_it_was_trained_and_everything_beside_it_byte_for_byte(root: Path, done: Any) -> None:
    for name in _BESIDE:
        assert (done.path / name).read_bytes() == (root / "model" / name).read_bytes()
    assert load_tokenizer(done.path).get_vocab() == load_tokenizer(root / "model").get_vocab()
    tensors, source = load_file(done.path / "model.safetensors"), load_file(root / "model" / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], source["model.embed_tokens.weight"].bfloat16())
    assert not [name for name in tensors if "qweight" in name and "layers" not in name]
    assert {p.suffix for p in done.path.iterdir()} <= {".json", ".jinja", ".safetensors"}, "no log, no code, no pickle"
    assert not list((root / "cwd").iterdir()), "and nothing in the user's working directory"


@needs_library
def test_the_configuration_is_what_vllm_reads(done: Any) -> None:
    """Keys and values of vLLM's AutoGPTQConfig.from_config: 4 or 8 bits, symmetric, columns in order; and no path of this machine."""
    named = json.loads((done.path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert {k: named[k] for k in ("quant_method", "bits", "group_size", "desc_act", "sym", "lm_head", "checkpoint_format")} == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False, "checkpoint_format": "gptq",
    }  # fmt: skip
    assert not named.get("dynamic") and str(Path(done.path).parent) not in (done.path / "config.json").read_text(encoding="utf-8")


@needs_library
def test_it_is_the_algorithm_and_no_rounding(root: Path, done: Any) -> None:
    """GPTQ moves the error of each column into the columns after it: on its calibration text a layer comes out nearer to the source's than with rounded weights."""
    tensors, source = load_file(done.path / "model.safetensors"), load_file(root / "model" / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj"
    weight = source[f"{name}.weight"].bfloat16().float()
    shifts = torch.arange(0, 32, 4)
    codes = ((tensors[f"{name}.qweight"][:, None, :] >> shifts[None, :, None]) & 15).reshape(weight.shape[1], weight.shape[0])
    groups = tensors[f"{name}.g_idx"].long()
    made = ((codes - 8) * tensors[f"{name}.scales"].float()[groups]).T
    scale = tensors[f"{name}.scales"].float()[groups].T
    rounded = (weight / scale).round().clamp(-8, 7) * scale
    assert float((made != rounded).float().mean()) > 0.02, "some weights are not the nearest code"
    assert float((made - weight).abs().max()) < 3 * float(scale.max()), "and none is far away: the unpacking above is right"


@needs_library
def test_out_of_bounds_nothing_is_published_unless_it_is_allowed(root: Path, tmp_path: Path) -> None:
    strict = {"parity__bounds__q4": {"agreement": 0.3, "kl": 1e-9, "bits": 0.1}, "calib_samples": 2}
    with pytest.raises(SopError, match="does not answer as its source does") as caught:
        run(gptq.STAGE, settings(root, tmp_path / "out", **strict))
    assert caught.value.code == DATA and not [p for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")]
    assert json.loads((tmp_path / "out/.parity.failed.json").read_text(encoding="utf-8"))["violations"]
    allowed = run(gptq.STAGE, settings(root, tmp_path / "out", **strict, allow_divergence=True))
    assert allowed.stats["parity"]["allowed"] and allowed.stats["parity"]["violations"] and (allowed.path / "model.safetensors").is_file()
