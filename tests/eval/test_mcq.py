"""Multiple choice: the harness's own numbers, item by item; a model that knows, and one that always says the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from exam_sets import SHARED, cmmlu, rows
from self_model_sop.errors import SopError
from self_model_sop.eval import accuracy, harness, mcq
from self_model_sop.eval.harness import Exam, Outcome
from self_model_sop.eval.models import Opened, open_model
from self_model_sop.eval.questions import LETTERS, QuestionSet, read_set
from self_model_sop.stage import load_for
from tiny_models import tiny_llama, tiny_qwen

ROOT = Path(__file__).parents[2]
HEALTH = ROOT / "data_process/sample_data/eval/health_mcq.jsonl"
needs_harness = pytest.mark.skipif(not harness.available(), reason="lm-evaluation-harness (the extra `eval`) is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mcq")
    tiny_qwen(folder / "qwen", vocab_size=1200)
    tiny_llama(folder / "llama")
    cmmlu(folder / "cmmlu")
    return folder


@pytest.fixture(scope="module")
def opened(folder: Path) -> Opened:
    return open_model(folder / "qwen")


def outcomes(done: Any, model: str, name: str) -> list[dict[str, Any]]:
    lines = (done.path / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if (row["model"], row["set"]) == (model, name)]


def harness_samples(out: Path, model: Path, tasks: Path, *more: str) -> dict[str, list[dict[str, Any]]]:
    """What the harness's own command says, in a process without our code: task -> samples in order."""
    names = ",".join(sorted(p.stem for p in tasks.glob("*.yaml")))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", "3"]
    command += ["--tasks", names, "--include_path", str(tasks), "--log_samples", "--output_path", str(out), *more]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "cache"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tasks, env=offline, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.rglob("samples_*.jsonl")):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        found[task] = sorted(map(json.loads, path.read_text(encoding="utf-8").splitlines()), key=lambda s: s["doc_id"])
    return found


# --- equal to the harness -----------------------------------------------------------------------------------------------------------------

