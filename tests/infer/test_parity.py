"""The parity gate: an export that answers differently is caught, whatever is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from self_model_sop.errors import DATA, SopError
from self_model_sop.infer import parity
from self_model_sop.infer.parity import Bound, Bounds, Parity
from self_model_sop.infer.probes import shipped
from self_model_sop.infer.torch_side import TorchSide, reference_of
from self_model_sop.train import sft
from self_model_sop.train.model import load_model, load_tokenizer, load_with_adapter
from tiny_models import tiny_llama, tiny_qwen
from tiny_runs import chats, run, sft_settings

SMALL = Parity(prompts=4, tokens=8, lines=120)
EXACT = Bounds().f32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity")
    tiny_qwen(path / "qwen")
    run(sft.STAGE, sft_settings(path / "qwen", chats(path / "chats.jsonl"), path / "adapter", training_args__learning_rate=5e-2))
    return path


@pytest.fixture(scope="module")
def reference(root: Path) -> parity.Reference:
    return reference_of(side(root / "qwen"), SMALL, root / "reference")


def side(folder: Path) -> TorchSide:
    return TorchSide(load_model(folder), load_tokenizer(folder), folder.name)


def broken(reference: parity.Reference, export: TorchSide, bound: Bound = EXACT) -> list[str]:
    return parity.violations(parity.measure(reference, export, SMALL.margin), bound)


def test_a_faithful_copy_passes(root: Path, reference: parity.Reference) -> None:
    found = parity.measure(reference, side(root / "qwen"), SMALL.margin)
    assert parity.violations(found, EXACT) == []
    assert found["agreement"] == 1 and found["kl"] == 0 and found["answer_tokens"] == 4 * 8 and found["bits_per_byte"]["change"] == 0


def test_a_bfloat16_copy_passes_the_bounds_of_its_kind_and_not_those_of_float32(root: Path, reference: parity.Reference) -> None:
    half = TorchSide(load_model(root / "qwen").to(torch.bfloat16), load_tokenizer(root / "qwen"), "half")
    assert broken(reference, half, Bounds().bf16) == []
    assert parity.measure(reference, half, SMALL.margin)["largest_logit_difference"] > 0


def test_a_changed_template_is_caught(root: Path, reference: parity.Reference) -> None:
    export = side(root / "qwen")
    export.tokenizer.chat_template = export.tokenizer.chat_template.replace("<|im_end|>", "<|im_end|> ", 1)
    assert any("chat template" in what for what in broken(reference, export))


def test_one_perturbed_tensor_is_caught(root: Path, reference: parity.Reference) -> None:
    export = side(root / "qwen")
    with torch.no_grad():
        export.model.model.layers[1].mlp.down_proj.weight *= 1.5
    assert any("logit" in what for what in broken(reference, export, Bounds().f16))


def test_a_vocabulary_off_by_one_is_caught(root: Path, reference: parity.Reference) -> None:
    export = side(root / "qwen")
    export.model.resize_token_embeddings(export.vocabulary() + 1)
    assert any("rows" in what for what in broken(reference, export))


def test_shifted_token_ids_are_caught(root: Path, reference: parity.Reference, tmp_path: Path) -> None:
    folder = shutil.copytree(root / "qwen", tmp_path / "shifted")
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    names = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    data["model"]["vocab"] |= {names[300]: 301, names[301]: 300}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    found = parity.measure(reference, side(folder), SMALL.margin)
    assert found["lines_tokenised_differently"] > 0 and found["first_differences"]
    assert any("tokenised differently" in what for what in parity.violations(found, Bounds().low))


def test_an_adapter_that_was_not_merged_is_caught(root: Path) -> None:
    wrapped, tokenizer = load_with_adapter(root / "adapter")
    trained = reference_of(TorchSide(wrapped, tokenizer, "base with adapter"), SMALL, root / "with_adapter")
    assert broken(trained, TorchSide(load_with_adapter(root / "adapter")[0], tokenizer, "again")) == []
    assert any("KL" in what for what in broken(trained, side(root / "qwen"), Bounds().f16))


def test_a_lost_stop_token_is_caught(root: Path, reference: parity.Reference) -> None:
    export = side(root / "qwen")
    export.model.generation_config.eos_token_id = 0
    assert any("does not stop" in what for what in broken(reference, export))


def test_not_a_number_is_no_agreement(root: Path, reference: parity.Reference) -> None:
    export = side(root / "qwen")
    with torch.no_grad():
        export.model.model.norm.weight[0] = float("nan")
    assert broken(reference, export, Bounds().low)


def test_a_disagreement_counts_where_the_source_was_decided(root: Path, reference: parity.Reference) -> None:
    export = side(root / "qwen")
    with torch.no_grad():
        for block in export.model.model.layers:
            block.mlp.down_proj.weight.normal_(std=0.5)
    decided, undecided = (parity.measure(reference, export, margin) for margin in (0.0, 1e9))
    assert decided["agreement"] < 1 and undecided["agreement"] == 1 and undecided["undecided"] > 0


def test_beyond_a_bound_nothing_is_published(root: Path, reference: parity.Reference, tmp_path: Path) -> None:
    export = side(root / "qwen")
    export.model.generation_config.eos_token_id = 0
    measured = parity.measure(reference, export, SMALL.margin)
    with pytest.raises(SopError, match="does not stop") as caught:
        parity.enforce(measured, EXACT, report=tmp_path / "report.json", failed=tmp_path / "failed.json", allow=False)
    assert caught.value.code == DATA and not (tmp_path / "report.json").exists()
    assert json.loads((tmp_path / "failed.json").read_text())["violations"]
    allowed = parity.enforce(measured, EXACT, report=tmp_path / "report.json", failed=tmp_path / "failed.json", allow=True)
    assert allowed["allowed"] and "OUT OF BOUNDS" in parity.line(allowed)
    assert json.loads((tmp_path / "report.json").read_text())["violations"] and not (tmp_path / "failed.json").exists()


def test_a_model_without_a_template_and_heldout_text_of_the_user(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "llama")
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "heldout.txt").write_text("高血压患者应当按时服药。\n" * 300 + "\n".join("感冒通常由病毒引起。" * 400 for _ in range(2)), encoding="utf-8")
    found = reference_of(side(folder), Parity(prompts=2, tokens=2, lines=10, heldout=tmp_path / "heldout.txt", heldout_chars=5000), tmp_path / "reference")
    assert found.template is None and max(len(ids) for _, ids, _ in found.texts) <= 512  # long texts are cut, not dropped
    assert 4000 < sum(size for size, _, _ in found.texts) / 3 <= 5000
    assert broken(found, side(folder)) == []


def test_the_probe_set_is_the_same_every_time() -> None:
    one, two = shipped(32, 1000, ["高血压"]), shipped(32, 1000, ["高血压"])
    assert one == two and len(one.conversations) == 32 and len(one.lines) == 1001 and len(set(one.lines)) > 950
    assert all(c[-1]["role"] == "user" for c in one.conversations)


@pytest.mark.parametrize("wrong", [{"prompts": 33}, {"tokens": 0}, {"margin": -1.0}])
def test_settings_that_mean_nothing(wrong: Any) -> None:
    with pytest.raises(ValueError):
        Parity(**wrong)
