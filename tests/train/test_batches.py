"""What goes into a batch: nothing lost, nothing learned that should not be, and nothing seen across a border."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from self_model_sop.train import tokens
from self_model_sop.train.batches import CausalCollator, MaskedCollator
from self_model_sop.train.packing import Bins, Blocks, Examples, Item, Ordered, best_fit
from self_model_sop.train.tokens import Encoded, Segment, TokenSet
from tiny_models import tiny_bert, tiny_llama, tiny_qwen


def _set(folder: Path, lengths: list[int], supervised: bool = True) -> TokenSet:
    draw = np.random.default_rng(0)
    return tokens.write(folder, (Encoded(draw.integers(5, 400, n).tolist(), float(supervised), f"f:{i}", "f") for i, n in enumerate(lengths)), {})


# --- packing ------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60))
def test_best_fit_loses_nothing_and_overfills_nothing(lengths: list[int]) -> None:
    bins = best_fit(lengths, 50)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 50 for b in bins)
    assert sum(sum(lengths[i] for i in b) <= 25 for b in bins) <= 1  # two half-empty bins would have been one


def test_best_fit_is_optimal_where_a_first_fit_is_not() -> None:
    assert len(best_fit([6, 5, 4, 3, 2], 10)) == 2
    with pytest.raises(ValueError, match="exceeds"):
        best_fit([11], 10)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=25), size=st.integers(8, 33))
def test_blocks_hold_every_token_once_in_order(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], size: int) -> None:
    made = _set(tmp_path_factory.mktemp("set"), lengths)
    order = np.random.default_rng(1).permutation(len(lengths))
    blocks = Blocks(made, order, size)
    items = [blocks[i] for i in range(len(blocks))]
    stream = np.concatenate([made.segment(int(d)).ids for d in order])
    assert np.array_equal(np.concatenate([s.ids for item in items for s in item.segments]), stream)
    assert all(sum(len(s.ids) for s in item.segments) == size for item in items[:-1])
    for item in items:  # a segment never spans two documents
        for example, segment in zip(item.examples, item.segments, strict=True):
            assert segment.ids.tobytes() in made.segment(example).ids.tobytes()


def test_an_ordered_dataset_goes_on_where_the_last_phase_stopped(tmp_path: Path) -> None:
    blocks = Blocks(_set(tmp_path, [10] * 12), np.arange(12), 10)
    whole = [Ordered(blocks, 7, 0, 30)[i].examples for i in range(30)]
    first, second = Ordered(blocks, 7, 0, 20), Ordered(blocks, 7, 20, 10)
    assert [first[i].examples for i in range(20)] + [second[i].examples for i in range(10)] == whole
    assert sorted(whole[:12]) == sorted(whole[12:24]) and whole[:12] != whole[12:24]  # every pass reads everything, in another order


# --- tensors ------------------------------------------------------------------------------------------------------------------------------


def test_positions_restart_and_the_first_token_of_a_segment_is_never_a_label(tmp_path: Path) -> None:
    made = _set(tmp_path, [3, 5, 4])
    batch = CausalCollator(0)([Bins(made, 12)[0], Examples(made)[0]])
    assert batch["input_ids"].shape == (2, 12)
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert [i for i, label in enumerate(batch["labels"][0].tolist()) if label == -100] == [0, 5, 9]
    assert batch["labels"][1, 3:].tolist() == [-100] * 9 and int(batch["tokens"]) == 15 and batch["examples"].tolist() == [1, 2, 0, 0]
    assert "attention_mask" not in batch


def test_compact_rows_are_as_wide_as_the_longest_and_keep_every_label(tmp_path: Path) -> None:
    items = list(Examples(_set(tmp_path, [20, 6, 5, 9, 3, 17])))
    compact, padded, flat = (CausalCollator(0, layout)(items) for layout in ("compact", "padded", "flat"))
    assert compact["input_ids"].shape == (3, 20) and padded["input_ids"].shape == (6, 20) and flat["input_ids"].shape == (1, 60)
    for batch in (compact, padded, flat):
        assert sorted(batch["labels"][batch["labels"] != -100].tolist()) == sorted(flat["labels"][flat["labels"] != -100].tolist())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"qwen": tiny_qwen(root / "qwen"), "llama": tiny_llama(root / "llama"), "bert": tiny_bert(root / "bert")}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_packed_documents_leave_each_others_logits_unchanged(models: dict[str, Path], name: str, attention: str, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(models[name], attn_implementation=attention).eval()
    made = _set(tmp_path, [13, 30, 7, 21])
    batch = CausalCollator(0, "flat")(list(Examples(made)))
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        leaking = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor(made.segment(i).ids[None].astype(np.int64)), use_cache=False).logits[0] for i in range(4)])
    assert float((packed - alone).abs().max()) <= 1e-4
    assert float((leaking - alone).abs().max()) > 1e-2  # what the test would see without isolation


@pytest.mark.parametrize("layout", ["padded", "compact", "flat"])
def test_asking_for_learned_positions_only_gives_the_same_loss_and_gradients(models: dict[str, Path], layout: str, tmp_path: Path) -> None:
    import transformers

    draw = np.random.default_rng(3)
    made = tokens.write(tmp_path / "s", (Encoded(draw.integers(5, 400, n).tolist(), (draw.random(n) < 0.4).astype(float).tolist(), "s") for n in (18, 25, 9, 31)), {})
    found = []
    for keep in ("none", "mask", "index"):
        model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"])
        batch = CausalCollator(0, layout, keep)(list(Examples(made)))  # type: ignore[arg-type]
        del batch["examples"], batch["tokens"]
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        found.append((float(loss), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for loss, gradient in found[1:]:
        assert abs(loss - found[0][0]) <= 1e-6
        assert float((gradient - found[0][1]).abs().max()) <= 1e-6


def test_masked_batches_follow_the_recipe(models: dict[str, Path]) -> None:
    draw = np.random.default_rng(0)
    items = [Item([i], [Segment(np.concatenate([[2], draw.integers(50, 900, 60), [3]]).astype(np.int32), np.ones(62, np.float16))], i) for i in range(200)]
    collator = MaskedCollator(0, 4, 1000, frozenset(range(5)))
    batch = collator(items)
    chosen = batch["labels"] != -100
    assert not chosen[:, 0].any() and not chosen[:, -1].any()  # special tokens are never asked for
    original = torch.tensor(np.stack([item.segments[0].ids for item in items]).astype(np.int64))
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen]) and torch.equal(batch["labels"][chosen], original[chosen])
    share = float(chosen.sum()) / (200 * 60)
    masked = float((batch["input_ids"][chosen] == 4).float().mean())
    kept = float((batch["input_ids"][chosen] == original[chosen]).float().mean())
    assert abs(share - 0.15) < 0.01 and abs(masked - 0.8) < 0.03 and abs(kept - 0.1) < 0.03
    alone = [collator([item]) for item in items[:20]]  # the masks of an item do not depend on its batch, only on its place in the training
    assert all(torch.equal(torch.cat([b[key] for b in alone]), batch[key][:20]) for key in ("input_ids", "labels"))
    assert not torch.equal(collator([items[0]._replace(place=200)])["labels"], batch["labels"][:1])


def test_weights_scale_the_loss_of_their_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    from self_model_sop.train.loop import weighted_loss

    draw = np.random.default_rng(5)
    weights = [draw.choice([0.0, 1.0, 0.5, 2.0], n).tolist() for n in (12, 20)]
    made = tokens.write(tmp_path / "w", (Encoded(draw.integers(5, 400, len(w)).tolist(), w, "w") for w in weights), {})
    assert made.meta["weighted"]
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    found = []
    with torch.no_grad():
        for layout, keep in (("padded", "none"), ("compact", "mask"), ("flat", "index")):
            batch = CausalCollator(0, layout, keep, weighted=True)(list(Examples(made)))  # type: ignore[arg-type]
            inputs = {k: v for k, v in batch.items() if k in ("input_ids", "position_ids", "logits_to_keep")}
            found.append(float(weighted_loss(model(**inputs, use_cache=False).logits, batch["labels"], batch["weights"], batch.get("shift_labels"), None)))
        wanted, learned = 0.0, 0
        for i, weight in enumerate(weights):
            ids = torch.tensor(made.segment(i).ids.astype(np.int64))
            logs = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            wanted -= sum(weight[t] * float(logs[t - 1, ids[t]]) for t in range(1, len(ids)))
            learned += sum(w > 0 for w in weight[1:])
    assert all(abs(f - wanted / learned) < 1e-5 for f in found)
