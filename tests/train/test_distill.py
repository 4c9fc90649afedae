"""Token distillation: what the teacher reads and where it is compared, what is learned, and what stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from self_model_sop.config import ConfigError
from self_model_sop.errors import USAGE, SopError
from self_model_sop.stage import load_for
from self_model_sop.tokenizer.new_rows import before_expansion
from self_model_sop.train import distill, preflight
from self_model_sop.train.adapters import attach_rows, new_rows
from self_model_sop.train.batches import CausalCollator
from self_model_sop.train.distill import DistillCollator
from self_model_sop.train.model import load_model, load_tokenizer
from self_model_sop.train.packing import Item
from self_model_sop.train.pretrain import STAGE
from self_model_sop.train.tokens import Segment
from tiny_extensions import extend_bpe, grown
from tiny_models import tiny_bert, tiny_llama, tiny_qwen
from tiny_runs import Process, expanded, pretrain_settings, rows, run, settings, texts
from tiny_tokenizers import WORDS, chinese

TEXTS = ["高血压患者应当按时服药，定期测量血压。", "The patient should rest.", "医生说，感冒通常由病毒引起。人工智能模型可以回答问题。", "多喝水。"]
DISTILL = {"name": "rows", "train": "new_rows", "objective": "distill", "max_steps": 12, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distill")
    for name, make in (("qwen", tiny_qwen), ("llama", tiny_llama)):
        grown(make(path / f"{name}-base"), WORDS, path / name)
    rows(path / "train.jsonl", [{"text": text} for text in chinese(60)])
    return path


def _new(folder: Path) -> range:
    found = new_rows(folder)
    assert found
    return found


def _collator(folder: Path, limit: int | None = None) -> DistillCollator:
    return DistillCollator(CausalCollator(0), distill.pieces_for(load_tokenizer(folder), _new(folder)), limit)


def _item(*documents: list[int]) -> Item:
    return Item(list(range(len(documents))), [Segment(np.array(ids, np.int32), np.ones(len(ids), np.float16)) for ids in documents], 0)


def _values(root: Path, name: str, model: str = "qwen", **more: Any) -> dict[str, Any]:
    return pretrain_settings(root / model, root / "train.jsonl", root / "out" / name, **{"phases": [DISTILL], **more})


# --- what the teacher reads -------------------------------------------------------------------------------------------------------------------


def test_pieces_are_what_the_base_tokenizer_writes(tmp_path: Path) -> None:
    base = load_tokenizer(tiny_qwen(tmp_path / "base"))
    extended = load_tokenizer(extend_bpe(tmp_path / "base", WORDS, tmp_path / "extended"))
    collator = _collator(tmp_path / "extended")
    assert before_expansion(extended, _new(tmp_path / "extended")).get_vocab() == base.get_vocab()
    for text in [*TEXTS, *WORDS, "糖尿病患者" * 3]:
        ids, last = collator.spelled(np.array(extended(text)["input_ids"], np.int32))
        assert ids.tolist() == base(text)["input_ids"] and last[-1] == len(ids) - 1
        assert len(last) == len(extended(text)["input_ids"])
    assert any(len(extended(t)["input_ids"]) < len(base(t)["input_ids"]) for t in WORDS)  # else nothing was spelled out


@examples(max_examples=60, deadline=None)
@given(batch_of=st.lists(st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=12), min_size=1, max_size=4), min_size=1, max_size=3))
def test_rows_align_and_documents_stay_apart(batch_of: list[list[list[int]]]) -> None:
    pieces = {i: tuple(range(100 + 10 * i, 101 + 11 * i - 10 * 30)) for i in range(30, 40)}  # 31 has 2 pieces, 39 has 10
    batch = DistillCollator(CausalCollator(99), pieces)([_item(*documents) for documents in batch_of])
    student = CausalCollator(99)([_item(*documents) for documents in batch_of])
    assert all(torch.equal(batch[k], student[k]) for k in student)
    for r, documents in enumerate(batch_of):
        ids, positions, ends, compared = (batch[k][r].tolist() for k in ("teacher_ids", "teacher_positions", "teacher_ends", "compared"))
        at = after = 0
        for document in documents:
            seen = False
            for k, token in enumerate(document):
                written = pieces.get(token, (token,))
                begins = ends[at] - len(written) + 1
                assert tuple(ids[begins : ends[at] + 1]) == written and begins == after + sum(len(pieces.get(t, (t,))) for t in document[:k])
                seen = seen or token in pieces
                assert compared[at] == seen
                at += 1
            size = sum(len(pieces.get(t, (t,))) for t in document)
            assert positions[after : after + size] == list(range(size))  # begins anew: what a model tells documents apart by
            after += size
        assert not any(compared[at:]) and set(ids[after:]) <= {99}


def test_what_exceeds_the_model_is_cut_and_not_compared() -> None:
    pieces = {9: (1, 2, 3)}
    batch = DistillCollator(CausalCollator(0), pieces, limit=7)([_item([4, 9, 5, 9, 6], [9, 4]), _item([9])])
    assert batch["teacher_ids"][0].tolist() == [4, 1, 2, 3, 5, 1, 2, 1, 2, 3, 4] and int(batch["teacher_positions"].max()) == 6
    assert batch["compared"][0].tolist() == [False, True, True, False, False, True, True]
    assert batch["teacher_ends"][0, [1, 2, 5, 6]].tolist() == [3, 4, 9, 10]


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_the_teacher_of_a_packed_row_reads_each_document_alone(root: Path, name: str) -> None:
    model, tokenizer, collator = load_model(root / name), load_tokenizer(root / name), _collator(root / name)
    documents = [tokenizer(text)["input_ids"] for text in TEXTS]
    batch = collator([_item(*documents[:3]), _item(documents[3])])
    (teacher, compared), at = distill.targets(distill.body_of(model), batch, torch.no_grad), 0
    for document in documents:
        with torch.no_grad():
            alone = distill.body_of(model)(input_ids=torch.tensor([collator.spelled(np.array(document, np.int32))[0].tolist()]), use_cache=False)[0][0]
        last, new = collator.spelled(np.array(document, np.int32))[1], [i in collator.pieces for i in document]
        expected = alone[last[new.index(True) :]] if any(new) else alone[:0]
        assert float((teacher[at : at + len(expected)] - expected).abs().max() if len(expected) else 0) <= 1e-4
        at += len(expected)
    assert at == len(teacher) == int(compared.sum()) > 20


# --- the distance -----------------------------------------------------------------------------------------------------------------------------


def _distance(model: Any, collator: DistillCollator, items: list[Item], everywhere: bool = False) -> float:
    """For each compared token (of all, with `everywhere`)."""
    batch = collator(items)
    if everywhere:
        batch["compared"][:] = True
    teacher, compared = distill.targets(distill.body_of(model), batch, torch.no_grad)
    with torch.no_grad(), distill.watched(distill.body_of(model)) as seen:
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    return float(distill.distance(seen[0], teacher, compared)) / max(int(compared.sum()), 1)


def test_without_a_new_token_there_is_no_distance(root: Path) -> None:
    tokenizer, collator = load_tokenizer(root / "qwen"), _collator(root / "qwen")
    base = before_expansion(tokenizer, _new(root / "qwen"))
    model = load_model(root / "qwen")
    old = [_item(*(base(text)["input_ids"] for text in TEXTS))]
    assert _distance(model, collator, old) == 0 == _distance(model, collator, old, everywhere=True)
    assert _distance(model, collator, [_item(tokenizer(TEXTS[0])["input_ids"])]) > 0.01


def _held_out(folder: Path, root: Path) -> float:
    tokenizer = load_tokenizer(folder)
    return _distance(load_model(folder), _collator(root), [_item(*(tokenizer(text)["input_ids"] for text in chinese(10, seed=5)))])


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_the_rows_come_nearer_and_nothing_else_moves(root: Path, name: str) -> None:
    done = run(STAGE, _values(root, f"rows-{name}", name))
    lines = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    away = [line["distance"] for line in lines]
    assert len(away) == 12 and sum(away[-3:]) < 0.9 * sum(away[:3])
    assert 5 < lines[0]["loss"] < 8  # that of next tokens: about log(vocabulary) for a random model
    assert _held_out(done.path, root / name) < 0.9 * _held_out(root / name, root / name)
    before, after = load_model(root / name), load_model(done.path)
    new = set(_new(root / name))
    for (key, old), (_, now) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        changed = set((old != now).reshape(len(old), -1).any(dim=1).nonzero()[:, 0].tolist())
        assert changed <= new if "embed_tokens" in key or "lm_head" in key else not changed, key
    assert (after.get_output_embeddings().weight is after.get_input_embeddings().weight) == (name == "qwen")


def test_the_weight_is_that_of_the_next_token_loss(root: Path) -> None:
    """On an untied model the distance says nothing about output rows: with weight 0 (and no decay) they stay."""
    runs = {w: run(STAGE, _values(root, f"weight-{w}", "llama", phases=[{**DISTILL, "max_steps": 3, "next_token_weight": w}])) for w in (0, 1)}
    before = load_model(root / "llama").lm_head.weight
    assert torch.equal(load_model(runs[0].path).lm_head.weight, before) and not torch.equal(load_model(runs[1].path).lm_head.weight, before)
    with pytest.raises(ConfigError, match="next_token_weight is negative"):
        load_for(STAGE, None, settings(**_values(root, "negative", phases=[{**DISTILL, "next_token_weight": -1}])))


def test_accumulating_trains_the_same(root: Path) -> None:
    sizes = ((4, 1), (1, 4))
    done = [
        run(STAGE, _values(root, f"batch-{a}", training_args__per_device_train_batch_size=a, training_args__gradient_accumulation_steps=b, phases=[{**DISTILL, "max_steps": 3}]))
        for a, b in sizes
    ]
    whole, parts = ([json.loads(line) for line in (d.path / "metrics.jsonl").read_text().splitlines()] for d in done)
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["distance"] == pytest.approx(b["distance"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_the_gradient_reaches_the_new_rows_alone(root: Path) -> None:
    collator, tokenizer = _collator(root / "qwen"), load_tokenizer(root / "qwen")
    model = attach_rows(load_model(root / "qwen"), _new(root / "qwen"))
    batch = collator([_item(tokenizer(TEXTS[0])["input_ids"])])
    teacher, compared = distill.targets(distill.body_of(model), batch, torch.no_grad)
    assert not teacher.requires_grad
    with distill.watched(distill.body_of(model)) as seen:
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    distill.distance(seen[0], teacher, compared).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(grads) and all("trainable_tokens_delta" in name for name in grads)
    used = {i - _new(root / "qwen").start for i in batch["input_ids"][0].tolist() if i in collator.pieces}
    assert set(next(iter(grads.values())).abs().sum(1).nonzero()[:, 0].tolist()) == used


# --- the command ------------------------------------------------------------------------------------------------------------------------------


def test_the_command_distils_then_trains_on(root: Path, tmp_path: Path) -> None:
    phases = [{**DISTILL, "max_steps": 4}, {"name": "full", "max_steps": 2}]
    values = pretrain_settings(root / "qwen", root / "train.jsonl", tmp_path / "out", phases=phases, precision="bf16")
    assert Process("train pretrain", values, tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert ["distance" in line for line in lines] == [True] * 4 + [False] * 2
    assert "as a share of their square" in (tmp_path / "out" / "report.html").read_text()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [p["name"] for p in manifest["stats"]["phases"]] == ["rows", "full"] and manifest["stats"]["phases"][0]["trainable"] == len(_new(root / "qwen")) * 64
    assert Process("train pretrain", values, tmp_path / "log").wait() == 0 and "up to date" in (tmp_path / "log").read_text()


def test_the_plan_counts_the_teacher(root: Path, tmp_path: Path) -> None:
    model = shutil.copytree(root / "qwen", tmp_path / "model")
    record = json.loads((model / "expansion.json").read_text())
    (model / "expansion.json").write_text(json.dumps({**record, "curve": [{"tokens": 40, "reduction": 0.5}]}))

    def plan(**phase: Any) -> list[str]:
        return list(STAGE.plan(load_for(STAGE, None, settings(**_values(tmp_path, "plan", phases=[{**DISTILL, **phase}], model_name_or_path=model,
                                                                        data__train_file=root / "train.jsonl"))).config))  # fmt: skip

    assert any("teacher reads about 2.0 base tokens" in line for line in plan()) and not any("teacher" in line for line in plan(objective="next_token"))


@pytest.mark.parametrize(
    ("model", "phase", "words"),
    [
        ("qwen", {"train": "all"}, "phases.0.objective: distill trains new rows alone, not all"),
        ("plain", {}, "phases.0.objective: distill needs an expanded vocabulary"),
        ("bert", {}, "phases.0.objective: distill is for causal models, not BertForMaskedLM"),
        ("qwen", {"objective": "distil"}, "phases.0.objective"),
        ("qwen", {"next_tokens_weight": 1}, "did you mean 'next_token_weight'"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_is_loaded(root: Path, tmp_path: Path, model: str, phase: dict[str, Any], words: str) -> None:
    made = root / model if model == "qwen" else tiny_bert(tmp_path / "bert") if model == "bert" else tiny_qwen(tmp_path / "plain")
    if model == "bert":
        expanded(made, 300, 420)
    values = {**_values(root, f"bad-{model}"), "model_name_or_path": made, "phases": [{**DISTILL, **phase}]}
    with pytest.raises(ConfigError) as error:
        load_for(STAGE, None, settings(**values))
    assert words in str(error.value) and error.value.code == USAGE


def test_a_model_from_the_hub_is_asked_once_it_is_here(tmp_path: Path) -> None:
    config = load_for(STAGE, None, settings(**{**_values(tmp_path, "hub", data__train_file=texts(tmp_path / "t.jsonl")), "model_name_or_path": "some/model"})).config
    assert not preflight.distill(config)
    import dataclasses

    with pytest.raises(SopError, match="needs an expanded vocabulary") as error:
        preflight.insist(preflight.distill(dataclasses.replace(config, model_name_or_path=str(tiny_qwen(tmp_path / "fetched")))))
    assert error.value.code == USAGE and error.value.where == "phases.0.objective"
