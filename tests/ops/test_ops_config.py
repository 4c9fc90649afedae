"""`sop config check` and `show`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from self_model_sop.config import ConfigError
from self_model_sop.errors import OK, USAGE, SopError
from self_model_sop.ops import config as ops_config

ROOT = Path(__file__).parents[2]

FIVE = """\
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
templat_path: self_model/template/qwen2_chatml.json
data:
  train_file: data_process/final_data/finetune/trian.jsonl
  max_length: long
trace: none
peft: {enabled: true, lora_r: 8, lora_r: 16}
wandb_api_key: 0123456789abcdef0123456789abcdef01234567
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config/self_model_config").mkdir(parents=True)
    (tmp_path / "data_process/final_data/finetune").mkdir(parents=True)
    (tmp_path / "data_process/final_data/finetune/train.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_five_mistakes_are_all_reported_within_a_second(project: Path) -> None:
    """A typo, a wrong type, a duplicate key, a missing file and a secret: each with its line and what to do, in one go."""
    path = project / "config/self_model_config/finetune.yaml"
    path.write_text(FIVE)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "self_model_sop.cli", "config", "check", str(path)], cwd=project, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    lines = [line.removeprefix("error: ") for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == USAGE and "Traceback" not in done.stderr and "0123456789abcdef" not in "".join(lines)
    name = "config/self_model_config/finetune.yaml"
    expected = [
        f"{name}:2: unknown key 'templat_path'; did you mean 'template_path'?",
        f"{name}:4: data.train_file: no such file or folder: data_process/final_data/finetune/trian.jsonl; did you mean 'train.jsonl'?",
        f'{name}:5: data.max_length: expected integer, got "long"; write the number without quotes',
        f"{name}:7: peft.lora_r: given twice (first at {name}:7); keep one of the two",
        f"{name}:8: wandb_api_key: a secret must not be in a config file (value not shown); remove it, revoke it if it was shared, and set WANDB_API_KEY in the environment",
    ]
    assert [line for line in lines if line in expected] == expected, lines
    assert not [line for line in done.stderr.splitlines() if line.startswith("import time:") and line.rsplit("|", 1)[-1].strip() in ("torch", "transformers", "datasets")]
    assert seconds < 3, "under -X importtime on a busy machine; a second on an idle one"


def test_check_says_what_a_file_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "mine.yaml").write_text("min_chars: 5\njaccard_threshold: 0.8\n")
    (project / "config/model_config").mkdir()
    (project / "config/model_config/config.yaml").write_text("huggingface: {endpoint: https://hf-mirror.com}\n")
    assert ops_config.main(["check", "config/model_config/config.yaml"]) == OK
    assert "valid (shared by all stages)" in capsys.readouterr().out
    (project / "config/model_config/config.yaml").write_text("hugingface: {endpoint: https://hf-mirror.com}\n")
    assert ops_config.main(["check", "config/model_config/config.yaml"]) == USAGE
    assert "did you mean 'huggingface'?" in capsys.readouterr().err


def test_problems_of_all_files_at_once(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "config/model_config").mkdir()
    (project / "config/model_config/config.yaml").write_text("huggingface: {ofline: true}\n")
    assert ops_config.main(["check", "config/model_config/config.yaml", "gone.yaml"]) == USAGE
    err = capsys.readouterr().err
    assert "did you mean 'offline'?" in err and "gone.yaml: no such config file" in err


def test_a_file_of_no_command(project: Path) -> None:
    (project / "x.yaml").write_text("qqqqq: 1\n")
    with pytest.raises(SopError, match="no command reads these keys"):
        ops_config.kind_of(project / "x.yaml")
    with pytest.raises(SopError, match="no stage"):
        ops_config.kind_of(project / "x.yaml", "data.proces")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model_name_or_path: x\ndata: {train_file: t}\npeft: {enabled: true}\ntraining_args: {}\n", "train.sft"), ("stages: []\n", "pipeline"),
        ("selection: {min_freq: 3}\nbase_tokenizer: x\n", "tokenizer.baseline"), ("dataset_name: x\nsample_limit: 3\n", "data.fetch"),
        ("models: {}\ntexts: {}\n", "eval.compare"), ("adapter: x\noutput_dir: y\n", "train.merge"),
    ],
)  # fmt: skip
def test_a_file_anywhere_is_recognised_by_its_keys(project: Path, text: str, name: str) -> None:
    (project / "x.yaml").write_text(text)
    assert ops_config.kind_of(project / "x.yaml").name == name


def test_show_gives_every_value_its_origin(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "config/model_config").mkdir()
    (project / "config/model_config/config.yaml").write_text("huggingface: {endpoint: https://hf-mirror.com}\n")
    path = project / "config/self_model_config/finetune.yaml"
    path.write_text("model_name_or_path: m\npeft:\n  lora_r: 4\ntraining_args: {learning_rate: 1e-4, num_train_epochs: 1}\n")
    assert ops_config.main(["show", str(path), "training_args.learning_rate=2e-4"]) == OK
    lines = capsys.readouterr().out.splitlines()[1:]
    rows = dict(line.split("  # ")[0].strip().split(": ", 1) for line in lines)
    origins = {line.split(":")[0]: line.split("  # ")[1] for line in lines}
    assert rows["training_args.learning_rate"] == "0.0002" and rows["peft.lora_r"] == "4"
    assert origins["training_args.learning_rate"] == "command line (training_args.learning_rate=...)"
    assert origins["training_args.num_train_epochs"] == "config/self_model_config/finetune.yaml:4"
    assert origins["peft.lora_r"] == "config/self_model_config/finetune.yaml:3"
    assert origins["huggingface.endpoint"] == "config/model_config/config.yaml:1"
    assert origins["peft.lora_alpha"] == "default"


def test_check_of_a_pipeline_checks_its_stages(project: Path) -> None:
    (project / "p.yaml").write_text("name: p\nstages:\n  - f: {stage: data.fetch, with: {dataset_nmae: x}}\n")
    with pytest.raises(ConfigError) as caught:
        ops_config.check_file(project / "p.yaml")
    assert "p.yaml:3: unknown key 'dataset_nmae'; did you mean 'dataset_name'?" in str(caught.value)
