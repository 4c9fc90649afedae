"""Fine-tuning through the real stage, on tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from self_model_sop.config import ConfigError, load
from self_model_sop.errors import SopError
from self_model_sop.stage import load_for
from self_model_sop.train import corpus, machine
from self_model_sop.train.batches import CausalCollator
from self_model_sop.train.cache import Cache
from self_model_sop.train.loop import supervised_loss
from self_model_sop.train.model import load_model, load_tokenizer, load_with_adapter
from self_model_sop.train.packing import Examples
from self_model_sop.train.sft import STAGE, SftConfig
from self_model_sop.train.template import renderer_for
from tiny_models import tiny_llama, tiny_qwen
from tiny_runs import chats, config_of, expanded, losses, rows, run, settings, sft_settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sft")
    tiny_qwen(path / "qwen")
    tiny_llama(path / "llama")
    for name in ("qwen", "llama"):
        expanded(shutil.copytree(path / name, path / f"{name}_expanded"))
    chats(path / "train.jsonl", 40)
    chats(path / "eval.jsonl", 8, seed=9)
    return path


def _values(root: Path, name: str, model: str = "qwen", **more: Any) -> dict[str, Any]:
    return sft_settings(root / model, root / "train.jsonl", root / "out" / name, **more)


def test_the_documented_file_loads_verbatim() -> None:
    documented = load(SftConfig, ROOT / "config/self_model_config/finetune.yaml", check_paths=False).config
    assert documented.model_name_or_path == documented.tokenizer_name_or_path == "Qwen/Qwen2.5-0.5B-Instruct" and documented.data.max_length == 512
    assert documented.peft.enabled and documented.peft.lora_r == 8 and documented.peft.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert documented.trace == "swanlab" and documented.training_args["fp16"] is True and documented.target().folder == ROOT / "self_model/checkpoints/finetune"


def test_an_adapter_is_trained_saved_and_answers(root: Path) -> None:
    values = _values(root, "lora", data__eval_file=root / "eval.jsonl", training_args__max_steps=12)
    done = run(STAGE, values)
    stats = done.stats
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "metrics.jsonl", "loss.png", "report.html", "manifest.json"} <= {
        p.name for p in done.path.iterdir()
    }
    assert stats["eval_loss_after"] < stats["eval_loss_before"] and stats["train_loss_last"] < stats["train_loss_first"]
    assert stats["rows"] == {**stats["rows"], "total": 40, "kept": 40, "dropped": {}} and stats["tokens"] > stats["supervised_tokens"] > 0 and stats["peak_memory_mib"] > 0
    assert not list(done.path.glob("checkpoint*")) and not list(done.path.glob(".*"))
    model, tokenizer = load_with_adapter(done.path)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "第1个问题是什么？"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=8)
    assert out.shape[1] > ids["input_ids"].shape[1]
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert run(STAGE, values).skipped


def test_the_report_needs_no_network_and_has_every_curve(root: Path) -> None:
    done = run(STAGE, _values(root, "report", data__eval_file=root / "eval.jsonl", training_args__eval_strategy="steps", training_args__eval_steps=3))
    page = (done.path / "report.html").read_text(encoding="utf-8")
    assert "http" not in page and page.count("<svg") == 7 and "eval_loss_after" in page
    lines = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 7)) and [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert all({"learning_rate", "grad_norm", "tokens", "tokens_per_s", "supervised", "memory_mib", "seconds"} <= set(line) for line in training)
    assert training[-1]["tokens"] == done.stats["tokens"]


@pytest.mark.parametrize("model", ["qwen_expanded", "llama_expanded"])
def test_new_rows_train_and_old_rows_never_move(root: Path, model: str) -> None:
    """Tied (qwen) and untied (llama): the rows of the expansion change in every embedding, all others stay bit for bit, a tie stays."""
    answer = "".join(load_tokenizer(root / model).decode([i]) for i in range(500, 540))
    train = rows(root / "new.jsonl", [{"instruction": "词", "input": "", "output": answer}] * 8)
    done = run(STAGE, {**_values(root, f"rows-{model}", model), "data__train_file": train})
    assert done.stats["trainable"]["new_rows"] == 40 and (done.path / "expansion.json").is_file()
    before = load_model(root / model)
    after, _ = load_with_adapter(done.path)
    merged = after.merge_and_unload()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, get)().weight, getattr(merged, get)().weight
        changed = (old != new).any(dim=1).nonzero()[:, 0].tolist()
        assert changed and set(changed) <= set(range(500, 540))
    tied = model.startswith("qwen")
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied


def test_rows_can_be_frozen(root: Path) -> None:
    done = run(STAGE, _values(root, "frozen", "qwen_expanded", peft__new_rows="freeze"))
    assert not [n for n in load_file(done.path / "adapter_model.safetensors") if "token" in n]


def test_full_fine_tuning_writes_a_model(root: Path) -> None:
    done = run(STAGE, _values(root, "full", peft__enabled=False, training_args__max_steps=8))
    assert (done.path / "model.safetensors").is_file() and not (done.path / "adapter_config.json").exists()
    assert done.stats["trainable"]["trainable"] == done.stats["trainable"]["total"]
    assert load_model(done.path).get_output_embeddings() is not None


RELATIVES = (
    {"peft__dora": True}, {"peft__rslora": True}, {"peft__init": "pissa"}, {"peft__init": "olora"}, {"peft__init": "orthogonal"}, {"peft__target_modules": "all-linear"},
    {"training_args__neftune_noise_alpha": 5.0},
)  # fmt: skip


@pytest.mark.parametrize("options", RELATIVES)
def test_relatives_of_lora_learn_and_come_back_as_they_were(root: Path, options: dict[str, Any]) -> None:
    """Some of them change the base weights when they start: what is loaded again must still be what was trained."""
    name = "-".join(f"{k}={v}" for k, v in options.items()).replace("_", "")
    done = run(STAGE, _values(root, name, data__eval_file=root / "eval.jsonl", **options))
    found = losses(done.path)
    assert found[-1] < found[0]
    model, tokenizer = load_with_adapter(done.path)
    held_out = corpus.conversations([root / "eval.jsonl"], Cache(root / "tokens"), renderer_for(tokenizer), max_length=128, overlong="truncate")
    loss, _ = supervised_loss(model, Examples(held_out), CausalCollator(tokenizer.pad_token_id), batch_size=8)
    assert loss == pytest.approx(done.stats["eval_loss_after"], abs=1e-4)


def test_lora_plus_gives_the_second_matrices_their_own_learning_rate(root: Path) -> None:
    plain, plus = (run(STAGE, _values(root, f"plus-{r}", peft__lora_plus_ratio=r, training_args__max_steps=1, training_args__learning_rate=1e-4)) for r in (1.0, 16.0))
    first, second = (load_file(done.path / "adapter_model.safetensors") for done in (plain, plus))
    for name, tensor in first.items():  # the first step of Adam is as long as the learning rate, and B starts at zero
        assert torch.allclose(second[name], tensor * 16, rtol=1e-3, atol=1e-7) if "lora_B" in name else torch.equal(second[name], tensor)


def test_a_template_by_its_bare_name(root: Path) -> None:
    bare = run(STAGE, _values(root, "bare", template_path="qwen2_chatml", training_args__max_steps=1))
    assert bare.stats["template"].startswith("qwen2_chatml") and "template" in bare.manifest["inputs"]
    by_path = run(STAGE, _values(root, "by-path", template_path=str(ROOT / "self_model/template/qwen2_chatml.json"), training_args__max_steps=1))
    assert losses(by_path.path) == losses(bare.path)


@pytest.mark.parametrize("given", ["qwen2_chatm", "self_model/template/qwen2_chatm.json", "/nowhere/qwen2_chatm.json"])
def test_a_template_that_is_not_there_is_answered_with_the_nearest(root: Path, given: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)template_path.*qwen2_chatm"):
        load_for(STAGE, None, settings(**_values(root, "none", template_path=given)))


def test_new_rows_get_their_own_learning_rate(root: Path) -> None:
    frozen = run(STAGE, _values(root, "rate0", "qwen_expanded", peft__new_rows_learning_rate=0.0))
    rows_after = next(t for n, t in load_file(frozen.path / "adapter_model.safetensors").items() if "token" in n)
    assert torch.equal(rows_after, load_model(root / "qwen_expanded").get_input_embeddings().weight.detach()[500:540])


def test_new_rows_that_no_answer_uses_rest_where_they_were(root: Path) -> None:
    """With the epsilon auto; with Adam's usual one each step pushes every one of them away at the learning rate."""
    few = rows(root / "few.jsonl", [{"instruction": "问", "input": "", "output": "多喝水。"}] * 6)
    tokenizer = load_tokenizer(root / "qwen_expanded")
    unused = torch.tensor([i for i in range(500, 540) if i not in tokenizer("<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n多喝水。<|im_end|>\n")["input_ids"]])
    was = load_model(root / "qwen_expanded").get_input_embeddings().weight.detach()[unused]

    def moved(name: str, **more: Any) -> float:
        done = run(STAGE, {**_values(root, name, "qwen_expanded", training_args__per_device_train_batch_size=1, **more), "data__train_file": few})
        return float((next(t for n, t in load_file(done.path / "adapter_model.safetensors").items() if "token" in n)[unused - 500] - was).abs().mean())

    assert moved("eps-usual") > 20 * moved("eps-auto", peft__new_rows_epsilon="auto") > 0


