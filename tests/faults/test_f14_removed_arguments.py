"""F14: an argument that transformers no longer knows is found with its line, and answered with advice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from self_model_sop.config import ConfigError
from self_model_sop.stage import load_for
from self_model_sop.train.arguments import OURS, REMOVED, check, known
from self_model_sop.train.sft import STAGE

# Every field of TrainingArguments of 4.57 (and the older names that were still in wide use) that 5.23 has no more.
GONE = (
    "overwrite_output_dir", "evaluation_strategy", "no_cuda", "use_mps_device", "save_safetensors", "per_gpu_train_batch_size", "per_gpu_eval_batch_size", "warmup_ratio",
    "group_by_length", "logging_dir", "half_precision_backend", "fp16_backend", "fp16_opt_level", "adafactor", "include_tokens_per_second", "include_inputs_for_metrics",
    "push_to_hub_token", "push_to_hub_model_id", "push_to_hub_organization", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "jit_mode_eval", "use_ipex",
    "torchdynamo", "ray_scope", "past_index", "mp_parameters", "tpu_num_cores", "tpu_metrics_debug", "dispatch_batches", "split_batches",
)  # fmt: skip


@pytest.mark.parametrize("name", GONE)
def test_each_removed_argument_has_advice(name: str, tmp_path: Path) -> None:
    if name in known():
        pytest.skip(f"the installed transformers still knows {name}")
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: some/model\ntraining_args:\n  output_dir: out\n  {name}: 1\n")
    with pytest.raises(ConfigError) as error:
        load_for(STAGE, path, (), check_paths=False)
    [problem] = [p for p in error.value.problems if name in p.what]
    assert problem.where.endswith("run.yaml:4") and "removed" in problem.what and problem.fix == REMOVED[name]


def test_advice_names_arguments_that_exist() -> None:
    words = {word.strip(".,:`") for text in REMOVED.values() if text.startswith("write ") for word in text.removeprefix("write ").split()[:1]}
    assert words <= set(known()), words - set(known())
    assert not set(REMOVED) & set(known()), "known again: not removed"


def test_typos_types_choices_and_ranges() -> None:
    found = {key: (what, fix) for key, what, fix in check({
        "learnig_rate": 1e-4, "num_train_epochs": "three", "lr_scheduler_type": "cosin", "bf16": 1, "per_device_train_batch_size": 0, "warmup_steps": 0.1, "max_steps": 1e3,
        "optim": "adamw_torch", "weight_decay": 0, "gradient_checkpointing": True, "report_to": "wandb",
    })}  # fmt: skip
    assert set(found) == {"learnig_rate", "num_train_epochs", "lr_scheduler_type", "bf16", "per_device_train_batch_size", "report_to"}
    assert "'learning_rate'" in found["learnig_rate"][1] and "'cosine'" in found["lr_scheduler_type"][1] and found["report_to"] == ("not set here", OURS["report_to"])


def test_every_known_argument_with_one_letter_wrong_is_recognised() -> None:
    names = [n for n in known() if len(n) > 5 and n not in OURS]
    right = sum(f"{name!r}" in next((fix for _, _, fix in check({name[:3] + name[4:]: 1})), "") for name in names)
    assert right / len(names) >= 0.95


def test_nothing_heavy_is_imported_and_it_takes_no_time() -> None:
    code = """
import sys, time
from self_model_sop.train import arguments
began = time.process_time()
arguments.known()
print(time.process_time() - began < 0.15, sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "True []"
