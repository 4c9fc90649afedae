"""FSDP and DeepSpeed: the shipped files say what the libraries read, and sharded weights end as one model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from self_model_sop.config import ConfigError
from self_model_sop.errors import ENVIRONMENT, SopError
from self_model_sop.stage import load_for
from self_model_sop.train import pretrain, sft
from self_model_sop.train.model import load_model, load_with_adapter
from tiny_models import tiny_llama, tiny_qwen
from tiny_runs import chats, expanded, losses, pretrain_settings, run, settings, sft_settings, torchrun

CONFIGS = Path(__file__).resolve().parents[2] / "config" / "self_model_config"
FSDP, DEEPSPEED = sorted((CONFIGS / "fsdp").glob("*.json")), sorted((CONFIGS / "deepspeed").glob("*.json"))

# accelerate shards on accelerators only, and on CPUs quietly keeps whole copies. PyTorch itself shards on CPUs (gloo), so for the test accelerate is told that it may.
ALLOW_CPUS = """
import os
if os.environ.get("LOCAL_RANK"):
    import accelerate.state as state
    real = state.AcceleratorState.__init__
    def allowing(self, *args, fsdp_plugin=None, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == state.DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = self.distributed_type
    state.AcceleratorState.__init__ = allowing
"""


@pytest.mark.parametrize("path", FSDP, ids=lambda p: p.stem)
def test_the_shipped_fsdp_files_are_what_the_library_reads(path: Path, tmp_path: Path) -> None:
    import transformers
    from accelerate import FullyShardedDataParallelPlugin

    given = json.loads(path.read_text())
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, fsdp=True, fsdp_config=dict(given))
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    assert plugin.fsdp_version == given["version"] == 2 and plugin.reshard_after_forward is True and plugin.activation_checkpointing is given["activation_checkpointing"]
    assert (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy") is given["cpu_offload"] and plugin.state_dict_type.name == "FULL_STATE_DICT"
    documented = transformers.TrainingArguments.__doc__ or ""
    assert not [key for key in given if f"- {key} (" not in documented], "a key that the library does not know"


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda p: p.stem)
def test_the_shipped_deepspeed_files_are_what_the_library_reads(path: Path) -> None:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    read = HfDeepSpeedConfig(str(path))
    assert (read.is_zero2(), read.is_zero3()) == (path.stem == "zero2", path.stem == "zero3")
    assert all(read.get_value(key) == "auto" for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16.enabled"))
    assert not read.config.keys() & {"optimizer", "scheduler"}
    assert read.is_zero2() or read.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save")


def _zero(**changed: Any) -> str:
    """zero2.json with other values; None leaves a key out."""
    made = {**json.loads((CONFIGS / "deepspeed" / "zero2.json").read_text()), **changed}
    return json.dumps({key: value for key, value in made.items() if value is not None})


FAULTS: dict[str, tuple[str, str, str]] = {
    "pieces": ("fsdp", '{"state_dict_type": "SHARDED_STATE_DICT"}', "would leave the result in pieces"),
    "no object": ("fsdp", "[]", "no JSON object"),
    "a scheduler of its own": ("deepspeed", _zero(scheduler={"type": "WarmupLR"}), "would silently go before training_args"),
    "a result that cannot be gathered": ("deepspeed", _zero(zero_optimization={"stage": 3}), "stage3_gather_16bit_weights_on_model_save: true"),
    "a misspelt section": ("deepspeed", _zero(zero_optimization=None, zero_optimisation={"stage": 2}), "zero_optimization.stage is None: nothing would be sharded"),
    "ZeRO switched off": ("deepspeed", _zero(zero_optimization={"stage": 0}), "nothing would be sharded"),
    "another batch": ("deepspeed", _zero(train_micro_batch_size_per_gpu=16), "train_micro_batch_size_per_gpu is 16, training_args.per_device_train_batch_size 4"),
    "another accumulation": ("deepspeed", _zero(gradient_accumulation_steps=2), "gradient_accumulation_steps is 2, training_args.gradient_accumulation_steps 1"),
    "no clipping": ("deepspeed", _zero(gradient_clipping=None), "gradient_clipping is None, training_args.max_grad_norm 1.0"),
    "a batch for some number of processes": ("deepspeed", _zero(train_batch_size=64), "it follows from training_args and the number of processes"),
    "another precision": ("deepspeed", _zero(bf16={"enabled": True}), "bf16.enabled is True, but `precision` decides"),
}


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda p: p.stem)
def test_the_shipped_deepspeed_files_pass_whatever_training_args_say(path: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    more = {"training_args__gradient_accumulation_steps": 4, "training_args__max_grad_norm": 0.5, "precision": "bf16"}
    load_for(sft.STAGE, None, settings(**sft_settings(tmp_path / "model", chats(tmp_path / "chats.jsonl"), tmp_path / "out", deepspeed=path, **more)))


@pytest.mark.parametrize("name", FAULTS)
def test_files_that_would_lose_the_result_are_refused(name: str, tmp_path: Path) -> None:
    key, text, expected = FAULTS[name]
    (tmp_path / "sharding.json").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_for(sft.STAGE, None, settings(**sft_settings(tmp_path, chats(tmp_path / "chats.jsonl"), tmp_path / "out", **{key: tmp_path / "sharding.json"})))


def test_several_phases_cannot_be_sharded(tmp_path: Path) -> None:
    phases = [{"name": "rows", "train": "new_rows", "max_steps": 1}, {"name": "full", "max_steps": 1}]
    with pytest.raises(ConfigError, match="several phases"):
        load_for(pretrain.STAGE, None, settings(**pretrain_settings(tmp_path, chats(tmp_path / "t.jsonl"), tmp_path / "out", fsdp=FSDP[0], phases=phases)))


def test_where_nothing_would_be_sharded_the_run_stops(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SopError, match="would not be sharded here") as error:
        run(sft.STAGE, sft_settings(tiny_qwen(tmp_path / "model"), chats(tmp_path / "chats.jsonl"), tmp_path / "out", fsdp=FSDP[0]))
    assert error.value.code == ENVIRONMENT


def test_rows_of_an_embedding_cannot_be_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("self_model_sop.train.preflight.world", lambda: 2)
    with pytest.raises(SopError, match="cannot train single rows"):
        run(sft.STAGE, sft_settings(expanded(tiny_qwen(tmp_path / "model")), chats(tmp_path / "chats.jsonl"), tmp_path / "out", fsdp=FSDP[0]))


def _sharded(tmp_path: Path, command: str, values: dict[str, Any]) -> None:
    (tmp_path / "hook").mkdir(exist_ok=True)
    (tmp_path / "hook" / "sitecustomize.py").write_text(ALLOW_CPUS)
    done = torchrun(tmp_path, command, values, PYTHONPATH=os.pathsep.join([str(tmp_path / "hook"), *sys.path]))
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_an_adapter_of_sharded_weights_is_that_of_whole_ones(tmp_path: Path) -> None:
    """Embeddings that are not tied; an evaluation set that leaves one process without a last batch."""
    model, train = tiny_llama(tmp_path / "model"), chats(tmp_path / "chats.jsonl", 40)
    more = {"data__eval_file": chats(tmp_path / "eval.jsonl", 9, seed=5), "training_args__per_device_eval_batch_size": 4, "training_args__max_steps": 4}
    alone = run(sft.STAGE, sft_settings(model, train, tmp_path / "alone", **more, training_args__per_device_train_batch_size=8))
    _sharded(tmp_path, "train sft", sft_settings(model, train, tmp_path / "both", **more, fsdp=FSDP[0]))
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "both"), losses(alone.path), strict=True)) <= 1e-5
    stats = json.loads((tmp_path / "both" / "manifest.json").read_text())["stats"]
    assert stats["eval_loss_after"] == pytest.approx(alone.stats["eval_loss_after"], abs=1e-5)
    whole, sharded = (load_file(folder / "adapter_model.safetensors") for folder in (alone.path, tmp_path / "both"))
    assert whole.keys() == sharded.keys() and all(torch.allclose(whole[n], sharded[n], atol=1e-5) for n in whole)
    load_with_adapter(tmp_path / "both")
    assert not list((tmp_path / "both").glob("*.bin"))


@pytest.mark.slow
def test_a_sharded_model_is_saved_whole(tmp_path: Path) -> None:
    """Every weight trained, tied embeddings, and a checkpoint in the middle."""
    model, train = tiny_qwen(tmp_path / "model"), chats(tmp_path / "chats.jsonl", 40)
    more = {"peft__enabled": False, "training_args__max_steps": 4, "training_args__save_steps": 2, "training_args__learning_rate": 1e-3}
    alone = run(sft.STAGE, sft_settings(model, train, tmp_path / "alone", **more, training_args__per_device_train_batch_size=8))
    _sharded(tmp_path, "train sft", sft_settings(model, train, tmp_path / "both", **more, fsdp=FSDP[0]))
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "both"), losses(alone.path), strict=True)) <= 1e-5
    assert json.loads((tmp_path / "both" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    assert "lm_head.weight" not in load_file(tmp_path / "both" / "model.safetensors")
    whole, sharded = (dict(load_model(folder).named_parameters()) for folder in (alone.path, tmp_path / "both"))
    assert whole.keys() == sharded.keys() and all(torch.allclose(whole[n], sharded[n], atol=1e-5) for n in whole)


@pytest.mark.slow
@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda p: p.stem)
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "every weight"])
def test_deepspeed_ends_with_the_weights_of_one_process(path: Path, adapter: bool, tmp_path: Path) -> None:
    """The shipped files in DeepSpeed itself, which shards on CPUs (gloo) too; a checkpoint in the middle, gathered weights at the end."""
    pytest.importorskip("deepspeed", reason="an environment of its own: envs/deepspeed.txt")
    model, train = tiny_qwen(tmp_path / "model"), chats(tmp_path / "chats.jsonl", 40)
    more = {"peft__enabled": adapter, "training_args__max_steps": 4, "training_args__save_steps": 2, "training_args__learning_rate": 1e-3, "training_args__warmup_steps": 2}
    alone = run(sft.STAGE, sft_settings(model, train, tmp_path / "alone", **more, training_args__per_device_train_batch_size=8))
    done = torchrun(tmp_path, "train sft", sft_settings(model, train, tmp_path / "both", **more, deepspeed=path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "both"), losses(alone.path), strict=True)) <= 1e-5
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    whole, sharded = (load_file(folder / name) for folder in (alone.path, tmp_path / "both"))
    assert whole.keys() == sharded.keys() and all(torch.allclose(whole[n], sharded[n], atol=1e-5) for n in whole)
    assert not list((tmp_path / "both").glob("*.bin")) and not list((tmp_path / "both").glob("global_step*"))
