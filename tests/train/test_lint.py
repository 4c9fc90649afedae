"""The lint proves the mask from the decoded tokens, counts every row, refuses an empty mask, and shows samples."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chat_tokenizers import QWEN, TEMPLATES, for_family, tiny
from self_model_sop.errors import DATA, USAGE, SopError
from self_model_sop.train import lint, lint_view, proof
from self_model_sop.train.proof import check
from self_model_sop.train.template import Rendered, Renderer, renderer_for

PAIR = {"conversations": [{"from": "human", "value": "头疼怎么办?"}, {"from": "gpt", "value": "多喝水,注意休息。"}]}
ALPACA = {"instruction": "翻译", "input": "rest", "output": "休息"}
NO_ANSWER = {"messages": [{"role": "user", "content": "在吗"}]}
UNKNOWN_ROLE = {"conversations": [{"from": "robot", "value": "x"}]}
UNTRAINED = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]}


def renderer(**options: Any) -> Renderer:
    return renderer_for(for_family("qwen2_chatml"), TEMPLATES / "qwen2_chatml.json", **options)


def test_every_row_is_counted_once_with_its_reason() -> None:
    long = {"messages": [{"role": "user", "content": "问" * 400}, {"role": "assistant", "content": "答"}]}
    cut = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "答" * 400}]}
    report = check(renderer(), [PAIR, ALPACA, NO_ANSWER, UNKNOWN_ROLE, UNTRAINED, long, cut, None], max_length=200)
    assert report.total == 8 == report.kept + sum(report.dropped.values())
    assert report.dropped == {"nothing_to_learn": 2, "unknown_role": 1, "nothing_to_learn_before_the_cut": 1, "unreadable": 1}
    assert report.all_masked == 3 and report.truncated == 1 and report.unproven == []
    assert 0 < report.learned < report.tokens <= 3 * 200
    assert check(renderer(), [cut], max_length=200, overlong="drop").dropped == {"too_long": 1}


@pytest.mark.parametrize("rows", [[], [NO_ANSWER], [UNTRAINED, UNKNOWN_ROLE]])
def test_a_dataset_without_anything_to_learn_is_refused(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(SopError, match="no token would be learned") as error:
        check(renderer(), rows).require()
    assert error.value.code == DATA


class Wrong(Renderer):
    """A renderer with a fault in its mask."""

    fault = "later"

    def render(self, messages: Sequence[Any], *, tools: Sequence[Any] | None = None) -> Rendered:
        found = super().render(messages, tools=tools)
        mask = list(found.supervised)
        start, end = mask.index(True), len(mask) - mask[::-1].index(True)
        if self.fault == "later":
            mask[start] = False
        elif self.fault == "earlier":
            mask[start - 1] = True
        elif self.fault == "no end":
            mask[end - 1] = False
        elif self.fault == "after the end":
            mask[end] = True
        elif self.fault == "question":
            mask[3] = True
        elif self.fault == "nothing of a turn":
            second = mask.index(True, mask.index(False, start))
            mask[second:end] = [False] * (end - second)
        return dataclasses.replace(found, supervised=mask)


@pytest.mark.parametrize("fault", ["later", "earlier", "no end", "after the end", "question", "nothing of a turn"])
def test_one_token_too_many_or_too_few_is_found(fault: str) -> None:
    right = renderer()
    wrong = Wrong(right.tokenizer, right.template, name="wrong")
    wrong.fault = fault
    row = {"messages": [*({"role": "user", "content": "问"}, {"role": "assistant", "content": "答案 one two"}) * 2]}
    assert check(right, [row]).require().turns == 2
    report = check(wrong, [row])
    assert report.unproven_rows == 1
    with pytest.raises(SopError, match="not exactly the assistant's text") as error:
        report.require()
    assert error.value.code == DATA


def test_what_is_worth_knowing_is_said() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    tail = [{"role": "tool", "content": "1"}, {"role": "assistant", "content": "好"}]
    rows = [{"messages": [{"role": "user", "content": "<|im_end|>"}, call, *tail], "tools": tools}]
    made = renderer_for(for_family("smollm2"), TEMPLATES / "smollm2.json")
    said = " ".join(check(made, rows).require().notes)
    assert "plain text" in said and "JSON text" in said and "declared tools" in said
    thought = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "想"}]}
    assert "leaves out reasoning_content of 1" in " ".join(check(made, [thought]).notes)
    framed = check(renderer_for(for_family("qwen3_chatml"), TEMPLATES / "qwen3_chatml.json"), [thought]).require()
    assert set(framed.connectives) == {"<think>\n", "\n</think>\n\n"}


# --- the command --------------------------------------------------------------------------------------------------------------------------


def project(folder: Path, rows: list[Any], *, length: int = 200) -> Path:
    made = renderer()
    tokenizer = tiny(QWEN, made.template, pad="<|endoftext|>")
    tokenizer.save_pretrained(folder / "model")
    (folder / "config").mkdir()
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "train.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "config" / "finetune.yaml").write_text(
        f"model_name_or_path: ./model\ntemplate_path: {TEMPLATES / 'qwen2_chatml.json'}\n"
        f"data: {{train_file: train.jsonl, max_length: {length}}}\ntraining_args: {{output_dir: out/sft}}\n"
    )
    return folder / "config" / "finetune.yaml"


def test_the_command_shows_counts_colours_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = project(tmp_path, [PAIR, "{broken", ALPACA, NO_ANSWER])
    assert lint.main(["--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "4 = 2 kept + 2 dropped" in out and "nothing_to_learn 1" in out and "unreadable 1" in out
    assert "2 of 2 rows decode to the assistant's text" in out
    page = (tmp_path / "out" / "sft.lint.html").read_text(encoding="utf-8")
    assert re.search(r'<span class="y">多喝水,注意休息。</span><span class="y c">&lt;\|im_end\|&gt;</span>', page)
    assert re.search(r'<span class="n">user\n头疼怎么办\?</span>', page)
    assert not re.search(r"(src|href)=|https?://|<script", page)


def test_the_command_refuses_an_empty_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = project(tmp_path, [NO_ANSWER, UNTRAINED])
    assert lint.main(["--config", str(config), "--samples", "0", "--html", str(tmp_path / "page.html")]) == DATA
    assert "no token would be learned" in capsys.readouterr().err
    assert (tmp_path / "page.html").is_file()


PREFERENCE = {"prompt": "头疼怎么办?", "chosen": "多喝水,注意休息。", "rejected": "不知道"}


def alignment(folder: Path, **lines: str) -> Path:
    """`rlhf.yaml` beside the project of `project`, with some of its lines replaced."""
    project(folder, [])
    given = {
        "algorithm": "dpo", "model_name_or_path": "./model", "data": "{train_file: pairs.jsonl, max_length: 200}", "training_args": "{output_dir: out/dpo}",
        "ppo": "{train_file: prompts.jsonl, train_batch_size: 2, ppo_mini_batch_size: 2, rollout_backend: transformers}",
    } | lines  # fmt: skip
    path = folder / "config" / "rlhf.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in given.items()), encoding="utf-8")
    return path


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), encoding="utf-8")


def test_both_answers_of_a_pair_are_shown_and_the_pairs_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long, same = {**PREFERENCE, "chosen": "好" * 400}, {**PREFERENCE, "rejected": PREFERENCE["chosen"]}
    exchanged = {**PREFERENCE, "chosen": PREFERENCE["rejected"], "rejected": PREFERENCE["chosen"]}
    write(tmp_path / "pairs.jsonl", [PREFERENCE, "{broken", long, same, {"nothing": 1}, exchanged])
    assert lint.main(["--config", str(alignment(tmp_path)), "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert "6 rows, 3 pairs" in out and "identical_answers 1" in out and "not_a_preference 1" in out and "1 pairs have an answer that is cut" in out
    assert "1 pairs stand there with their answers exchanged" in out and "8 of 8 rows decode" in out
    page = (tmp_path / "out" / "dpo.lint.html").read_text(encoding="utf-8")
    assert page.count("<h2>") == 2 and "(chosen)" in page and "(rejected)" in page
    assert re.search(r'<span class="y">不知道</span><span class="y c">&lt;\|im_end\|&gt;</span>', page)
    config = tmp_path / "config" / "rlhf.yaml"
    assert lint.main(["--config", str(config), "algorithm=reward", "--samples", "0"]) == 0  # which never reads half an answer
    assert "6 rows, 2 pairs" in capsys.readouterr().out
    assert lint.main(["--config", str(config), "algorithm=dpoo"]) == USAGE and "did you mean 'dpo'" in capsys.readouterr().err


def test_prompts_are_shown_with_what_the_rewards_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = {"data_source": "x", "ability": "choice", "extra_info": {}}
    rows = [{"prompt": [{"role": "user", "content": f"选{letter}"}], "reward_model": {"style": "rule", "ground_truth": letter}, **judged} for letter in "AB"]
    write(tmp_path / "prompts.jsonl", [*rows, {"prompt": [], "reward_model": {"ground_truth": "A"}, **judged}])
    config = alignment(tmp_path, algorithm="grpo", rewards="[{name: choice}]")
    assert lint.main(["--config", str(config), "--samples", "1"]) == 0
    said = capsys.readouterr()
    assert "<|im_start|>user\n选A<|im_end|>" in said.out and "ground truth: A" in said.out and "3 rows, 2 prompts" in said.out
    assert "right 1.00" in said.err + said.out and "another row's 0.00" in said.err + said.out
    assert lint.main(["--config", str(config), "rewards=[{name: length, weight: 1.0, options: {most: 1}}, {name: choice, weight: -1.0}]"]) == DATA


def test_data_in_a_sample_cannot_break_the_page(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "</pre><script>alert(1)</script>"}, {"role": "assistant", "content": "<b>&amp;"}]}
    page = lint_view.html(check(renderer(), [row], samples=1))
    assert "<script" not in page and "&lt;b&gt;&amp;amp;" in page


def test_the_preflight_passes_what_the_later_rows_decide_and_stops_on_a_wrong_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(NO_ANSWER) + "\n" + json.dumps(PAIR) + "\n", encoding="utf-8")
    assert proof.preflight(renderer(), [path], rows=1).learned == 0
    assert proof.preflight(renderer(), [path]).learned > 0
    right = renderer()
    path.write_text(json.dumps(PAIR) + "\n", encoding="utf-8")
    with pytest.raises(SopError, match="not exactly"):
        proof.preflight(Wrong(right.tokenizer, right.template, name="wrong"), [path])
