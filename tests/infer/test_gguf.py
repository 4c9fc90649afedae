"""The GGUF export: what is refused before anything is loaded, and (marker `gguf`) real files in llama.cpp."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf as library
import pytest
import torch

from chat_tokenizers import FAMILIES, SHARED, TEMPLATES, for_family, real
from self_model_sop import errors
from self_model_sop.artifact import Target
from self_model_sop.cli import main
from self_model_sop.errors import SopError
from self_model_sop.infer import gguf, llama_cpp, parity
from self_model_sop.infer.importance import importance
from self_model_sop.infer.torch_side import TorchSide, reference_of
from self_model_sop.tokenizer import resize
from self_model_sop.tokenizer.settings import CorpusConfig, SelectionConfig, TokenizerConfig
from self_model_sop.train import families, finish
from self_model_sop.train.model import load_model, load_tokenizer
from self_model_sop.train.template import renderer_for
from tiny_models import tiny_bert, tiny_llama, tiny_qwen
from tiny_runs import run
from tiny_tokenizers import chinese, write_corpus

ROOT = Path(__file__).parents[2]
HAS_LLAMA = importlib.util.find_spec("llama_cpp") is not None and (ROOT / "inference/llama.cpp/llama.cpp/convert_hf_to_gguf.py").is_file()
needs_llama = pytest.mark.skipif(not HAS_LLAMA, reason="llama.cpp is not set up here (bash inference/llama.cpp/setup.sh)")
FEW = {"parity__prompts": 4, "parity__tokens": 8, "parity__lines": 1000, "threads": 1}
ANY, NOTHING = {"agreement": 0.0, "kl": 10.0, "bits": 1.0}, {"agreement": 0.0, "kl": 0.0, "bits": 1.0}


# --- before anything is loaded ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--quantize", "q4_k_n"], "q4_k_s"), (["--quantize", "q4km"], "no such kind"), (["--split_max_size", "4 GB"], "no size"), (["--quantize", "iq2_xs"], "importance matrix"),
        (["parity.bounds.q4.kl=-1"], "kl >= 0"), (["parity.prompt=3"], "did you mean 'prompts'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], said: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert main(["infer", "gguf", "--model_path", str(tmp_path / "model"), "--output_path", str(tmp_path / "out.gguf"), *wrong]) == errors.USAGE
    assert said in capsys.readouterr().err


def test_an_adapter_and_a_quantised_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, said in (("adapter_config.json", "{}", "sop train merge"), ("config.json", '{"quantization_config": {"quant_method": "gptq"}}', "quantised already (gptq)")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        (folder / "model.safetensors").touch()
        assert main(["infer", "gguf", "--model_path", str(folder), "--output_path", str(tmp_path / "out.gguf")]) == errors.USAGE
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()


def test_without_llama_cpp_the_command_that_sets_it_up_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(llama_cpp.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(SopError) as caught:
        llama_cpp.sources(ROOT)
    assert caught.value.code == errors.ENVIRONMENT and llama_cpp.SETUP in str(caught.value)


def test_the_set_up_brings_the_version_that_is_recorded() -> None:
    assert f"\nversion={llama_cpp.VERSION}\n" in (ROOT / "inference/llama.cpp/setup.sh").read_text(encoding="utf-8")


def test_the_file_is_named_after_its_kind_unless_it_has_a_name() -> None:
    assert gguf._target(gguf.Config(quantize="q4_k_m")).group == "model-q4_k_m"
    assert gguf._target(gguf.Config(output_path=Path("a/b.gguf"))) == Target(Path("a"), "b") and gguf._target(gguf.Config(output_path=Path("a"))) == Target(Path("a"))


def test_the_appended_tokens_are_taken_out_again(tmp_path: Path) -> None:
    base = tiny_qwen(tmp_path / "base")
    grown = grow(base, tmp_path)
    folder = gguf.without_new_tokens(grown, tmp_path)
    assert folder is not None
    old, cut = load_tokenizer(base), load_tokenizer(folder)
    assert cut.get_vocab() == old.get_vocab() and load_tokenizer(grown).get_vocab() != old.get_vocab()
    lines = chinese(50, seed=3)
    assert cut(lines)["input_ids"] == old(lines)["input_ids"] != load_tokenizer(grown)(lines)["input_ids"]
    assert gguf.without_new_tokens(base, tmp_path) is None


def test_an_export_is_a_stage_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_qwen(tmp_path / "model")
    pipeline = tmp_path / "pipeline.yaml"
    stages = [{"model": {"stage": "data.model", "with": {"model_name_or_path": str(model)}}}, {"export": {"stage": "infer.gguf", "with": {"model_path": "${model}"}}}]
    pipeline.write_text(json.dumps({"name": "p", "root": str(tmp_path / "root"), "stages": stages}))
    assert main(["run", str(pipeline), "--dry-run"]) == errors.OK
    assert str(tmp_path / "root" / "export") in capsys.readouterr().out


# --- real files -------------------------------------------------------------------------------------------------------------------------------


def grow(base: Path, folder: Path) -> Path:
    """`base` with 60 Chinese tokens more, through the whole chain."""
    config = TokenizerConfig(
        base_tokenizer=str(base), work_dir=folder / "work", extended_tokenizer=folder / "extended", extended_model=folder / "grown",
        corpus=CorpusConfig(inputs=(write_corpus(folder / "final"),)), selection=SelectionConfig(new_tokens=60, min_freq=3),
    )  # fmt: skip
    return resize.run(config).path


def small(path: Path, tokenizer: Any) -> Path:
    """A random Llama of 256 columns (what k-quants need) with a real tokenizer, whose answers depend on what was asked."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.03, dtype="float32", **ids,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    GenerationConfig(do_sample=False, **ids).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose SmolLM2 tokenizer was expanded."""
    folder = tmp_path_factory.mktemp("gguf")
    return grow(small(folder / "base", real("smollm2")), folder)