def test_long_rows_are_cut_or_dropped_and_counted(root: Path) -> None:
    long = rows(root / "long.jsonl", [{"instruction": "问", "input": "", "output": "很长的回答" * 40}, *[{"instruction": "问", "input": "", "output": "短"}] * 5])
    cut = run(STAGE, {**_values(root, "cut"), "data__train_file": long}).stats["rows"]
    assert cut["truncated"] == 1 and cut["kept"] == 6 and cut["dropped"] == {}
    dropped = run(STAGE, {**_values(root, "dropped", data__overlong="drop"), "data__train_file": long}).stats["rows"]
    assert dropped["truncated"] == 0 and dropped["kept"] == 5 and dropped["dropped"] == {"too_long": 1}


def test_bad_rows_are_dropped_with_their_reason(root: Path) -> None:
    good = [{"instruction": f"问{i}", "input": "", "output": "答案"} for i in range(4)]
    path = rows(root / "bad.jsonl", [*good, {"instruction": "问", "input": "", "output": ""}, {"conversations": [{"from": "robot", "value": "嗯"}]}, {"nothing": 1}])
    path.write_text(path.read_text(encoding="utf-8") + "{broken\n", encoding="utf-8")
    counts = run(STAGE, {**_values(root, "bad"), "data__train_file": path}).stats["rows"]
    assert counts["total"] == 8 and counts["kept"] + sum(counts["dropped"].values()) == 8 and counts["kept"] >= 4 and len(counts["dropped"]) >= 3


