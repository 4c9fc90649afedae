"""data.preference: pairs, their parts, and prompts in verl's contract."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from self_model_sop.config import ConfigError
from self_model_sop.data import preference, process
from self_model_sop.data.filters import PartConfig
from self_model_sop.data.preference import Config
from self_model_sop.data.process import ProcessConfig
from self_model_sop.data.records import read, write_jsonl
from self_model_sop.data.rl import RLConfig, to_rl
from self_model_sop.stage import load_for

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_process" / "sample_data"
SHARED = ROOT.parent / "shared" / "data"


def run_on(folder: Path, rows: list[dict[str, Any]], ratio: float = 0.0, **options: Any) -> dict[str, Any]:
    write_jsonl(folder / "in.jsonl", rows)
    done = preference.run(Config(input=folder / "in.jsonl", output_dir=folder / "out", process=ProcessConfig(validation_ratio=ratio, near_dedup=False), **options))
    s = done.stats["sets"]["reward"]
    assert s["total"] == s["kept"] + sum(s["dropped"].values()) + sum(s["quarantined"].values())
    assert s["kept"] >= sum(done.stats["preferences"].values())
    if done.stats["rl"]:
        assert s["kept"] == sum(done.stats["rl"].values()) + sum(done.stats["rl_missing"].values())
    return {**done.stats, **s}


def written(folder: Path, name: str = "train.jsonl") -> list[dict[str, Any]]:
    return [r.row for r in read(folder / "out" / "reward" / name) if r.row is not None]


def prompts(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(folder / "out" / "reward" / "rl" / f"{split}.parquet").to_pylist()
    return found


def test_every_row_that_lacks_something_says_what(tmp_path: Path) -> None:
    good = {"prompt": "头痛三天怎么办？", "chosen": "先测血压，必要时就诊。", "rejected": "忍着。"}
    rows = [
        (None, good),
        ("duplicates", {**good, "prompt": "头痛三天怎么办? "}),
        ("chosen_equals_rejected", {"prompt": "发热怎么办", "chosen": "多喝水。", "rejected": " 多喝水。\n"}),
        ("no_rejected", {"prompt": "发热怎么办", "chosen": "多喝水。"}),
        ("no_chosen", {"question": "发热怎么办", "response_rejected": "不管它。"}),
        ("empty_rejected", {"prompt": "发热怎么办", "chosen": "多喝水。", "rejected": None}),
        ("empty_chosen", {"prompt": "发热怎么办", "chosen": " ", "rejected": "不管它。"}),
        ("no_answer", {"prompt": "只有问题"}),
        ("no_prompt", {"chosen": "多喝水。", "rejected": "不管它。"}),
        ("no_prompt", {"answer": "只有回答"}),
        ("no_prompt", {"text": "一段没有问题的文字，它不能做提示。"}),
        ("empty_prompt", {"prompt": "　", "chosen": "多喝水。", "rejected": "不管它。"}),
        ("answer_not_last", {"prompt": "发热", "chosen": [{"role": "user", "content": "喂"}], "rejected": [{"role": "user", "content": "在吗"}]}),
        ("no_ground_truth", {"question": "发热怎么办", "answer": ""}),
        ("no_answer", {"question": "哪个对？", "options": ["一", "二"]}),
    ]
    stats = run_on(tmp_path, [row for _, row in rows])
    dropped = {r["_source"]: r["reason"] for r in written(tmp_path, "dropped.jsonl")}
    assert dropped == {f"in.jsonl:{i}": reason for i, (reason, _) in enumerate(rows, 1) if reason}
    assert stats["quarantined"] == {} and stats["kept"] == 1


def test_the_contract(tmp_path: Path) -> None:
    """Field for field, for every kind of row that can be a prompt."""
    talk = [{"from": "human", "value": "头痛"}, {"from": "gpt", "value": "多久了？"}, {"from": "human", "value": "三天"}]
    rows = [
        {"system": "你是医生。", "conversations": talk, "chosen": {"from": "gpt", "value": "请测血压。"}, "rejected": {"from": "gpt", "value": "忍着。"}},
        {"question": "成人正常收缩压低于多少？", "answer": "解：查指南。\n#### 140mmHg", "data_source": "bp", "ability": "recall"},
        {"question": "哪项是高血压？", "options": ["(A)130/80", "(B)150/95"], "label": "B"},
        {"prompt": [{"role": "user", "content": "二加二？"}], "reward_model": {"style": "rule", "ground_truth": "4"}, "data_source": "math", "ability": "math"},
    ]
    stats = run_on(tmp_path, rows, rl=RLConfig(answer_pattern=r"####\s*(.+)|请.*", instruction="请写出答案。"))
    assert stats["rl_missing"] == {} and stats["preferences"] == {"train": 1}
    found = prompts(tmp_path)
    assert [list(r) for r in found] == [["data_source", "prompt", "ability", "reward_model", "extra_info"]] * 4
    assert found[0]["prompt"] == [
        {"role": "system", "content": "你是医生。"},
        {"role": "user", "content": "头痛"},
        {"role": "assistant", "content": "多久了？"},
        {"role": "user", "content": "三天\n请写出答案。"},
    ]
    assert [r["data_source"] for r in found] == ["in", "bp", "in", "math"]
    assert [r["ability"] for r in found] == ["preference", "recall", "multiple_choice", "math"]
    assert found[3]["reward_model"] == {"style": "rule", "ground_truth": "4"}
    assert found[0]["extra_info"] == {"split": "train", "index": 0, "source": "in.jsonl:1"}
    assert [r["extra_info"]["index"] for r in found] == [0, 1, 2, 3]


def test_ground_truth() -> None:
    def truth(answer: str, pattern: str | None) -> dict[str, Any]:
        model: dict[str, Any] = to_rl({"question": "几？", "answer": answer}, RLConfig(answer_pattern=pattern))["reward_model"]
        return model

    assert truth("先算 1。#### 3\n再算。#### 4 ", r"####\s*(.+)") == {"style": "rule", "ground_truth": "4"}
    assert truth(" 食管克罗恩病\n", None) == {"style": "rule", "ground_truth": "食管克罗恩病"}
    pair = {"prompt": "问", "chosen": "好", "rejected": "坏"}
    assert to_rl(pair, RLConfig())["reward_model"] == {"style": "model", "ground_truth": "好"}
    assert to_rl(pair, RLConfig(style="rule"))["reward_model"]["style"] == "rule"


def test_a_preference_that_is_no_prompt_stays_a_preference(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}]}
    asked = [{"role": "user", "content": "北京天气？"}, call, {"role": "tool", "content": "晴"}]
    stats = run_on(tmp_path, [{"messages": asked, "chosen": "今天晴。", "rejected": "不知道。"}, {"prompt": "问题一", "chosen": "好的回答", "rejected": "坏的回答"}])
    assert stats["preferences"] == {"train": 2} and stats["rl"] == {"train": 1}
    assert written(tmp_path, "rl/missing.jsonl") == [{"_source": "in.jsonl:1", "reason": "tools_in_prompt"}]


def test_lengths_of_parts(tmp_path: Path) -> None:
    rows = [{"prompt": "问" * n, "chosen": "答" * (n + 1), "rejected": "错" * (n + 2)} for n in (3, 5, 40, 60)]
    stats = run_on(tmp_path, rows, parts=PartConfig(max_prompt_chars=50, min_answer_chars=5))
    assert stats["dropped"] == {"answer_too_short": 1, "prompt_too_long": 1}
    assert stats["lengths"]["prompt"] == {"least": 5, "median": 40, "p95": 40, "most": 40}
    assert stats["lengths"]["rejected"]["most"] == 42
    (tmp_path / "again").mkdir()
    assert run_on(tmp_path / "again", rows, parts=PartConfig(max_answer_chars=41))["dropped"] == {"answer_too_long": 2}


def test_the_sample_corpus_through_the_door(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "data_process" / "process_preference.py"), "--input", str(SAMPLE), "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "chosen_equals_rejected" in done.stdout and "preference rows: train 102, validation 8" in done.stdout and "prompts for RL: train 102, validation 8" in done.stdout
    manifest = json.loads((tmp_path / "reward" / "manifest.json").read_text(encoding="utf-8"))
    assert {o["path"] for o in manifest["outputs"]} == {"train.jsonl", "validation.jsonl", "dropped.jsonl", "rl/train.parquet", "rl/validation.parquet"}
    process.run(process.Config(input=SAMPLE / "reward", output_dir=tmp_path / "plain", subdir="reward"))
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "reward" / name).read_bytes() == (tmp_path / "plain" / "reward" / name).read_bytes()


def test_preflight(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("", encoding="utf-8")
    path = tmp_path / "preference.yaml"
    path.write_text(f"input: {tmp_path / 'in.jsonl'}\nsubdir: finetune\nrl: {{answer_pattern: '(('}}\nparts: {{min_answer_chars: 9, max_answer_chars: 3}}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_for(preference.STAGE, path, [])
    assert all(key in str(error.value) for key in ("subdir", "rl.answer_pattern", "parts.min_answer_chars"))


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")
def test_real_preferences_load_as_verl_loads_them(tmp_path: Path) -> None:
    from datasets import load_dataset

    done = preference.run(Config(input=SHARED / "preference" / "dpo_zh_500.jsonl", output_dir=tmp_path))
    files = {split: str(tmp_path / "reward" / "rl" / f"{split}.parquet") for split in ("train", "validation")}
    rows = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert rows["train"].num_rows + rows["validation"].num_rows == done.stats["sets"]["reward"]["kept"] > 400
    for row in rows["train"]:
        assert row["prompt"][-1]["role"] == "user" and row["reward_model"]["style"] == "model" and row["reward_model"]["ground_truth"] and row["data_source"] == "dpo_zh_500"