def export(model: Path, out: Path, **more: Any) -> Any:
    return run(gguf.STAGE, {"model_path": model, "output_path": out, **FEW, **more})


@pytest.mark.gguf
@needs_llama
def test_f16_of_an_expanded_model_answers_as_its_source(model: Path, tmp_path: Path) -> None:
    done = export(model, tmp_path / "out" / "m-f16.gguf")
    assert {p.name for p in done.path.iterdir()} >= {"m-f16.gguf", "m-f16.parity.json", "m-f16.manifest.json"}
    found = done.stats["parity"]
    assert found["agreement"] == 1 and found["kl"] <= 1e-3 and found["lines_tokenised_differently"] == 0 and found["lines"] > 1030 and not found["violations"]
    side = llama_cpp.LlamaSide(done.path / "m-f16.gguf", 64, threads=1)
    assert side.template() == load_tokenizer(model).chat_template and side.vocabulary() == load_model(model).get_input_embeddings().weight.shape[0]
    side.close()
    ollama = (done.path / "m-f16.Modelfile").read_text(encoding="utf-8")
    assert "FROM ./m-f16.gguf" in ollama and "TEMPLATE" in ollama and 'stop "<|im_end|>"' in ollama
    assert export(model, tmp_path / "out" / "m-f16.gguf").skipped


@pytest.mark.gguf
@needs_llama
def test_an_importance_matrix_keeps_the_columns_that_the_text_uses(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(chinese(200, seed=5)), encoding="utf-8")
    plain = export(model, tmp_path / "plain", quantize="q3_k_m", parity__bounds__low=ANY)
    helped = export(model, tmp_path / "helped", quantize="q3_k_m", parity__bounds__low=ANY, imatrix=tmp_path / "text.txt", imatrix_tokens=4000)
    assert plain.stats["bytes"] == helped.stats["bytes"] < plain.stats["source_bytes"] / 4 and helped.stats["importance_tokens"] > 3000
    source = load_model(model)
    sequences = [load_tokenizer(model)(line, add_special_tokens=False)["input_ids"] for line in chinese(200, seed=5)[:40]]
    found = importance(source, sequences, "llama")
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert set(found) == {"token_embd.weight"} | {f"blk.{i}.{name}.weight" for i in range(2) for name in matrices}
    wanted = source.model.layers[1].mlp.down_proj.weight.detach().numpy()
    errors = [(((weights(run.path / "model-q3_k_m.gguf", "blk.1.ffn_down.weight") - wanted) ** 2) @ found["blk.1.ffn_down.weight"]).sum() for run in (plain, helped)]
    assert errors[1] < errors[0]