def test_several_processes_tokenise_what_one_does(root: Path) -> None:
    """More rows than one block holds, bad ones among them."""
    good = [{"instruction": f"问{i}", "input": "", "output": "答案" * (i % 40 + 1), "_source": f"r:{i}"} for i in range(600)]
    path = rows(root / "many.jsonl", [*good[:300], {"nothing": 1}, *good[300:]])
    renderer = renderer_for(load_tokenizer(root / "qwen"))
    alone, several = (corpus.conversations([path], Cache(root / "tokens" / str(n)), renderer, max_length=96, overlong="truncate", workers=n) for n in (1, 2))
    assert several.meta == alone.meta and alone.meta["total"] == 601 and len(alone) == 600 and alone.meta["truncated"] > 0
    assert (several.ids == alone.ids).all() and (several.weights == alone.weights).all() and several.names(range(600)) == alone.names(range(600))


def test_the_best_checkpoint_is_what_is_kept(root: Path) -> None:
    done = run(STAGE, _values(
        root, "best", data__eval_file=root / "eval.jsonl", training_args__max_steps=12, training_args__learning_rate=0.3, training_args__eval_strategy="steps",
        training_args__eval_steps=2, training_args__save_steps=2, training_args__load_best_model_at_end=True, early_stopping_patience=2,
    ))  # fmt: skip
    seen = [json.loads(line)["eval_loss"] for line in (done.path / "metrics.jsonl").read_text().splitlines() if "eval_loss" in line]
    assert abs(done.stats["eval_loss_after"] - min(seen)) < 1e-4 and len(seen) < 7


def test_checkpoints_stay_where_they_are_asked_for(root: Path) -> None:
    done = run(STAGE, _values(root, "kept", keep_checkpoints=True, training_args__save_steps=2, training_args__save_total_limit=2))
    assert sorted(p.name for p in (done.path / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert run(STAGE, _values(root, "kept", training_args__save_steps=2)).skipped  # neither enters the fingerprint


def test_an_adapter_finds_its_base_after_the_project_moved(tmp_path: Path, root: Path) -> None:
    project = tmp_path / "here"
    shutil.copytree(root / "qwen", project / "models" / "qwen")
    run(STAGE, sft_settings(project / "models" / "qwen", root / "train.jsonl", project / "out", training_args__max_steps=1))
    project.rename(tmp_path / "there")
    model, _ = load_with_adapter(tmp_path / "there" / "out")
    assert type(model).__name__.startswith("Peft")
    shutil.rmtree(tmp_path / "there" / "models")
    with pytest.raises(SopError, match="base model of this adapter is not there"):
        load_with_adapter(tmp_path / "there" / "out")


def test_paths_and_cosmetic_arguments_do_not_make_another_run(root: Path) -> None:
    from self_model_sop.config import comparable

    first = config_of(STAGE, _values(root, "x"))
    second = config_of(STAGE, _values(root, "y", training_args__logging_steps=3, training_args__save_steps=7, trace="tensorboard"))
    assert comparable(first) == comparable(second)
    assert comparable(config_of(STAGE, _values(root, "x", training_args__max_steps=7))) != comparable(first)


def test_the_peak_of_a_gpu_is_told_by_its_longest_known_name() -> None:
    assert machine.peak_flops("NVIDIA H100 PCIe") == 7.56e14 and machine.peak_flops("NVIDIA H100 80GB HBM3") == 9.89e14
    assert machine.peak_flops("Tesla T4") == 6.5e13 and machine.peak_flops("some other device") is None


def test_the_plan_needs_no_torch(root: Path) -> None:
    loaded = load_for(STAGE, None, settings(**_values(root, "plan")))
    text = "\n".join(STAGE.plan(loaded.config))
    assert "109,824 weights" in text and "GiB" in text and "steps" in text


def test_a_generation_config_that_contradicts_itself_does_not_lose_the_training(root: Path) -> None:
    model = shutil.copytree(root / "qwen", root / "contradicting")
    settings_file = model / "generation_config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    done = run(STAGE, _values(root, "contradicting", "contradicting", peft__enabled=False, training_args__max_steps=1))
    assert json.loads((done.path / "generation_config.json").read_text())["temperature"] == 0.6
