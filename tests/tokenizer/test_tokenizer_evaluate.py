from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.errors import DATA, SopError
from self_model_sop.tokenizer import corpus, evaluate, extend, gates, report
from self_model_sop.tokenizer.base import gather
from self_model_sop.tokenizer.settings import CorpusConfig, EvaluateConfig, SelectionConfig, TokenizerConfig
from tiny_tokenizers import chinese, make, write_corpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    folder = tmp_path_factory.mktemp("evaluate")
    config = TokenizerConfig(
        base_tokenizer=str(make("qwen", folder)), work_dir=folder / "work", extended_tokenizer=folder / "extended",
        corpus=CorpusConfig(inputs=(write_corpus(folder / "final"),)), selection=SelectionConfig(new_tokens=60, min_freq=3),
    )  # fmt: skip
    extend.run(config)
    return config


def with_evaluate(config: TokenizerConfig, **settings: Any) -> TokenizerConfig:
    return TokenizerConfig(**{**vars(config), "evaluate": EvaluateConfig(**settings)})


def read_report(done: Any) -> dict[str, Any]:
    return dict(json.loads((done.path / "report.json").read_text(encoding="utf-8")))


def test_the_held_out_text_by_source(made: TokenizerConfig) -> None:
    done = evaluate.run(made)
    found = read_report(done)
    assert set(found["sources"]) == {"pretrain", "finetune", "reward"}
    old, new = (evaluate.opened(p) for p in (made.work_dir / "baseline/tokenizer", made.extended_tokenizer))
    texts = [t for _, t in evaluate.texts_of(made.evaluate, made.work_dir / "corpus/heldout.jsonl", corpus.Tally())]
    for side, part in ((old, "before"), (new, "after")):
        tokens = sum(map(len, gates.ids(side.tokenizer, texts)))
        assert found["all"][part]["tokens"] == tokens
        assert found["all"][part]["tokens_per_char"] == round(tokens / sum(map(len, texts)), 5)
        assert found["all"][part]["bytes_per_token"] == round(sum(len(t.encode()) for t in texts) / tokens, 5)
    assert done.stats["reduction"] == found["all"]["reduction"] > 0.3
    assert {"tokens_per_char_before", "tokens_per_char_after", "changed_regression_lines"} <= done.stats.keys()
    assert done.stats["speed"] == found["speed"] and found["speed"]["ratio"] > 0
    for name in ("report.md", "report.html"):
        assert f"(x {found['speed']['ratio']})" in (done.path / name).read_text(encoding="utf-8")
    assert found["new_tokens"]["count"] == 60 and found["new_tokens"]["unreachable"] == found["moved"].__len__() == 0
    assert found["curve"][-1]["tokens"] == 60


