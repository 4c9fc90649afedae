"""Forgetting guard, contamination, intervals and references: what stands beside the scores of eval.compare."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exam_sets import rows as write
from self_model_sop.artifact import read_manifest
from self_model_sop.config import ConfigError
from self_model_sop.errors import SopError
from self_model_sop.eval import compare
from self_model_sop.eval.contamination import contaminated
from self_model_sop.eval.generate import Answer, overlap, refused
from self_model_sop.eval.generate import measure as count
from self_model_sop.eval.guard import Guard, judge
from self_model_sop.eval.questions import Question
from self_model_sop.eval.sets import Prompt, prompts
from self_model_sop.eval.table import in_order
from self_model_sop.eval.uncertainty import bits_interval, change_interval
from self_model_sop.ops.pipeline import load_pipeline
from self_model_sop.stage import load_for
from tiny_models import sentences, tiny_llama, tiny_qwen

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    tiny_qwen(folder / "z_first")
    tiny_llama(folder / "a_last")
    texts = list(sentences())
    write(folder / "text.jsonl", [{"text": t} for t in texts[:6]])
    write(folder / "train.jsonl", [{"text": "前面的话。" + texts[2]}, {"text": "没有关系的另外一段训练文本，讲的是别的事情。"}])
    return folder


def config_of(folder: Path, out: Path, **changes: Any) -> compare.Config:
    models = {"z_first": str(folder / "z_first"), "a_last": str(folder / "a_last")}
    return compare.Config(**{"models": models, "texts": {"general": folder / "text.jsonl"}, "window": 128, "output_dir": out, **changes})


# --- the guard ------------------------------------------------------------------------------------------------------------------------------


def results(change: float) -> dict[str, Any]:
    against = {"change": change, "low": change - 0.01, "high": change + 0.01}
    exam = {"against_first": {"difference": -change, "low": -change - 0.1, "high": -change + 0.1}}
    return {"models": {"a": {}, "b": {}}, "bits": {"a": {"text": {}}, "b": {"text": {"against_first": against}}}, "exams": {"a": {"quiz": {}}, "b": {"quiz": exam}}}


@pytest.mark.parametrize(("change", "broken"), [(0.049, False), (0.051, True), (-0.2, False)])
def test_the_limit_is_the_change_itself(change: float, broken: bool) -> None:
    found = judge(results(change), Guard(general=("text", "quiz"), max_loss=0.05, max_drop=0.05))
    assert [(e["set"], e["broken"]) for e in found] == [("text", broken), ("quiz", broken)]


def test_too_much_forgetting_stops_with_3_and_keeps_the_figures(folder: Path, tmp_path: Path) -> None:
    """The last model is another random one: it must be worse or better; the guard is set to forbid exactly what it did."""
    config = config_of(folder, tmp_path / "out")
    free = compare.run(config)
    change = free.stats["bits"]["a_last"]["general"]["against_first"]["change"]
    if change <= 0:
        config = replace(config, models=dict(reversed(config.models.items())))
    strict = replace(config, guard=Guard(general=("general",), max_loss=abs(change) / 4))
    for _ in range(2):  # also where it is up to date
        with pytest.raises(SopError, match="lost too much on general") as caught:
            compare.STAGE.run(strict, overwrite=True)
        assert caught.value.code == 3 and "max_loss" in (caught.value.fix or "")
    manifest = read_manifest(tmp_path / "out" / "manifest.json")
    assert manifest and manifest["stats"]["guard"][0]["broken"] and manifest["stats"]["measured"] == 0
    done = compare.STAGE.run(replace(strict, guard=replace(strict.guard, stop=False)), overwrite=True)
    assert done.stats["guard"][0]["broken"] and "LOST" in (done.path / "results.md").read_text(encoding="utf-8")
    assert not compare.STAGE.run(replace(strict, guard=replace(strict.guard, max_loss=9.0)), overwrite=True).stats["guard"][0]["broken"]


def test_a_manifest_keeps_the_order_of_the_models(folder: Path, tmp_path: Path) -> None:
    compare.run(config_of(folder, tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out" / "manifest.json")
    assert manifest and list(manifest["stats"]["models"]) == ["a_last", "z_first"] and list(in_order(manifest["stats"])["bits"]) == ["z_first", "a_last"]
    assert compare.STAGE.summary(compare.run(config_of(folder, tmp_path / "out")))[1].startswith("z_first")


def test_a_guarded_set_must_exist(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    text = f"models: {{a: {folder / 'z_first'}}}\ntexts: {{general: {folder / 'text.jsonl'}}}\nguard: {{general: [genral]}}\n"
    (tmp_path / "config" / "compare.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="problem") as caught:
        load_for(compare.STAGE, tmp_path / "config" / "compare.yaml", [])
    assert "genral" in str(caught.value) and "known: general" in str(caught.value)


def test_a_pipeline_with_a_guard_measures_each_model_before_the_next_stage() -> None:
    path = ROOT / "config/pipeline/quickstart.yaml"
    plain, guarded = ([s.id for s in load_pipeline(path, more).steps] for more in ([], ["evaluation.guard.stop=true"]))
    assert [i for i in guarded if not i.startswith("check_")] == plain
    assert {guarded[guarded.index(f"check_{name}") - 1] for name in ("resize", "pretrain", "merge")} == {"resize", "pretrain", "merge"}
    check = next(s.config for s in load_pipeline(path, ["evaluation.guard.stop=true"]).steps if s.id == "check_pretrain")
    assert list(check.models) == ["model", "pretrain"] and not check.prompts and check.cache_dir.parts[-2:] == ("compare", ".cache")


# --- contamination --------------------------------------------------------------------------------------------------------------------------


def test_items_in_the_training_data_are_counted_and_scores_without_them_shown(folder: Path, tmp_path: Path) -> None:
    done = compare.run(config_of(folder, tmp_path / "out", training=(folder / "train.jsonl",)))
    part = done.stats["contamination"]["general"]
    by_hand = contaminated([r["text"] for r in map(json.loads, (folder / "text.jsonl").read_text(encoding="utf-8").splitlines())], [folder / "train.jsonl"])
    assert part["positions"] == by_hand and 2 in by_hand and part["share"] == len(by_hand) / 6
    if len(by_hand) < 6:
        assert done.stats["bits"]["a_last"]["general"]["clean_bits_per_byte"] > 0


def test_every_contaminated_item_is_found_also_several_in_one_text(tmp_path: Path) -> None:
    a, b, c = "甲乙丙丁戊己庚辛壬癸子丑寅卯辰", "春夏秋冬东西南北上下左右前后中", "红橙黄绿青蓝紫黑白灰粉棕金银铜"
    training = write(tmp_path / "train.jsonl", [{"text": f"{a}，又说{b}。"}, {"text": b}])
    assert contaminated([a, b, c], [training]) == [0, 1]
    question = Question("q", "", "", "春夏秋冬东西南北上下左右前后中的下一个是什么", ("铜", "红橙黄绿青蓝紫黑白灰粉棕金银"), "B")
    assert contaminated([question], [training]) == [], "the question alone is no contamination"
    assert contaminated([question], [write(tmp_path / "more.jsonl", [{"text": f"{b}的下一个是{c}"}])]) == [0]


def test_of_a_split_folder_only_what_is_trained_on_counts(tmp_path: Path) -> None:
    text = "春夏秋冬东西南北上下左右前后中"
    write(tmp_path / "validation.jsonl", [{"text": text}])
    write(tmp_path / "train.jsonl", [{"text": "别的"}])
    assert contaminated([text], [tmp_path]) == []


# --- intervals ------------------------------------------------------------------------------------------------------------------------------


def test_bootstrap_intervals_cover_what_they_should() -> None:
    """Two hundred data sets from a known ratio: the 95 % interval holds it about 95 times of a hundred."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        sizes = rng.integers(50, 150, 80)
        nats = sizes * rng.normal(2.0, 0.5, 80)
        low, high = bits_interval(nats.tolist(), sizes.tolist(), seed=seed) or (0.0, 0.0)
        hits += low <= 2.0 / np.log(2) <= high
    assert 180 <= hits <= 198


