"""One rendering: the text and ids of the library, and of every turn exactly the assistant's tokens."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from chat_tokenizers import FAMILIES, QWEN, REAL, SHARED, TEMPLATES, for_family, learned, plain_ids, real, tiny
from self_model_sop.data.formats import RowError, to_messages, tools_of
from self_model_sop.errors import DATA, USAGE, SopError
from self_model_sop.train import families, proof
from self_model_sop.train.template import Renderer, TemplateError, ensure_pad, renderer_for

SYSTEM = {"role": "system", "content": "你是医生。"}
ASK = {"role": "user", "content": "头疼 怎么办?"}
SAY = {"role": "assistant", "content": "多喝水,注意休息。\n\n1. rest"}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "感冒", "n": 2}}}
PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "search", "description": "d", "parameters": PARAMETERS}}
TALK = [SYSTEM, ASK, SAY, {"role": "user", "content": "那么?"}, {"role": "assistant", "content": "去医院"}]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def renderer(name: str, **options: Any) -> Renderer:
    return renderer_for(for_family(name), TEMPLATES / f"{name}.json", **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_of_every_family_is_learned_exactly(name: str) -> None:
    tokenizer = copy.deepcopy(for_family(name))
    made = renderer(name)
    tokenizer.chat_template = made.template  # as it is saved beside a model
    for talk in (TALK, TALK[1:], TALK[:3]):
        found = made.render(talk)
        assert found.text == tokenizer.apply_chat_template(talk, tokenize=False)
        assert found.ids == plain_ids(tokenizer, talk)
        wanted = [m["content"] for m in talk if m["role"] == "assistant"]
        markers = [turn.end_marker for turn in found.turns]
        assert all(markers)
        assert learned(tokenizer, found) == "".join(text + marker for text, marker in zip(wanted, markers, strict=True)) or name == "llama2_chat"
        report = proof.check(made, [{"messages": talk}]).require()
        assert report.kept == 1 and not report.unended


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_begins_with_the_prompt_that_the_model_gets(name: str) -> None:
    made = renderer(name)
    whole, prompt = made.render(TALK), made.prompt(TALK[:-1])
    assert whole.ids[: len(prompt)] == prompt
    assert not any(whole.supervised[i] for i in range(len(prompt) - 1, len(prompt)))
    assert whole.supervised[len(prompt)]
    assert made.stop_ids and set(made.stop_ids) & {whole.ids[i] for i, s in enumerate(whole.supervised) if s}


def test_reasoning_is_learned_with_its_tags_and_an_empty_block_is_context() -> None:
    made, tokenizer = renderer("qwen3_chatml"), for_family("qwen3_chatml")
    thinking = [ASK, {**SAY, "reasoning_content": "先想"}, ASK, {**SAY, "reasoning_content": "再想"}]
    found = made.render(thinking)
    assert learned(tokenizer, found) == SAY["content"] + "<|im_end|>" + "<think>\n再想\n</think>\n\n" + SAY["content"] + "<|im_end|>"
    assert [turn.missing for turn in found.turns] == [("reasoning_content",), ()]  # this family leaves out what was thought before the last question
    plain = made.render([ASK, SAY])
    assert "<think>\n\n</think>" in plain.text
    assert learned(tokenizer, plain) == SAY["content"] + "<|im_end|>"
    assert made.text([ASK], add_generation_prompt=True).endswith("assistant\n")
    assert tokenizer.decode(made.prompt([ASK])).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(made.prompt([ASK], enable_thinking=True)).endswith("assistant\n")
    inline = made.render([ASK, {"role": "assistant", "content": "<think>\n先想\n</think>\n\n答"}])
    assert learned(tokenizer, inline) == "<think>\n先想\n</think>\n\n答<|im_end|>"


@pytest.mark.parametrize("arguments", [{"query": "感冒", "n": 2}, '{"query": "感冒", "n": 2}'])
@pytest.mark.parametrize("name", ["qwen2_chatml", "qwen3_chatml", "deepseek_chat"])
def test_tool_calls_are_learned_and_their_results_are_not(name: str, arguments: Any) -> None:
    made = renderer(name)
    call = {"type": "function", "function": {"name": "search", "arguments": arguments}}
    talk = [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "结果 42"}, SAY]
    found = made.render(talk, tools=[TOOL])
    text = learned(made.tokenizer, found)
    assert '"query": "感冒"' in text and "search" in text and SAY["content"] in text
    assert "结果" not in text and "parameters" not in text and ASK["content"] not in text
    assert text.count(found.turns[0].end_marker) == 2
    assert proof.check(made, [{"messages": talk, "tools": [TOOL]}]).require().kept == 1


def test_a_template_without_tools_gets_calls_as_text_and_says_so() -> None:
    made = renderer("smollm2")
    found = made.render([ASK, {"role": "assistant", "content": "看", "tool_calls": [CALL]}, {"role": "tool", "content": "42"}, SAY], tools=[TOOL])
    assert learned(made.tokenizer, found).startswith('看\n{"name": "search", "arguments": {"query": "感冒", "n": 2}}<|im_end|>')
    assert found.remarks == {"calls_as_text", "tools_left_out"}


def test_turns_can_be_left_out_or_weighted() -> None:
    made = renderer("qwen2_chatml")
    found = made.render([ASK, {**SAY, "train": False}, ASK, {**SAY, "weight": 0.25}])
    assert learned(made.tokenizer, found) == SAY["content"] + "<|im_end|>"
    assert set(found.weights) == {0.0, 0.25}
    assert [i == -100 for i in found.labels] == [not s for s in found.supervised]
    with pytest.raises(TemplateError, match="weight"):
        made.render([ASK, {**SAY, "weight": -1}])


def test_train_on_chooses_the_turns() -> None:
    assert learned(for_family("smollm2"), renderer("smollm2", train_on="last").render(TALK)) == "去医院<|im_end|>"
    assert all(renderer("smollm2", train_on="full").render(TALK).supervised)
    ended_by_user = [*TALK, ASK]
    assert learned(for_family("smollm2"), renderer("smollm2", train_on="last").render(ended_by_user)) == "去医院<|im_end|>"


def test_one_bos_even_where_the_tokenizer_adds_one_too(tmp_path: Path) -> None:
    import tiny_models
    from self_model_sop.train.model import load_tokenizer

    tokenizer = load_tokenizer(tiny_models.tiny_llama(tmp_path / "llama"))
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    for ids in (renderer_for(tokenizer).render(TALK).ids, renderer_for(tokenizer).prompt(TALK[:2])):
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("content", ["\n\n  leading", "trailing \n", "  both  ", "\n"])
def test_white_space_at_the_border_never_costs_a_word(content: str) -> None:
    made = renderer("qwen2_chatml")
    found = made.render([ASK, {"role": "assistant", "content": content}])
    assert found.ids == made.encoder.encode(found.text, []).ids
    assert learned(made.tokenizer, found).removesuffix("<|im_end|>").strip() == content.strip()


def test_a_name_in_the_head_of_a_turn_is_context() -> None:
    made = renderer_for(tiny(QWEN, CHATML.replace("m.role + '\n'", "m.role + (' name=' + m.name if m.name else '') + '\n'")))
    found = made.render([ASK, {**SAY, "name": "小明"}])
    assert "assistant name=小明\n" in found.text
    assert learned(made.tokenizer, found) == SAY["content"] + "<|im_end|>"


def test_a_text_marker_serves_where_no_control_token_does() -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ '\n### End\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = tiny(("</s>",), template, eos="</s>")
    found = renderer_for(tokenizer).render([ASK, SAY])
    assert found.text[found.turns[0].start : found.turns[0].end] == SAY["content"] + "\n### End"


UNPROVABLE = {
    "mixes messages": ("{{ messages | tojson }}<|im_end|>", "mixes"),
    "loses the answer": ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}", "does not write the assistant"),
    "never ends": ("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", "never learn to stop"),
    "weaves": ("{% for i in range(4) %}{% for m in messages %}{{ m.content[i * 3 : i * 3 + 3] }}<|im_end|>{% endfor %}{% endfor %}", "weaves"),
    "refuses": ("{{ raise_exception('no talks here') }}", "no talks here"),
}


@pytest.mark.parametrize("name", UNPROVABLE)
def test_what_cannot_be_proven_is_refused(name: str) -> None:
    template, said = UNPROVABLE[name]
    with pytest.raises(SopError, match=said):
        renderer_for(tiny(QWEN, template)).render([ASK, SAY])


def test_an_answer_without_its_prompt_is_refused() -> None:
    template = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name + m.tool_calls[0].function.arguments | tojson }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    made = renderer_for(tiny(QWEN, template))
    with pytest.raises(TemplateError, match="without the prompt"):
        made.render([ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}])


BROKEN_CALL = {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}


@pytest.mark.parametrize("messages", [[], [{"role": "bot", "content": "x"}], [{"role": "assistant"}], [ASK, BROKEN_CALL]])
def test_faulty_conversations_are_row_errors(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(TemplateError) as error:
        renderer("qwen2_chatml").render(messages)
    assert error.value.code == DATA


# --- template files -----------------------------------------------------------------------------------------------------------------------


def test_two_templates_that_differ_are_refused_with_the_difference(tmp_path: Path) -> None:
    tokenizer = tiny(QWEN, CHATML)
    with pytest.raises(SopError) as error:
        renderer_for(tokenizer, TEMPLATES / "qwen2_chatml.json")
    assert error.value.code == USAGE
    assert "You are Qwen" in str(error.value) and "tokenizer:" in str(error.value)
    used = renderer_for(tokenizer, TEMPLATES / "qwen2_chatml.json", override=True)
    assert "instead of" in used.name and "You are Qwen" in used.render([ASK, SAY]).text
    equal = tmp_path / "equal.jinja"
    equal.write_text(CHATML.replace("m.role", "m['role']"), encoding="utf-8")
    assert "equal" in renderer_for(tokenizer, equal).name


def test_missing_tokens_and_missing_templates_are_named() -> None:
    with pytest.raises(SopError, match=r"<\|start_header_id\|>"):
        renderer_for(tiny(QWEN), TEMPLATES / "llama3_instruct.json")
    with pytest.raises(SopError, match="no chat template"):
        renderer_for(tiny(QWEN))
    with pytest.raises(SopError, match="no such chat template") as error:
        renderer_for(tiny(QWEN), Path("qwen2_chatm"))
    assert "qwen2_chatml" in str(error.value.fix)


def test_a_bare_name_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert families.find("qwen2_chatml").samefile(TEMPLATES / "qwen2_chatml.json")
    own = tmp_path / "self_model" / "template"
    own.mkdir(parents=True)
    (own / "qwen2_chatml.json").write_text("{}")
    (tmp_path / "config").mkdir()
    assert families.find("qwen2_chatml").samefile(own / "qwen2_chatml.json")


FAULTY = {
    "not json": ("{", "not JSON"),
    "a list": ("[]", "one object"),
    "a typing error": ('{"schema": 1, "name": "x", "jinja": "x", "stopp": []}', "stopp"),
    "a wrong type": ('{"schema": 1, "name": "x", "jinja": 3}', "jinja"),
    "another schema": ('{"schema": 9, "name": "x", "jinja": "x"}', "schema"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_template_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(FAULTY[name][0])
    with pytest.raises(SopError, match=FAULTY[name][1]) as error:
        families.read(path)
    assert error.value.code == USAGE and str(path) in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_file_says_what_proved_it_or_why_nothing_did(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = families.read(TEMPLATES / f"{name}.json")
    assert file.name == name and file.family
    assert bool(file.verified) != bool(file.unverified)
    made = renderer(name)
    assert made.verified == bool(file.verified)
    assert ("unverified" in capsys.readouterr().err) == bool(file.unverified)


def test_the_default_system_text_of_qwen2_5_is_reproduced() -> None:
    assert renderer("qwen2_chatml").text([ASK]).startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_a_verified_family_writes_what_the_real_tokenizer_writes(name: str) -> None:
    tokenizer, file = real(REAL[name]), families.read(TEMPLATES / f"{name}.json")
    assert families.difference(file, tokenizer.chat_template, tokenizer.special_tokens_map) == ""
    assert hashlib.sha256(tokenizer.chat_template.encode()).hexdigest() in {entry["chat_template_sha256"] for entry in file.verified}
    for probe in file.differs_on:  # a difference that is declared must be there
        this_one = dataclasses.replace(file, differs_on={p: "" for p in families.PROBES if p not in (probe, "question")})
        assert families.difference(this_one, tokenizer.chat_template, tokenizer.special_tokens_map)


# --- padding ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("control", "pad", "expected"),
    [
        (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|endoftext|>"),
        (("<|im_end|>", "<|finetune_right_pad_id|>"), None, "<|finetune_right_pad_id|>"),
        (("<|im_end|>", "<|reserved_special_token_0|>"), "<|im_end|>", "<|reserved_special_token_0|>"),
        (("<|im_end|>", "<pad>"), "<pad>", "<pad>"),
        (("<|im_end|>", "<|eot_id|>", "<|fim_pad|>"), "<|eot_id|>", "<|fim_pad|>"),
    ],
)
def test_padding_is_an_existing_token_and_never_the_end(control: tuple[str, ...], pad: str | None, expected: str) -> None:
    tokenizer = copy.deepcopy(tiny(control, eos="<|im_end|>", pad=pad))
    size = len(tokenizer)
    assert ensure_pad(tokenizer) == tokenizer.pad_token == expected
    assert len(tokenizer) == size and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_no_token_that_could_pad_is_said() -> None:
    with pytest.raises(SopError, match="padding"):
        ensure_pad(copy.deepcopy(tiny(("<|im_end|>", "<|im_start|>"), eos="<|im_end|>")))


# --- exactness on real data ---------------------------------------------------------------------------------------------------------------

DATA_FILES = ("dialogue/sharegpt_zh_1k.jsonl", "dialogue/toolcall_zh_300.jsonl", "medical/medical_sft_1k.sharegpt.jsonl")


def rows_of(name: str, sample: int | None) -> list[dict[str, Any]]:
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip("../shared is absent")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return random.Random(7).sample(rows, sample) if sample else rows


def assert_exact(made: Renderer, rows: list[dict[str, Any]]) -> None:
    """ids of the library; supervised text = assistant contents + end markers; and the lint agrees."""
    tokenizer = made.tokenizer
    own = copy.deepcopy(tokenizer)
    own.chat_template = made.template
    rendered = 0
    for row in rows:
        try:
            messages, tools = to_messages(row), tools_of(row)
        except RowError:
            continue
        found, spoken = made.render(messages, tools=tools), made.prepared(messages)
        if not found.remarks & {"spelled"}:
            assert found.ids == plain_ids(own, spoken, tools=tools)
        assert tokenizer.decode(found.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == found.text
        turns = [m for m in spoken if m["role"] == "assistant" and (m["content"] or m.get("tool_calls"))]
        if not any(m.get("tool_calls") for m in turns):
            wanted = "".join(m["content"] + turn.end_marker for m, turn in zip(turns, found.turns, strict=True))
            assert "".join(learned(tokenizer, found).split()) == "".join(wanted.split())
        rendered += 1
    report = proof.check(made, rows).require()
    assert rendered >= report.kept > 0.9 * len(rows)
    assert not report.unproven and not report.unended


@pytest.mark.shared
@pytest.mark.parametrize("data", DATA_FILES)
@pytest.mark.parametrize("name", REAL)
def test_exact_on_a_sample_of_real_rows(name: str, data: str) -> None:
    assert_exact(renderer_for(real(REAL[name]), TEMPLATES / f"{name}.json"), rows_of(data, 25))


@pytest.mark.shared
@pytest.mark.exhaustive
@pytest.mark.parametrize("data", DATA_FILES)
@pytest.mark.parametrize("name", REAL)
def test_exact_on_every_real_row(name: str, data: str) -> None:
    assert_exact(renderer_for(real(REAL[name]), TEMPLATES / f"{name}.json"), rows_of(data, None))


@pytest.mark.shared
@pytest.mark.exhaustive
@pytest.mark.parametrize("data", DATA_FILES)
@pytest.mark.parametrize("name", ["llama2_chat", "plain"])
def test_exact_with_a_tokenizer_that_has_no_template(name: str, data: str) -> None:
    made, rows = renderer_for(real("llama2"), TEMPLATES / f"{name}.json"), rows_of(data, None)
    report = proof.check(made, rows).require()
    assert report.kept > 0.9 * len(rows) and not report.unended


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen3", "llama3", "deepseek_v3", "smollm2"])
def test_stock_templates_need_no_generation_tags(name: str) -> None:
    tokenizer = real(name)
    assert "generation %}" not in tokenizer.chat_template
    found = renderer_for(tokenizer).render(TALK)
    assert found.ids == plain_ids(tokenizer, TALK)
    assert learned(tokenizer, found) == "".join(m["content"] + found.turns[0].end_marker for m in TALK if m["role"] == "assistant")