def weights(path: Path, name: str) -> Any:
    tensor = next(t for t in library.GGUFReader(path).tensors if t.name == name)
    return library.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.gguf
@needs_llama
@pytest.mark.parametrize("quantize", ["f16", "q4_k_m"])
def test_split_files(model: Path, tmp_path: Path, quantize: str) -> None:
    done = export(model, tmp_path / "out", quantize=quantize, split_max_size="8M", parity__bounds__q4=ANY)
    assert len(done.stats["files"]) > 1 and all("-of-" in name for name in done.stats["files"])


@pytest.mark.gguf
@needs_llama
def test_a_file_that_answers_differently_is_caught(model: Path, tmp_path: Path) -> None:
    """One tensor of a finished GGUF file scaled: the gate sees it."""
    path = export(model, tmp_path / "out", quantize="f32").path / "model-f32.gguf"
    source = TorchSide(load_model(model), load_tokenizer(model), "source")
    reference = reference_of(source, parity.Parity(prompts=4, tokens=4, lines=20), tmp_path / "reference")
    reader = library.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight").data[:] *= 1.2
    reader.data.flush()
    del reader
    side = llama_cpp.LlamaSide(path, 512, threads=1)
    assert parity.violations(parity.measure(reference, side, 0.05), parity.Bounds().f16)
    side.close()


@pytest.mark.gguf
@needs_llama
def test_beyond_the_bounds_nothing_is_published(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SopError, match="KL divergence") as caught:
        export(model, out, quantize="q2_k", parity__bounds__low=NOTHING)
    assert caught.value.code == errors.DATA and not [p for p in out.iterdir() if not p.name.startswith(".")]
    assert json.loads((out / ".parity.failed.json").read_text())["violations"]
    allowed = export(model, out, quantize="q2_k", parity__bounds__low=NOTHING, allow_divergence=True)
    assert allowed.stats["parity"]["allowed"] and not (out / ".parity.failed.json").exists()


@pytest.mark.gguf
@needs_llama
def test_a_model_that_is_no_causal_one(tmp_path: Path) -> None:
    with pytest.raises(SopError, match="masked"):
        export(tiny_bert(tmp_path / "bert"), tmp_path / "out")


@pytest.mark.gguf
@needs_llama
def test_an_unknown_pre_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(SopError, match="pre-tokenizer was not recognized"):
        export(tiny_llama(tmp_path / "llama"), tmp_path / "out")


@pytest.mark.gguf
@pytest.mark.shared
@pytest.mark.slow
@needs_llama
@pytest.mark.parametrize("name", ["qwen3", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("llama3", "deepseek_v3"))])
def test_real_tokenizers_expanded(tmp_path: Path, name: str) -> None:
    grown = grow(small(tmp_path / "base", shared(name)), tmp_path)
    assert gguf.new_rows(grown)
    assert not export(grown, tmp_path / "out").stats["parity"]["violations"]


@pytest.mark.gguf
@pytest.mark.shared
@pytest.mark.slow
@needs_llama
def test_a_tokenizer_that_llama_cpp_cannot_reproduce_is_refused(tmp_path: Path) -> None:
    """SentencePiece without its tokenizer.model: the converter invents the scores of its pieces, and other pieces come out."""
    with pytest.raises(SopError, match="lines are tokenised differently"):
        export(small(tmp_path / "base", shared("llama2")), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.gguf"))


def shared(name: str) -> Any:
    if not (SHARED / "tokenizers" / name).is_dir():
        pytest.skip("../shared is absent")
    return load_tokenizer(SHARED / "tokenizers" / name)


def test_what_the_converter_takes_as_template_is_what_was_trained_with(tmp_path: Path) -> None:
    """llama.cpp's converter reads the template through the library `gguf`, from the files that training leaves."""
    for name in FAMILIES:
        tokenizer = copy.deepcopy(for_family(name))
        tokenizer.chat_template = None
        renderer = renderer_for(tokenizer, TEMPLATES / f"{name}.json")
        (tmp_path / name).mkdir()
        finish.save_tokenizer(tokenizer, tmp_path / name, renderer)
        assert library.SpecialVocab(tmp_path / name, load_merges=False).chat_template == renderer.template == families.read(TEMPLATES / f"{name}.json").source, name