def test_the_usual_script_is_seen_through(made: TokenizerConfig, tmp_path: Path) -> None:
    """`add_tokens` with what the base already writes as one token, with English, with parts of other added tokens."""
    from transformers import AutoTokenizer

    base = made.work_dir / "baseline/tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    shadow = next(t for t in ("高血", "患者", "医生", "测量", "建议", "感冒", "病毒", "血压") if len(tokenizer(t, add_special_tokens=False)["input_ids"]) == 1)
    tokenizer.add_tokens([shadow + " ", "patient", "糖尿病"])
    tokenizer.save_pretrained(tmp_path / "naive")
    data = json.loads((tmp_path / "naive/tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"]["ĠĠĠqq"] = len(tokenizer)
    (tmp_path / "naive/tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    done = evaluate.run(with_evaluate(made, extended_tokenizer=str(tmp_path / "naive"), output_dir=tmp_path / "out"))
    found = read_report(done)
    assert found["changed_regression_lines"]["english"] + found["changed_regression_lines"]["mixed"] >= 1
    assert found["new_tokens"]["unreachable"] >= 1


def test_shadows_and_unknowns_are_counted(tmp_path: Path) -> None:
    base = make("bert", tmp_path)
    gather(base, tmp_path / "files")
    shutil.copytree(tmp_path / "files", tmp_path / "grown")
    data = json.loads((tmp_path / "grown/tokenizer.json").read_text(encoding="utf-8"))
    first = 1 + max(data["model"]["vocab"].values())
    for n, word in enumerate(["患", "患者"]):
        token = f"{word}" if word not in data["model"]["vocab"] else f"{word}\u200b"
        data["added_tokens"].append({"id": first + n, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False})
    (tmp_path / "grown/tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "text.txt").write_text("患者和医生，龘龘靐\n", encoding="utf-8")
    config = TokenizerConfig(
        base_tokenizer=str(base), work_dir=tmp_path / "work",
        evaluate=EvaluateConfig(baseline_tokenizer=str(tmp_path / "files"), extended_tokenizer=str(tmp_path / "grown"), test_corpus=(tmp_path / "text.txt",)),
    )  # fmt: skip
    found = read_report(evaluate.run(config))
    assert found["new_tokens"]["shadowed"] == 1  # the base drops U+200B and writes the character as one token
    assert found["all"]["before"]["unk_rate"] == round(3 / 9, 5)


def test_the_documented_command_on_any_text(made: TokenizerConfig, tmp_path: Path) -> None:
    (tmp_path / "文本 a.txt").write_text("".join(f"{t}\n" for t in chinese(20, seed=30)), encoding="utf-8")
    (tmp_path / "terms.txt").write_text("高血压\t3\n糖尿病\n冠心病检查结果\n", encoding="utf-8")
    command = [
        sys.executable, str(ROOT / "tokenizer/evaluate/eval_tokenizer.py"), "--baseline_tokenizer", made.base_tokenizer, "--extended_tokenizer", str(made.extended_tokenizer),
        "--test_corpus", str(tmp_path / "文本 a.txt"), "--output_dir", str(tmp_path / "out"), f"evaluate.lexicon={tmp_path / 'terms.txt'}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "tokens/char" in done.stdout and "文本 a" in done.stdout and "lexicon terms that are one token" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.json", "report.md", "report.html", "manifest.json"}


def test_rows_that_cannot_be_compared_are_counted(made: TokenizerConfig, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "高血压患者"}\n{"text": "糖尿病"\n{"text": " "}\n{"text": 5}\n', encoding="utf-8")
    done = evaluate.run(with_evaluate(made, test_corpus=(tmp_path / "rows.jsonl",), output_dir=tmp_path / "out"))
    rows = read_report(done)["rows"]
    assert rows == done.stats["rows"] and rows["total"] == 4 == rows["kept"] + rows["quarantined"] + sum(rows["dropped"].values())
    assert (rows["kept"], rows["quarantined"]) == (1, 1)
    assert "4 / 1 / 1 / " in (done.path / "report.md").read_text(encoding="utf-8")


def test_the_html_page_is_self_contained_and_escapes(made: TokenizerConfig, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("患者<script>alert(1)</script>高血压 & 糖尿病\n", encoding="utf-8")
    done = evaluate.run(with_evaluate(made, test_corpus=(tmp_path / "text.txt",), output_dir=tmp_path / "out"))
    page = (done.path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    assert "<script" not in page and "alert(1)" in shown(page)
    assert 'class="t n"' in page  # new tokens are marked
    bare = evaluate.STAGE.run(with_evaluate(made, test_corpus=(tmp_path / "text.txt",), output_dir=tmp_path / "bare", samples=0))
    assert "alert" not in shown((bare.path / "report.html").read_text(encoding="utf-8"))


def shown(page: str) -> str:
    return re.sub(r"<[^>]*>", "", page)


def test_spans_cover_the_text(made: TokenizerConfig) -> None:
    for path in (made.work_dir / "baseline/tokenizer", made.extended_tokenizer):
        side = evaluate.opened(path)
        for text in [*chinese(10, seed=3), "naïve café 😀 患者", ""]:
            encoding = side.encode([text])[0]
            found = report.spans(encoding, text)
            assert "".join(s.text for s in found) == text
            assert [i for s in found for i in s.ids] == encoding.ids


def test_lexicon_coverage(made: TokenizerConfig) -> None:
    old, new = (evaluate.opened(p) for p in (made.work_dir / "baseline/tokenizer", made.extended_tokenizer))
    found = evaluate.coverage(old, new, ["糖尿病", "冠心病检查结果正常吗", "the"])
    assert found is not None and found["terms"] == 3
    assert found["single_after"] + found["still_split"] == 3
    assert found["tokens_per_term_after"] < found["tokens_per_term_before"]
    assert evaluate.coverage(old, new, []) is None


def test_what_is_missing_is_named_with_the_command(made: TokenizerConfig, tmp_path: Path) -> None:
    config = TokenizerConfig(**{**vars(made), "extended_tokenizer": tmp_path / "none"})
    with pytest.raises(SopError, match="no extended tokenizer here yet") as caught:
        evaluate.run(config)
    assert "sop tokenizer extend" in str(caught.value)
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(SopError, match="no text") as caught:
        evaluate.run(with_evaluate(made, test_corpus=(tmp_path / "empty.txt",), output_dir=tmp_path / "out"))
    assert caught.value.code == DATA
