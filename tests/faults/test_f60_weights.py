"""F60, F61, F63: weights and code that must not run; broken safetensors end in one line."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from hub_server import HubServer
from self_model_sop.config import ConfigError, load
from self_model_sop.data.model import STAGE, Config
from self_model_sop.errors import DATA, SopError
from self_model_sop.hub import HubConfig, resolve_model
from self_model_sop.train import pretrain, sft
from self_model_sop.train.model import load_model
from tiny_runs import chats, pretrain_settings, run, sft_settings, texts


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.canary, "the payload ran")


def zipped(data: bytes) -> bytes:
    """The layout that torch.save writes."""
    import io

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("archive/data.pkl", data)
        z.writestr("archive/version", "3\n")
    return out.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def unweighted(tiny: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return Path(folder)


WEIGHTS = ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.pt", "model.pth", "weights.pkl", "consolidated.00.pth", "model.ckpt"]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("wrap", [bytes, zipped], ids=["pickle", "zip"])
def test_f60_pickled_weights_are_refused_and_never_loaded(unweighted: Path, tmp_path: Path, name: str, wrap: Any) -> None:
    canary = tmp_path / "canary"
    (unweighted / name).write_bytes(wrap(pickle.dumps(Payload(canary))))
    if name.startswith("pytorch_model-"):
        (unweighted / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    with pytest.raises(SopError, match="pickled") as caught:
        STAGE.run(Config(model_name_or_path=str(unweighted), output_dir=tmp_path / "out"))
    assert caught.value.code == DATA
    assert "convert to safetensors" in str(caught.value)
    with pytest.raises(SopError):
        load_model(unweighted)
    assert not canary.exists()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_f60_on_the_hub_they_are_not_even_downloaded(hub: HubServer, tmp_path: Path) -> None:
    hub.add("model", "a/pickled", {"config.json": b"{}", "pytorch_model.bin": pickle.dumps(Payload(tmp_path / "canary"))})
    with pytest.raises(SopError, match="pickled"):
        resolve_model("a/pickled", HubConfig(endpoint=hub.url, cache_dir=tmp_path / "cache"))
    assert not [r for r in hub.requests if "resolve" in r]
    assert not (tmp_path / "canary").exists()


def test_f60_beside_safetensors_they_are_left_behind(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    STAGE.run(Config(model_name_or_path=str(folder), output_dir=tmp_path / "out"))
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix in (".bin", ".pt")]
    assert not (tmp_path / "canary").exists()


# --- F61 ------------------------------------------------------------------------------------------------------------------------------------------------


def with_code(folder: Path, canary: Path, **config: Any) -> Path:
    described = json.loads((folder / "config.json").read_text())
    described |= {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, **config}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w').write('ran')\n")
    return folder


def test_f61_a_model_that_needs_its_own_code_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = with_code(shutil.copytree(tiny, tmp_path / "model"), tmp_path / "canary", model_type="never_heard_of")
    with pytest.raises(SopError, match="'never_heard_of' needs code from its repository"):
        STAGE.run(Config(model_name_or_path=str(folder), output_dir=tmp_path / "out"))
    assert not (tmp_path / "canary").exists()


def test_f61_code_that_is_not_needed_is_left_behind(tiny: Path, tmp_path: Path) -> None:
    folder = with_code(shutil.copytree(tiny, tmp_path / "model"), tmp_path / "canary")
    STAGE.run(Config(model_name_or_path=str(folder), output_dir=tmp_path / "out"))
    assert not (tmp_path / "out" / "code.py").exists()
    assert not (tmp_path / "canary").exists()


def test_f61_from_the_hub_no_code_arrives(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    folder = with_code(shutil.copytree(tiny, tmp_path / "model"), tmp_path / "canary", model_type="never_heard_of")
    hub.add("model", "a/code", {p.name: p.read_bytes() for p in folder.iterdir()})
    where = {"endpoint": hub.url, "cache_dir": tmp_path / "cache"}
    with pytest.raises(SopError, match="no command runs such code"):
        STAGE.run(Config(model_name_or_path="a/code", output_dir=tmp_path / "out", huggingface=HubConfig(**where)))
    assert not [r for r in hub.requests if r.endswith(".py")]
    assert not list((tmp_path / "cache").rglob("*.py")) and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("revision", ["null", "main", "0123456789012345678901234567890123456789"])
def test_f61_trust_is_refused_before_anything_is_fetched(tmp_path: Path, revision: str) -> None:
    """A pinned commit makes code known, not harmless: every stage that loads a model would have to run it."""
    path = tmp_path / "base.yaml"
    path.write_text(f"huggingface: {{trust_remote_code: true, revision: '{revision}'}}\n")
    with pytest.raises(ConfigError, match="no command runs code out of a repository") as caught:
        load(Config, path, check_paths=False)
    assert "base.yaml:1" in str(caught.value)


def test_f61_no_training_runs_code_of_a_model(tiny: Path, tmp_path: Path) -> None:
    folder = with_code(shutil.copytree(tiny, tmp_path / "model"), tmp_path / "canary", model_type="never_heard_of")
    for stage, values in ((sft.STAGE, sft_settings), (pretrain.STAGE, pretrain_settings)):
        data = chats(tmp_path / "chats.jsonl") if stage is sft.STAGE else texts(tmp_path / "texts.jsonl")
        with pytest.raises(SopError, match="'never_heard_of' needs code from its repository") as caught:
            run(stage, values(folder, data, tmp_path / stage.name))
        assert caught.value.code == DATA
    assert not (tmp_path / "canary").exists()


# --- F63 ------------------------------------------------------------------------------------------------------------------------------------------------


def tensors(header: Any, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


BROKEN = {
    "huge header": struct.pack("<Q", 1 << 60) + b"{}",
    "header beyond the end": struct.pack("<Q", 5000) + b"{}",
    "header is no JSON": tensors(b"not json"),
    "overlap": tensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "bad dtype": tensors({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}),
    "shape does not fit": tensors({"a": {"dtype": "F32", "shape": [400], "data_offsets": [0, 16]}}),
    "truncated": tensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 7),
    "empty": b"",
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_f63_broken_safetensors_end_in_one_line(unweighted: Path, tmp_path: Path, what: str) -> None:
    (unweighted / "model.safetensors").write_bytes(BROKEN[what])
    with pytest.raises(SopError, match="broken safetensors file") as caught:
        STAGE.run(Config(model_name_or_path=str(unweighted), output_dir=tmp_path / "out"))
    assert caught.value.code == DATA
    assert "\n" not in caught.value.what
    assert not (tmp_path / "out" / "manifest.json").exists()
