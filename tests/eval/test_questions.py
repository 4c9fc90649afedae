from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from exam_sets import SHARED, cmmlu, rows, write
from self_model_sop.errors import SopError
from self_model_sop.eval.questions import read_set

ROOT = Path(__file__).parents[2]


def test_cmmlu(tmp_path: Path) -> None:
    found = read_set(cmmlu(tmp_path))
    assert len(found.items) == 12 and found.subjects == ["anatomy", "world_history"] and not found.left_out
    q = found.items[1]
    assert (q.question, q.options, q.answer) == ("anatomy，第1题？", ("一", "2", "三,3", "四"), "B")
    assert [e.answer for e in found.examples_of("world_history")] == list("DCBAD") and found.examples_of("world_history")[0].question == "world_history 例题0"
    assert len({q.id for q in found.items}) == 12


def test_ceval_asks_val_and_names_subjects(tmp_path: Path) -> None:
    """Its test split has no answers; the mapping names and groups subjects."""
    head = "id,question,A,B,C,D,answer\n"
    write(tmp_path / "test" / "law_test.csv", "id,question,A,B,C,D\n0,没有答案,1,2,3,4\n")
    write(tmp_path / "val" / "law_val.csv", head + "0,问一,1,2,3,4,C\n1,问二,1,2,3,4,A\n")
    write(tmp_path / "dev" / "law_dev.csv", head.replace("answer", "answer,explanation") + "0,例一,1,2,3,4,D,因为\n")
    write(tmp_path / "subject_mapping.json", json.dumps({"law": ["Law", "法学", "Social Science"]}, ensure_ascii=False))
    found = read_set(tmp_path)
    assert [(q.question, q.answer, q.subject, q.category) for q in found.items] == [("问一", "C", "法学", "Social Science"), ("问二", "A", "法学", "Social Science")]
    assert [e.question for e in found.examples] == ["例一"] and found.left_out == {"no_answer": 1}


def test_gaokao_options_inside_the_question(tmp_path: Path) -> None:
    example = [
        {"year": "2010", "question": "1．（4分）下列说法正确的是（　　）\nA．细胞都有核\nB．B 细胞产生抗体\nC．病毒是细胞\nD．以上都对", "answer": ["B"], "index": 0},
        {"question": "阅读材料，回答三题。A．一 B．二 C．三 D．四", "answer": ["A", "B", "C"]},
        {"question": "没有选项", "answer": ["A"]},
        {"question": "多选 A. 甲 B. 乙 C. 丙 D. 丁", "answer": ["AC"]},
    ]
    write(tmp_path / "2010-2013_Biology_MCQs.json", json.dumps({"keywords": "Biology", "example": example}, ensure_ascii=False))
    found = read_set(tmp_path)
    assert len(found.items) == 1 and found.items[0].options == ("细胞都有核", "B 细胞产生抗体", "病毒是细胞", "以上都对") and found.items[0].answer == "B"
    assert found.items[0].question.endswith("（　　）")
    assert found.left_out == {"several_questions": 1, "no_options": 1, "several_answers": 1}
    assert [q.answer for q in read_set(tmp_path, several=True).items] == ["B", "AC"]


def test_any_rows_with_a_question_options_and_an_answer(tmp_path: Path) -> None:
    lines = [
        {"question": "一", "options": ["(A)甲", "(B)乙", "(C)丙"], "label": "C", "subject": "史"},
        {"question": "二", "choices": {"text": ["是", "否"], "label": ["A", "B"]}, "answer": 1},
        {"question": "三", "A": "1", "B": "2", "C": "", "D": "", "answer": "B"},
        {"question": "四", "options": ["甲", ""], "answer": "A"},
        {"question": "五", "options": ["甲", "乙"]},
    ]
    found = read_set(rows(tmp_path / "quiz.jsonl", lines))
    assert [(q.question, q.options, q.answer, q.subject) for q in found.items] == [
        ("一", ("甲", "乙", "丙"), "C", "史"), ("二", ("是", "否"), "B", "quiz"), ("三", ("1", "2"), "B", "quiz"),
    ]  # fmt: skip
    assert found.left_out == {"empty_option": 1, "no_answer": 1}


def test_examples_from_another_file_and_a_limit(tmp_path: Path) -> None:
    asked = rows(tmp_path / "quiz.jsonl", [{"question": str(i), "options": ["a", "b"], "answer": "A"} for i in range(10)])
    solved = rows(tmp_path / "solved.jsonl", [{"question": "例", "options": ["a", "b"], "answer": "B"}])
    found = read_set(asked, limit=4, examples=solved)
    assert [q.question for q in found.items] == ["0", "2", "5", "7"] and [q.question for q in found.examples_of("quiz")] == ["例"]


def test_nothing_to_ask_says_why(tmp_path: Path) -> None:
    with pytest.raises(SopError, match="no question") as caught:
        read_set(rows(tmp_path / "text.jsonl", [{"text": "x"}]))
    assert caught.value.code == 3 and "no_question" in (caught.value.fix or "")


def test_the_projects_own_questions() -> None:
    found = read_set(ROOT / "data_process/sample_data/eval/health_mcq.jsonl")
    assert len(found.items) == 90 and not found.left_out and len(found.subjects) > 5


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data beside the project is not here")
def test_agieval_every_row_is_asked_or_counted() -> None:
    lines = sum(sum(1 for _ in f.open(encoding="utf-8")) for f in SHARED.glob("*.jsonl"))
    found = read_set(SHARED)
    assert len(found.items) + sum(found.left_out.values()) == lines and len(found.subjects) == 7
    assert set(Counter(q.answer for q in found.items)) == set("ABCD")
    assert not [q for q in found.items if q.options[0].startswith(("(A)", "（A）", "A."))]