EXAMS = {
    "letters": Exam(shots=2), "five": Exam(shots=5), "options": Exam(score="options", normalise="bytes", shots=1),
    "written": Exam(mode="generate", max_new_tokens=4), "chat": Exam(chat=True, shots=1), "agieval": Exam(max_questions=60),
}  # fmt: skip


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Exam -> (our outcomes, the samples of the harness's own command on the tasks that we published), in order of the questions."""
    import lm_eval

    work, ours, theirs = tmp_path_factory.mktemp("both"), {}, {}
    plain, chat = work / "plain", work / "chat"
    for name, exam in EXAMS.items():
        if name == "agieval" and not SHARED.is_dir():
            continue
        questions = SHARED if name == "agieval" else folder / "cmmlu"
        done = mcq.run(mcq.Config(models={"tiny": str(folder / "qwen")}, questions={name: questions}, exam=exam, output_dir=work / name))
        ours[name] = outcomes(done, "tiny", name)
        shutil.copytree(done.path / "tasks", chat if exam.chat else plain, dirs_exist_ok=True)
    # not our task at all: the CMMLU template that comes with the harness, its data set replaced by the same CSV files
    template = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/cmmlu/_default_template_yaml").read_text(encoding="utf-8"))
    files = {split: str(folder / "cmmlu" / split / "anatomy.csv") for split in ("test", "dev")}
    template |= {"task": "own_000", "dataset_path": "csv", "dataset_kwargs": {"data_files": files}, "num_fewshot": 5}
    template |= {"description": "以下是关于anatomy的单项选择题，请直接给出正确答案的选项。\n\n"}
    (plain / "own_000.yaml").write_text(yaml.safe_dump(template, allow_unicode=True), encoding="utf-8")
    samples = harness_samples(work / "out", folder / "qwen", plain)
    samples |= harness_samples(work / "out_chat", folder / "qwen", chat, "--apply_chat_template", "--fewshot_as_multiturn", "true")
    for name in [*ours, "own"]:
        theirs[name] = [s for task in sorted(samples) if task.rpartition("_")[0].removeprefix("sop_") == name for s in samples[task]]
    ours["own"] = [o for o in ours["five"] if o["subject"] == "anatomy"]
    return {name: (ours[name], theirs[name]) for name in ours}


@needs_harness
@pytest.mark.parametrize("name", ["letters", "five", "options", "written", "chat"])
def test_the_published_tasks_give_the_same_item_by_item(both: Any, name: str) -> None:
    exam, (ours, theirs) = EXAMS[name], both[name]
    metric = "exact_match" if exam.mode == "generate" else {"none": "acc", "bytes": "acc_bytes"}[exam.normalise]
    assert [o["id"] for o in ours] == [s["doc"]["id"] for s in theirs] and len(ours) == 12
    assert [o["correct"] for o in ours] == [s[metric] == 1.0 for s in theirs]
    if exam.mode == "generate":
        assert [o["said"] for o in ours] == [s["filtered_resps"][0] for s in theirs]
    else:
        assert all(same_scores(o, s) for o, s in zip(ours, theirs, strict=True))


@needs_harness
def test_the_harnesss_own_cmmlu_task_gives_the_same(both: Any) -> None:
    ours, theirs = both["own"]
    assert len(ours) == len(theirs) == 6
    assert all(same_scores(o, s) and o["correct"] == (s["acc"] == 1.0) for o, s in zip(ours, theirs, strict=True))


@needs_harness
@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data beside the project is not here")
def test_agieval_equals_the_harness(both: Any) -> None:
    ours, theirs = both["agieval"]
    samples = {s["doc"]["id"]: s for s in theirs}
    assert len(ours) == len(samples) == 60
    assert all(same_scores(o, samples[o["id"]]) and o["correct"] == (samples[o["id"]]["acc"] == 1.0) for o in ours)


def same_scores(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours["scores"] == pytest.approx([float(pair[0]) for pair in theirs["filtered_resps"]], abs=1e-4)


@needs_harness
def test_log_likelihoods_are_those_of_a_plain_forward_pass(opened: Opened, folder: Path) -> None:
    """A third way: the prompt written out here, one forward pass per letter."""
    questions = read_set(folder / "cmmlu")
    exam = Exam(description="关于{subject}。", ask="选：")
    found = harness.ask(opened, questions, exam, name="x", batch_size=5)
    for q, outcome in list(zip(questions.items, found, strict=True))[::5]:
        prompt = f"关于{q.subject.replace('_', ' ')}。\n\n{q.question}\n" + "".join(f"{x}. {o}\n" for x, o in zip(LETTERS, q.options, strict=False)) + "选："
        start = opened.tokenizer(prompt)["input_ids"]
        for letter, score in zip("ABCD", outcome.scores, strict=True):
            ids = opened.tokenizer(f"{prompt} {letter}")["input_ids"]
            with torch.inference_mode():
                logs = torch.log_softmax(opened.model(torch.tensor([ids])).logits.float(), -1)[0]
            assert score == pytest.approx(sum(float(logs[i - 1, ids[i]]) for i in range(len(start), len(ids))), abs=1e-4)


# --- models whose answers are known ----------------------------------------------------------------------------------------------------------


def says(opened: Opened, choose: Any) -> Opened:
    """A model that continues a prompt with the letter that `choose(prompt text)` gives: its logits are forced, everything else is real."""
    start = len(opened.tokenizer("：")["input_ids"])
    ids = {letter: opened.tokenizer(f"： {letter}")["input_ids"][start:] for letter in "ABCD"}

    class Says(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config, self.device = opened.model, opened.model.config, opened.model.device

        def eval(self) -> Any:
            return self

        def tie_weights(self) -> None:
            return None

        def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
            out = self.inner(input_ids, **more)
            logits = torch.zeros_like(out.logits)
            for row, tokens in enumerate(input_ids.tolist()):
                logits[row, :, ids[choose(opened.tokenizer.decode(tokens))]] = 20.0
            out.logits = logits
            return out

    return Opened(Says(), opened.tokenizer)


@needs_harness
@pytest.mark.parametrize("letter", ["A", "C"])
def test_a_constant_answer_scores_the_share_of_that_letter(opened: Opened, letter: str) -> None:
    questions = read_set(HEALTH)
    found = harness.ask(says(opened, lambda text: letter), questions, Exam(), name="health", batch_size=8)
    share = Counter(q.answer for q in questions.items)[letter]
    assert accuracy.share(found)["right"] == share and {o.said for o in found} == {letter} and accuracy.letters(found) == {letter: len(found)}


@needs_harness
def test_an_oracle_scores_everything(opened: Opened) -> None:
    questions = read_set(HEALTH)
    squeezed = {"".join(q.question.split()): q.answer for q in questions.items}

    def knows(text: str) -> str:
        flat = "".join(text.split())
        return next(answer for question, answer in squeezed.items() if question in flat)

    found = harness.ask(says(opened, knows), questions, Exam(), name="health", batch_size=8)
    assert accuracy.table(found)["accuracy"] == 1.0 == accuracy.table(found)["macro"] and len(found) == 90


# --- the stage ----------------------------------------------------------------------------------------------------------------------------


@needs_harness
def test_two_models_side_by_side_and_only_what_changed_is_asked_again(folder: Path, tmp_path: Path) -> None:
    config = mcq.Config(models={"a": str(folder / "qwen"), "b": str(folder / "llama")}, questions={"health": HEALTH}, exam=Exam(max_questions=20), output_dir=tmp_path)
    done = mcq.run(config)
    part = done.stats["exams"]["b"]["health"]
    assert part["total"] == 20 and part["low"] < part["accuracy"] < part["high"]
    a, b = (outcomes(done, name, "health") for name in "ab")
    assert part["against_first"]["difference"] == pytest.approx((sum(o["correct"] for o in b) - sum(o["correct"] for o in a)) / 20)
    page = (done.path / "results.md").read_text(encoding="utf-8")
    assert "| subject | questions | a | b |" in page and "points (" in page
    assert mcq.run(config).skipped
    more = mcq.STAGE.run(mcq.Config(**{**vars(config), "models": {**config.models, "c": str(folder / "qwen")}}), overwrite=True)
    assert (more.stats["measured"], more.stats["from_cache"]) == (0, 6)  # c is the same model as a


def test_too_few_examples_name_the_subject(folder: Path) -> None:
    questions = read_set(folder / "cmmlu")
    with pytest.raises(SopError, match="health: anatomy has 0 solved examples, 3 are to be shown"):
        harness.check_shots(QuestionSet(questions.items, []), Exam(shots=3), "health")


def test_a_missing_harness_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SopError, match="lm_eval") as caught:
        harness.ask(Opened(None, None), read_set(HEALTH), Exam(), name="x", batch_size=1)
    assert caught.value.code == 4 and "self-model-sop[eval]" in (caught.value.fix or "")


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    for bad in ({"shots": 6}, {"score": "options", "mode": "generate"}, {"normalise": "bytes"}, {"max_questions": 0}):
        with pytest.raises(ValueError, match=r"needs|compares"):
            Exam(**bad)  # type: ignore[arg-type]
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "mcq.yaml").write_text("exam: {shots: 9}\n", encoding="utf-8")
    with pytest.raises(SopError, match="problem") as caught:
        load_for(mcq.STAGE, tmp_path / "config" / "mcq.yaml", [])
    assert "shots <= 5" in str(caught.value)


# --- statistics ---------------------------------------------------------------------------------------------------------------------------


def test_wilson_intervals() -> None:
    """Against the textbook form solved by bisection: the shares p with |right/n - p| = z sqrt(p (1 - p) / n)."""
    for right, total in ((0, 20), (7, 20), (20, 20), (433, 1000)):
        low, high = accuracy.wilson(right, total)
        for p in {low, high} - {0.0, 1.0}:
            assert abs(right / total - p) == pytest.approx(1.959963984540054 * (p * (1 - p) / total) ** 0.5, rel=1e-9)
        assert low <= right / total <= high
    assert accuracy.wilson(0, 20)[0] == 0.0 and accuracy.wilson(20, 20)[1] == 1.0 and accuracy.wilson(0, 0) == (0.0, 1.0)


def test_the_multinomial_bootstrap_is_the_bootstrap_over_pairs() -> None:
    import numpy as np

    def items(flags: list[bool]) -> list[Outcome]:
        return [Outcome(str(i), "", "", "A", "A", f) for i, f in enumerate(flags)]

    rng = np.random.default_rng(1)
    a, b = rng.random(300) < 0.4, rng.random(300) < 0.5
    found = accuracy.difference(items(a.tolist()), items(b.tolist()))
    drawn = rng.integers(0, 300, (10_000, 300))
    direct = np.quantile((b[drawn].mean(1) - a[drawn].mean(1)), [0.025, 0.975])
    assert found["difference"] == pytest.approx(b.mean() - a.mean()) and found["better"] - found["worse"] == int(b.sum()) - int(a.sum())
    assert [found["low"], found["high"]] == pytest.approx(direct.tolist(), abs=0.01)
    assert accuracy.difference(items(a.tolist()), items(a.tolist())) == {"better": 0, "worse": 0, "difference": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.parametrize(("text", "said"), [("B", "B"), (" 答案是C。", "C"), ("A、C", "A、C"), ("Beta is wrong, so D", "D"), ("AC", "AC")])
def test_letters_in_written_answers(text: str, said: str) -> None:
    import re

    assert re.findall(harness._ANSWER, text)[0] == said


def test_rows_of_a_set_are_published_as_tasks(tmp_path: Path) -> None:
    asked = rows(tmp_path / "q.jsonl", [{"question": "{{ 1 }} {% raw %}?", "options": ["a", "b", "c"], "answer": "C", "subject": "数学"}])
    tasks = harness.write_tasks(tmp_path / "tasks", read_set(asked), Exam(), "My Set")
    body = yaml.safe_load((tmp_path / "tasks/sop_my_set_000.yaml").read_text(encoding="utf-8"))
    assert tasks == {"sop_my_set_000": "数学"} and body["dataset_kwargs"]["data_files"] == {"test": "data/sop_my_set_000_test.jsonl"} and "数学" in body["description"]
    doc = json.loads((tmp_path / "tasks/data/sop_my_set_000_test.jsonl").read_text(encoding="utf-8"))
    assert (doc["gold"], doc["letters"]) == (2, ["A", "B", "C"])
