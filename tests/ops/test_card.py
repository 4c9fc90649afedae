"""The model card: what it says, what it must never say, and that it follows the manifests."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from self_model_sop import artifact
from self_model_sop.artifact import Target, hash_input
from self_model_sop.errors import DATA, OK, USAGE, SopError
from self_model_sop.ops import card, runs
from self_model_sop.ops.lineage import lineage, owners
from self_model_sop.stage import fingerprint_of

SECRET = "hf_" + "a1B2" * 8


def made(folder: Path, stage: str, inputs: dict[str, Path], stats: dict[str, Any], files: dict[str, str], *, group: str | None = None, day: int = 1, config: Any = None) -> Path:
    """An artifact as a stage leaves it, published by the same code."""
    target = Target(folder, group)
    folder.mkdir(parents=True, exist_ok=True)
    work = target.work("0" * 12)
    for name, text in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text, encoding="utf-8")
    manifest: dict[str, Any] = {
        "schema": 1, "stage": stage, "status": "complete", "pipeline": None, "config": config or {}, "paths": {},
        "inputs": {k: hash_input(p) for k, p in inputs.items()}, "stats": stats,
        "seed": 0, "code": {"package": "0.1.0", "stage": 1}, "libraries": {"torch": "2.13.0"}, "device": "cpu: x86_64", "started": f"2026-01-{day:02d}T00:00:00Z", "seconds": 1.0,
        "peak_memory_mib": 1, "folder": str(folder.absolute()),
    }  # fmt: skip
    artifact.publish(target, work, {**manifest, "fingerprint": fingerprint_of(manifest)})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose parts lie in different folders, as the documented layout has them."""
    raw = tmp_path / "home" / "wang" / "corpus"
    raw.mkdir(parents=True)
    (raw / "a.jsonl").write_text('{"text": "患者电话 13800138000"}\n', encoding="utf-8")
    (raw / "README.md").write_text("License: CC BY 4.0\n", encoding="utf-8")
    root = tmp_path / "project"
    (root / "config").mkdir(parents=True)
    qwen = {"source": "Qwen/Qwen2.5-0.5B-Instruct", "commit": "c" * 40, "kind": "causal", "architecture": "Qwen2ForCausalLM", "parameters": 1000}
    base = made(root / "models/base", "data.model", {}, qwen, {"config.json": "{}"})
    made(root / "data/fetch_data", "data.fetch", {"dataset": raw}, {"source": str(raw), "total": 1, "kept": 1}, {"pretrain/corpus__train.jsonl": "{}\n"}, group="corpus", day=2)
    sets = {"pretrain": {"total": 10, "kept": 7, "dropped": {"duplicates": 2}, "quarantined": {"bad_json": 1}, "train": 6, "validation": 1}}
    fetched = {"input 0": root / "data/fetch_data/pretrain/corpus__train.jsonl"}
    data = made(root / "data/final", "data.process", fetched, {"sets": sets, "pii": {"mobile": 1}}, {"pretrain/train.jsonl": "{}\n"}, day=3)
    stats = {"steps": 5, "tokens": 1234, "trainable": {"trainable": 99}, "train_loss_first": 2.0, "train_loss_last": 1.0, "eval_loss_before": 2.5, "eval_loss_after": 1.5}
    settings = {"training_args": {"learning_rate": 1e-4, "run_name": f"{Path.home()}/x"}, "hub": {"token": SECRET}, "note": f"key={SECRET}", "huggingface.revision": None}
    inputs, files = {"model": base, "train": data / "pretrain/train.jsonl"}, {"config.json": "{}", "model.safetensors": "x"}
    model = made(root / "self_model/checkpoints/m", "train.sft", inputs, stats, files, day=4, config=settings)
    bits = {"ours": {"domain": {"bits_per_byte": 1.25, "bytes": 100}}, "other": {"domain": {"bits_per_byte": 9.0, "bytes": 100}}}
    exams = {"ours": {"health": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "total": 100}}}
    made(root / "runs/compare", "eval.compare", {"model ours": model, "model other": raw}, {"bits": bits, "exams": exams}, {"results.json": "{}"}, day=5)
    return root


