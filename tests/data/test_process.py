"""data.process from the command line and from Python, on the sample corpus and on small files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from self_model_sop.config import ConfigError
from self_model_sop.data import process
from self_model_sop.data.process import Config, ProcessConfig
from self_model_sop.data.records import read, write_jsonl
from self_model_sop.data.rows import split_text
from self_model_sop.data.split import positions, validation_groups
from self_model_sop.errors import DATA, SopError
from self_model_sop.stage import load_for

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_process" / "sample_data"
SHARED = ROOT.parent / "shared" / "data"
TOPICS = ("高血压", "糖尿病", "骨质疏松", "慢性肾病", "偏头痛", "过敏性鼻炎", "胃食管反流", "睡眠呼吸暂停")


def documents(n: int, start: int = 0) -> list[dict[str, Any]]:
    """Texts that resemble each other too little to be near-duplicates."""
    return [{"id": i, "text": "，".join(f"{TOPICS[(i * 7 + j * 3) % 8]}{(i * 7919 + j * 104729) % 99991}例" for j in range(12)) + "。"} for i in range(start, start + n)]


def rows(path: Path) -> list[dict[str, Any]]:
    return [r.row for r in read(path) if r.row is not None] if path.exists() else []


def kept(folder: Path) -> list[dict[str, Any]]:
    return rows(folder / "train.jsonl") + rows(folder / "validation.jsonl")


def check_law(stats: dict[str, Any]) -> None:
    for s in stats["sets"].values():
        assert s["total"] + s["added_by_split"] == s["kept"] + sum(s["dropped"].values()) + sum(s["quarantined"].values())
        assert s["kept"] == s["train"] + s["validation"]


def run_on(
    tmp_path: Path, content: Iterable[dict[str, Any]] | str | bytes, *, name: str = "in.jsonl", out: str = "out", config: dict[str, Any] | None = None, **options: Any
) -> Any:
    path = tmp_path / name
    if isinstance(content, (str, bytes)):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    else:
        write_jsonl(path, content)
    return process.run(Config(input=path, output_dir=tmp_path / out, process=ProcessConfig(**options), **(config or {})))


def test_the_sample_corpus_loses_exactly_what_was_planted(tmp_path: Path) -> None:
    done = process.run(Config(input=SAMPLE, output_dir=tmp_path))
    planted = json.loads((SAMPLE / "planted.json").read_text(encoding="utf-8"))
    reason_of = {
        "exact_duplicate": "duplicates",
        "near_duplicate": "near_duplicates",
        "too_short": "too_short",
        "empty_answer": "empty_turn",
        "ends_with_user": "ends_with_human",
        "chosen_equals_rejected": "chosen_equals_rejected",
    }
    expected = {(Path(p["file"]).name, p["line"]): (reason_of[p["kind"]], Path(p.get("of", "")).name) for p in planted if p["kind"] in reason_of}
    found = {}
    for dropped in tmp_path.glob("*/dropped.jsonl"):
        for row in rows(dropped):
            name, _, line = row["_source"].partition(":")
            found[name, int(line)] = (row["reason"], row.get("of", ""))
    assert found == expected
    stats = done.stats
    check_law(stats)
    assert [f"{n}:{s['kept']}" for n, s in stats["sets"].items()] == ["pretrain:242", "finetune:434", "reward:110"]
    assert stats["sets"]["pretrain"]["quarantined"] == {"bad_json": 1}
    assert stats["pii"] == {"landline": 1, "mobile": 4, "resident_id": 4}
    assert {f["name"]: f["encoding"] for f in stats["files"]}["health_notes_gb18030.txt"] == "gb18030"
    assert [x.split()[0] for x in stats["left_alone"]] == ["eval", "planted.json"]
    text = "".join(p.read_text(encoding="utf-8") for p in tmp_path.glob("*/*.jsonl"))
    assert "[手机号]" in text and "13800000001" not in text and "<br" not in text and "&nbsp;" not in text and "https://" not in text


def test_the_documented_command(tmp_path: Path) -> None:
    """Verbatim but for the folders, through the door, with the table it prints."""
    raw = tmp_path / "shibing624_medical__train.jsonl"
    texts = [*documents(60), documents(1)[0], {"text": "短"}, {"text": documents(2)[1]["text"][:-3] + "例啊。"}]
    write_jsonl(raw, texts)
    command = [sys.executable, str(ROOT / "data_process" / "process_data.py"), "--input", str(raw), "--output_dir", str(tmp_path / "final"), "--subdir", "pretrain"]
    done = subprocess.run([*command, "--dedup", "--near_dedup", "--to_parquet"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    table = {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in done.stdout.splitlines() if line.strip() and line.split()[-1].isdigit()}
    assert {k: table[k] for k in ("total", "kept", "duplicates", "near_duplicates", "too_short", "too_long")} == {
        "total": "63", "kept": "60", "duplicates": "1", "near_duplicates": "1", "too_short": "1", "too_long": "0",
    }  # fmt: skip
    assert "text, utf-8, 63 rows" in done.stdout
    folder = tmp_path / "final" / "pretrain"
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
        "clusters.jsonl",
        "dropped.jsonl",
        "manifest.json",
        "train.jsonl",
        "train.parquet",
        "validation.jsonl",
        "validation.parquet",
    ]
    assert [r["_source"] for r in kept(folder)] == [r["_source"] for r in rows(folder / "train.parquet") + rows(folder / "validation.parquet")]
    again = subprocess.run([*command, "--dedup", "--near_dedup", "--to_parquet"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "up to date" in again.stdout


def test_rows_keep_their_structure_and_every_field(tmp_path: Path) -> None:
    other = {"id": 7, "tools": "[]", "meta": {"a": ["<b>"]}}
    answer = {"from": "gpt", "value": "收缩压<140mmHg即可。", "rating": 5}
    run_on(tmp_path, [{**other, "conversations": [{"from": "human", "value": "<p>血压　１４０，怎么办？</p>"}, answer]}], validation_ratio=0.0)
    expected = {**other, "conversations": [{"from": "human", "value": "血压 140，怎么办？"}, answer], "_source": "in.jsonl:1"}
    assert rows(tmp_path / "out" / "finetune" / "train.jsonl") == [expected]


def test_sets_by_format_without_flags(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", documents(5))
    write_jsonl(folder / "b.jsonl", [{"instruction": f"问题{i}是什么？", "output": f"回答{i}。"} for i in range(5)])
    write_jsonl(folder / "c.jsonl", [{"question": f"问题{i}", "response_chosen": "对的", "response_rejected": "错的"} for i in range(5)])
    write_jsonl(folder / "d.jsonl", [{"question": "q", "options": ["一", "二"], "label": "A"}])
    done = process.run(Config(input=(folder,), output_dir=tmp_path / "out"))
    assert {n: s["total"] for n, s in done.stats["sets"].items()} == {"pretrain": 5, "finetune": 5, "reward": 5}
    assert done.stats["left_alone"] == ["d.jsonl (multiple choice: evaluation data)"]
    assert {"question", "response_chosen", "response_rejected", "_source"} == set(kept(tmp_path / "out" / "reward")[0])


def test_subdir_takes_its_subfolder(tmp_path: Path) -> None:
    for name in ("pretrain", "finetune"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        write_jsonl(tmp_path / "raw" / name / "x.jsonl", documents(3))
    done = process.run(Config(input=(tmp_path / "raw",), output_dir=tmp_path / "out", subdir="pretrain"))
    assert list(done.stats["sets"]) == ["pretrain"]
    assert (tmp_path / "out" / "pretrain" / "manifest.json").exists()


def test_output_is_one_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [*documents(20), {"text": "短"}])
    process.run(Config(input=tmp_path / "in.jsonl", output=tmp_path / "clean.jsonl"))
    assert len(rows(tmp_path / "clean.jsonl")) == 20
    assert {p.name for p in tmp_path.glob("clean*")} == {"clean.jsonl", "clean.dropped.jsonl", "clean.manifest.json"}


def test_columns_and_text_fields(tmp_path: Path) -> None:
    run_on(tmp_path, [{"q": "发热怎么办", "a": "多喝水，注意休息"}], config={"columns": {"q": "question", "a": "answer"}})
    assert kept(tmp_path / "out" / "finetune") == [{"question": "发热怎么办", "answer": "多喝水，注意休息", "_source": "in.jsonl:1"}]
    run_on(tmp_path, [{"head": "高血压的诊断", "main": "非同日三次测量血压。"}], out="two", config={"text_fields": ("head", "main")})
    assert kept(tmp_path / "two" / "pretrain")[0]["text"] == "高血压的诊断\n非同日三次测量血压。"


def test_unknown_format_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SopError, match="no known format: the rows have foo, bar") as error:
        run_on(tmp_path, [{"foo": "x", "bar": "y"}])
    assert error.value.code == DATA and "columns" in str(error.value)


def test_duplicates_are_folded_and_the_first_stays(tmp_path: Path) -> None:
    base = "头发与发现：ABC 123，患者情况稳定。"
    variants = [base, "頭髮與發現：ＡＢＣ 123，患者情況穩定。", "头发与发现：abc  123，患者\n情况稳定。", "头发与发现：ABC 124，患者情况稳定。"]
    done = run_on(tmp_path, [{"text": t} for t in variants], near_dedup=False)
    assert done.stats["sets"]["pretrain"]["dropped"] == {"duplicates": 2}
    assert [(r["_source"], r["of"]) for r in rows(tmp_path / "out" / "pretrain" / "dropped.jsonl")] == [("in.jsonl:2", "in.jsonl:1"), ("in.jsonl:3", "in.jsonl:1")]
    assert {r["text"] for r in kept(tmp_path / "out" / "pretrain")} == {base, variants[3]}


def test_clusters_name_the_kept_row_and_all_that_went_for_it(tmp_path: Path) -> None:
    first, other = (d["text"] for d in documents(2))
    near = first[:-1] + "了。"
    run_on(tmp_path, [{"text": t} for t in (first, near, other, first + " ", near, other)])
    assert rows(tmp_path / "out" / "pretrain" / "clusters.jsonl") == [
        {"_source": "in.jsonl:1", "duplicates": ["in.jsonl:4", "in.jsonl:5"], "near_duplicates": ["in.jsonl:2"]},
        {"_source": "in.jsonl:3", "duplicates": ["in.jsonl:6"]},
    ]
    assert [(r["_source"], r["reason"], r["of"]) for r in rows(tmp_path / "out" / "pretrain" / "dropped.jsonl")] == [
        ("in.jsonl:2", "near_duplicates", "in.jsonl:1"),
        ("in.jsonl:4", "duplicates", "in.jsonl:1"),
        ("in.jsonl:5", "duplicates", "in.jsonl:2"),
        ("in.jsonl:6", "duplicates", "in.jsonl:3"),
    ]


def test_different_tool_calls_are_no_duplicates(tmp_path: Path) -> None:
    def row(city: str) -> dict[str, Any]:
        call = json.dumps({"name": "weather", "arguments": {"city": city}})
        return {
            "conversations": [
                {"from": "human", "value": "天气如何？"},
                {"from": "function_call", "value": call},
                {"from": "observation", "value": "{}"},
                {"from": "gpt", "value": "晴。"},
            ]
        }

    done = run_on(tmp_path, [row("北京"), row("上海"), row("北京")], near_dedup=False)
    assert done.stats["sets"]["finetune"]["dropped"] == {"duplicates": 1}


def test_dedup_can_be_off(tmp_path: Path) -> None:
    done = run_on(tmp_path, documents(1) * 10, dedup=False, near_dedup=False)
    assert done.stats["sets"]["pretrain"]["kept"] == 10
    assert done.stats["sets"]["pretrain"]["validation"] in (0, 10)  # equal texts never straddle


def test_long_documents_are_split_not_lost(tmp_path: Path) -> None:
    paragraphs = [f"第{i}段：" + documents(1, i)[0]["text"] for i in range(30)]
    text = "\n\n".join(paragraphs)
    done = run_on(tmp_path, [{"title": "书", "text": text}], max_chars=500, validation_ratio=0.0)
    found = kept(tmp_path / "out" / "pretrain")
    assert "\n\n".join(r["text"] for r in found) == text
    assert [r["_source"] for r in found][:3] == ["in.jsonl:1", "in.jsonl:1#1", "in.jsonl:1#2"]
    assert all(len(r["text"]) <= 500 and r["title"] == "书" for r in found)
    check_law(done.stats)
    assert run_on(tmp_path, [{"text": text}], out="b", max_chars=500, split_long=False).stats["sets"]["pretrain"]["dropped"] == {"too_long": 1}


def test_pieces_cut_at_the_largest_border() -> None:
    assert split_text("一二三。四五六。七", 6, 1) == ["一二三。", "四五六。七"]
    assert split_text("甲" * 250, 100, 10) == ["甲" * 100, "甲" * 100, "甲" * 50]
    assert "".join(split_text("甲。" * 500, 100, 10)) == "甲。" * 500


def test_validation_is_stable_when_data_grows(tmp_path: Path) -> None:
    run_on(tmp_path, documents(400), out="a", validation_ratio=0.1)
    run_on(tmp_path, documents(600, start=-200), out="b", validation_ratio=0.1)
    before, after = ({r["text"] for r in rows(tmp_path / x / "pretrain" / "validation.jsonl")} for x in "ab")
    both = {r["text"] for r in documents(400)}
    assert before and before == after & both
    assert 20 < len(before) < 70


def test_small_sets_get_validation_rows_too() -> None:
    where = positions(np.arange(40, dtype=np.uint64).reshape(20, 2))
    assert len(set(where.tolist())) == 20
    assert validation_groups(where, 0.001, 8).sum() == 4
    assert validation_groups(where[:2], 0.001, 8).sum() == 1
    assert validation_groups(where[:1], 0.5, 8).sum() == 0
    assert validation_groups(where, 0.0, 8).sum() == 0
    assert (validation_groups(where, 0.5, 1) <= (where < 2**63)).all()


def test_near_duplicates_never_straddle(tmp_path: Path) -> None:
    pairs = [{"text": d["text"][:-1] + end} for d in documents(200) for end in ("。", "！")]
    run_on(tmp_path, pairs, near_dedup=False, validation_ratio=0.2)
    held = {r["text"][:-1] for r in rows(tmp_path / "out" / "pretrain" / "validation.jsonl")}
    train = {r["text"][:-1] for r in rows(tmp_path / "out" / "pretrain" / "train.jsonl")}
    assert held and not held & train


def test_personal_data_can_drop_a_row_or_stay(tmp_path: Path) -> None:
    content = [{"text": "预约电话13800000001，请提前一天。"}, {"text": "没有电话的一段普通文字。"}]
    assert run_on(tmp_path, content, out="a", pii="drop").stats["sets"]["pretrain"]["dropped"] == {"personal_data": 1}
    assert "13800000001" not in (tmp_path / "a" / "pretrain" / "dropped.jsonl").read_text(encoding="utf-8")
    run_on(tmp_path, content, out="b", pii="keep")
    assert "13800000001" in json.dumps(kept(tmp_path / "b" / "pretrain"))


def test_decontamination(tmp_path: Path) -> None:
    pytest.importorskip("self_model_sop.data.decontaminate")
    content = documents(10)
    (tmp_path / "eval.txt").write_text(content[3]["text"][20:60] + "\n", encoding="utf-8")
    done = run_on(tmp_path, content, decontaminate=(tmp_path / "eval.txt",))
    assert done.stats["sets"]["pretrain"]["dropped"] == {"contaminated": 1}
    assert [r["_source"] for r in rows(tmp_path / "out" / "pretrain" / "dropped.jsonl")] == ["in.jsonl:4"]


def test_preflight_reports_every_problem_at_once(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("", encoding="utf-8")
    bad = tmp_path / "process.yaml"
    bad.write_text(
        f"input: [{tmp_path / 'in.jsonl'}]\nsubdir: ../x\nworkers: 0\nprocess: {{jaccard_threshold: 1.5, validation_ratio: 0.9, pii_rules: [phone], max_chars: 5}}\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as error:
        load_for(process.STAGE, bad, [])
    said = str(error.value)
    assert all(key in said for key in ("subdir", "workers", "jaccard_threshold", "validation_ratio", "'phone'", "max_chars"))


def test_output_inside_input_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", documents(2))
    problems = process.preflight(Config(input=(tmp_path,), output_dir=tmp_path / "out"))
    assert [p[0] for p in problems] == ["output_dir"]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")
def test_real_dialogues(tmp_path: Path) -> None:
    """7 rows end with the human; a turn of nothing (or of zero-width spaces) is an empty turn; multi-turn rows stay whole."""
    done = process.run(Config(input=SHARED / "dialogue" / "sharegpt_zh_1k.jsonl", output_dir=tmp_path, process=ProcessConfig(validation_ratio=0.0)))
    assert done.stats["sets"]["finetune"]["dropped"] == {"empty_turn": 5, "ends_with_human": 7}
    raw = [r.row for r in read(SHARED / "dialogue" / "sharegpt_zh_1k.jsonl") if r.row is not None]
    for row in kept(tmp_path / "finetune"):
        line = int(row["_source"].split(":")[1])
        assert [t["from"] for t in row["conversations"]] == [t["from"] for t in raw[line - 1]["conversations"]]
