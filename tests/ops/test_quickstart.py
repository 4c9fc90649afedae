"""The shipped quickstart from end to end, on a tiny random model and a few steps: every stage, the summary, the second run, a change, and the chain."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny_models

ROOT = Path(__file__).parents[2]
PIPELINE = "config/pipeline/quickstart.yaml"
NAMES = [next(iter(stage)) for stage in yaml.safe_load((ROOT / PIPELINE).read_text(encoding="utf-8"))["stages"]] + ["compare"]
pytestmark = pytest.mark.slow


def run(folder: Path, *more: str) -> tuple[str, set[str], float]:
    """(stdout, heavy packages that were imported, seconds) of the quickstart on a tiny model."""
    phases = "[{name: rows, train: new_rows, max_steps: 2, learning_rate: 5.0e-3}, {name: full, train: all, max_steps: 2, learning_rate: 3.0e-4}]"
    settings = [
        f"root={folder / 'run'}", f"model.model_name_or_path={folder / 'tiny'}", "shared.tokenizer.selection.new_tokens=60",
        f"pretrain.phases={phases}", "sft.training_args.max_steps=2", "evaluation.answers.max_new_tokens=4", "evaluation.max_documents=4",
    ]  # fmt: skip
    code = (
        "import sys\nfrom self_model_sop.cli import main\ncode = main(sys.argv[1:])\n"
        "print('HEAVY', *[m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])\nraise SystemExit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "run", PIPELINE, *settings, *more], cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    return done.stdout, set(lines[-1].split()[1:]), time.perf_counter() - start


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart")
    tiny_models.tiny_qwen(folder / "tiny")
    out, heavy, _ = run(folder)
    assert "torch" not in heavy  # what loads it runs in a process of its own, whose memory goes back
    return folder, out


def states(out: str) -> dict[str, str]:
    """Stage -> `done` or `up to date`, from the lines `[n/m] id: state -> path`."""
    return dict(re.findall(r"^\[\d+/\d+\] (\w+): (done|up to date)", out, re.MULTILINE))


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run/summary.json").read_text(encoding="utf-8")))


def test_every_stage_is_done_and_summarised(finished: tuple[Path, str]) -> None:
    folder, out = finished
    assert states(out) == dict.fromkeys(NAMES, "done")
    for words in ("Data (process)", "near duplicates", "tokens per character, held-out", "held-out loss: before", "bits per byte", "Answers (greedy)", "sop infer chat"):
        assert words in out, words
    stats = {s["id"]: s["stats"] for s in summary(folder)["stages"]}
    assert stats["evaluate"]["reduction"] > 0.05 and not any(stats["evaluate"]["changed_regression_lines"].get(k) for k in ("english", "code"))
    assert stats["compare"]["order"] == ["model", "resize", "pretrain", "merge"] and set(stats["compare"]["bits"]["merge"]) == {"domain", "general"}
    assert stats["sft"]["eval_loss_after"] > 0 and (folder / "run/merge/tokenizer.json").is_file()


def test_the_second_run_does_nothing_and_loads_nothing(finished: tuple[Path, str]) -> None:
    out, heavy, seconds = run(finished[0])
    assert states(out) == dict.fromkeys(NAMES, "up to date") and ": done in" not in out
    assert heavy == set() and seconds < 15


def test_what_the_data_lost_is_what_was_planted(finished: tuple[Path, str]) -> None:
    """The noise that planted.json lists, counted by the stage that removes it."""
    planted = json.loads((ROOT / "data_process/sample_data/planted.json").read_text(encoding="utf-8"))

    def count(kind: str, folder: str) -> int:
        return sum(p["kind"] == kind and p["file"].startswith(folder) for p in planted)

    stats = next(s["stats"] for s in summary(finished[0])["stages"] if s["id"] == "process")
    dropped = {name: {k: n for k, n in s["dropped"].items() if n} for name, s in stats["sets"].items()}
    expected = {
        "pretrain": {"duplicates": "exact_duplicate", "near_duplicates": "near_duplicate", "too_short": "too_short"},
        "finetune": {"duplicates": "exact_duplicate", "empty_turn": "empty_answer", "ends_with_human": "ends_with_user"},
        "reward": {"chosen_equals_rejected": "chosen_equals_rejected"},
    }
    assert dropped == {name: {reason: count(kind, name) for reason, kind in kinds.items()} for name, kinds in expected.items()}
    assert sum(stats["sets"]["pretrain"]["quarantined"].values()) == count("malformed_json", "pretrain")
    assert sum(stats["pii"].values()) == count("phone", "pretrain") + count("id_number", "pretrain")
    for s in stats["sets"].values():
        assert s["total"] == s["kept"] + sum(s["dropped"].values()) + sum(s["quarantined"].values()) and s["kept"] == s["train"] + s["validation"]


def test_everything_verifies_and_leads_back_to_the_raw_files(finished: tuple[Path, str]) -> None:
    """F93: from the last model to every input file."""
    from self_model_sop.ops import runs

    found = runs.find(finished[0] / "run")
    runs.check(found)
    assert {f.state for f in found} == {"ok"} and len(found) == len(NAMES)
    todo, seen, raw = [next(f for f in found if f.manifest and f.manifest["stage"] == "train.merge")], [], set()
    while todo:
        item = todo.pop()
        seen.append(item)
        todo += [s for s in item.sources if s not in seen]
        assert item.manifest and item.manifest["code"] and item.manifest["libraries"]
        raw |= {e["path"] for e in item.manifest["inputs"].values() if "/run/" not in e["path"]}
    made = {f.manifest["stage"] for f in seen if f.manifest}
    assert made >= {"train.merge", "train.sft", "train.pretrain", "tokenizer.resize", "tokenizer.extend", "data.process", "data.fetch", "data.model"}
    assert any("sample_data" in p for p in raw) and str(finished[0] / "tiny") in raw


def test_a_change_reruns_only_what_depends_on_it(finished: tuple[Path, str]) -> None:
    """Last: it changes the run."""
    out, _, _ = run(finished[0], "evaluation.answers.max_new_tokens=5")
    assert states(out) == dict.fromkeys(NAMES, "up to date") | {"compare": "done"}
    out, _, _ = run(finished[0], "evaluation.answers.max_new_tokens=5", "sft.training_args.max_steps=1")
    assert states(out) == dict.fromkeys(NAMES, "up to date") | {"sft": "done", "merge": "done", "compare": "done"}