def test_a_paired_change_is_surer_than_its_parts() -> None:
    rng = np.random.default_rng(0)
    first = rng.lognormal(3, 1, 50)
    second = first * rng.normal(0.95, 0.01, 50)
    low, high = change_interval(first.tolist(), second.tolist()) or (0.0, 0.0)
    assert low < second.sum() / first.sum() - 1 < high < -0.04 and high - low < 0.02
    assert change_interval([1.0], [2.0]) is None and bits_interval([1.0], [1]) is None


# --- answers --------------------------------------------------------------------------------------------------------------------------------


def test_refusals_in_both_languages() -> None:
    declined = ("抱歉，我无法回答这个问题。", "很遗憾，这个我不能帮你。", "作为一个人工智能语言模型，我没有个人意见。")
    assert all(map(refused, (*declined, "I'm sorry, but I can't help with that.", "As an AI language model, I cannot say.")))
    answered = ("感冒时要多喝水。", "I can help with that.", "对不起打扰了，血压要每天量。", "病毒无法用抗生素治疗。")
    assert not any(map(refused, answered))


def test_overlap_is_rouge_l_on_characters() -> None:
    def slow(a: str, b: str) -> int:
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        return int(table[-1, -1])

    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = ("".join(rng.choice(list("多喝水休息"), rng.integers(1, 40))) for _ in range(2))
        assert overlap(a, b) == pytest.approx(2 * slow(a, b) / (len(a) + len(b)))
    assert overlap("多喝水", "多 喝 水") == 1.0 and overlap("甲", "乙") == 0.0 == overlap("", "乙")


def test_references_come_from_the_prompts_file(folder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "感冒怎么办", "output": "多喝水"}, {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "你好"}]}]
    path = write(tmp_path / "prompts.jsonl", rows)
    assert prompts(["一"], path) == [Prompt("一"), Prompt("感冒怎么办", "多喝水"), Prompt("你好")]
    assert count([Answer("多喝水", 1, True), Answer("抱歉，我不能回答。", 1, True)], ["多喝水", None]) | {} == {
        **count([Answer("多喝水", 1, True), Answer("抱歉，我不能回答。", 1, True)]), "overlap": 1.0,
    }  # fmt: skip
    assert count([Answer("抱歉，我不能回答。", 1, True)])["refused"] == 1.0


def test_measurements_can_be_shared_between_stages(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    first = compare.run(config_of(folder, tmp_path / "one", cache_dir=tmp_path / "cache"))
    second = compare.run(config_of(folder, tmp_path / "two", cache_dir=tmp_path / "cache"))
    assert first.stats["from_cache"] == 0 and second.stats["measured"] == 0 and second.stats["bits"] == first.stats["bits"]