def written(path: Path) -> str:
    assert card.main([str(path)]) == OK
    return (path / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_the_whole_story(run: Path) -> None:
    text = written(run / "self_model/checkpoints/m")
    for words in (
        "Qwen2ForCausalLM", "1,000 parameters", "Qwen/Qwen2.5-0.5B-Instruct at " + "c" * 40, "CC BY 4.0", "| 10 | 7 | duplicates 2 | 1 | 6 | 1 |", "mobile 1",
        "| tokens | 1,234 |", "2.0000 -> 1.0000", "2.5000 -> 1.5000", "learning_rate: 0.0001", "1.2500 (100 bytes)", "50.0% [40.0%, 60.0%] of 100",
    ):  # fmt: skip
        assert words in text, words
    assert "9.0000" not in text, "another model's result"
    (run / "measured" / "later").mkdir(parents=True)
    shutil.move(run / "runs/compare", run / "measured" / "later" / "eval")
    assert "1.2500 (100 bytes)" not in written(run / "self_model/checkpoints/m")
    assert card.main([str(run / "self_model/checkpoints/m"), "--evaluations", str(run / "measured")]) == OK
    assert "1.2500 (100 bytes)" in (run / "self_model/checkpoints/m/README.md").read_text(encoding="utf-8")
    steps = lineage(run / "self_model/checkpoints/m")
    assert [s.name for s in steps] == ["base", "corpus", "final", "m"]
    assert [s.stage for s in steps] == ["data.model", "data.fetch", "data.process", "train.sft"]


def test_the_front_matter_is_read_by_the_hub_client(run: Path) -> None:
    text = written(run / "self_model/checkpoints/m")
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct" and data["pipeline_tag"] == "text-generation" and data["library_name"] == "transformers"
    assert data["license"] == "unknown" and data["tags"] == ["self-model-sop", "train-sft"] and "datasets" not in data
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "unknown"


def test_nothing_of_the_machine_and_no_secret_gets_in(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "canary-of-the-environment")
    text = written(run / "self_model/checkpoints/m")
    assert SECRET not in text and "canary" not in text and "13800138000" not in text
    assert str(run) not in text and str(Path.home()) not in text and "wang" not in text and not re.search(r"(?<![\w:])/(home|root|tmp|Users)/", text)


def test_the_same_manifests_give_the_same_card_wherever_they_lie(run: Path, tmp_path: Path) -> None:
    first = written(run / "self_model/checkpoints/m")
    assert written(run / "self_model/checkpoints/m") == first
    moved = tmp_path / "elsewhere" / "project"
    moved.parent.mkdir()
    shutil.move(run, moved)
    assert card.main([str(moved / "self_model/checkpoints/m"), "--check"]) == OK


def test_a_card_is_no_part_of_its_artifact(run: Path) -> None:
    folder = run / "self_model/checkpoints/m"
    before = hash_input(folder)["sha256"]
    written(folder)
    assert hash_input(folder)["sha256"] == before
    assert runs.verify(run) == OK


def test_what_is_not_known_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "self_model/checkpoints/m"
    text = written(folder)
    assert "the licence of Qwen/Qwen2.5-0.5B-Instruct" in text.split("## Not known")[1]
    (run / "data/final/pretrain/train.jsonl").write_text("{}\n{}\n", encoding="utf-8")
    shutil.rmtree(run / "runs/compare")
    assert card.main([str(folder), "--check"]) == DATA
    assert "not the one that the manifests give" in capsys.readouterr().err
    unknown = written(folder).split("## Not known")[1]
    assert "input train is gone or changed" in unknown and "no evaluation of it is at hand" in unknown and "pretrain/train.jsonl: changed" in unknown


def test_an_export_tells_its_parity_and_lies_beside_others(run: Path) -> None:
    folder = run / "self_model/checkpoints/m"
    parity = {"kl": 2e-4, "agreement": 1.0, "answer_tokens": 1024, "bits_per_byte": {"source": 1.25, "export": 1.2501, "change": 0.0001}, "allowed": False}
    made(run / "exports", "infer.gguf", {"model": folder}, {"quantize": "f16", "parity": parity}, {"m-f16.gguf": "GGUF"}, group="m-f16", day=6)
    made(run / "exports", "infer.gguf", {"model": folder}, {"quantize": "q4_k_m"}, {"m-q4.gguf": "GGUF"}, group="m-q4", day=7)
    assert card.main([str(run / "exports/m-f16.gguf")]) == OK
    text = (run / "exports/m-f16.README.md").read_text(encoding="utf-8")
    assert "library_name: gguf" in text and "weights: f16" in text and "| 100.00% of 1,024 | 2.0e-04 | 1.2500 -> 1.2501 | within bounds |" in text
    assert card.main([str(run / "exports/m-q4.gguf")]) == OK
    assert "no parity report is at hand" in (run / "exports/m-q4.README.md").read_text(encoding="utf-8")
    assert len(owners(run / "exports")) == 2


def test_only_a_card_is_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "self_model/checkpoints/m"
    (folder / "README.md").write_text("written by hand", encoding="utf-8")
    assert card.main([str(folder)]) == USAGE and "did not write" in capsys.readouterr().err
    assert card.main([str(folder), "-o", str(tmp_path / "card.md")]) == OK and card.MARK in (tmp_path / "card.md").read_text(encoding="utf-8")
    assert card.main([str(folder), "--check", "-o", str(tmp_path / "none.md")]) == DATA
    assert card.main([str(tmp_path / "nothing")]) == USAGE


def test_what_has_no_manifest_has_no_card(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(SopError, match="no manifest says what this is"):
        lineage(tmp_path / "x")
    (tmp_path / "x" / "manifest.json").write_text(json.dumps({"schema": 99, "stage": "x", "outputs": []}))
    with pytest.raises(SopError, match="newer version"):
        lineage(tmp_path / "x")
