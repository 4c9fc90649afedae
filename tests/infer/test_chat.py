from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from self_model_sop.errors import SopError
from self_model_sop.eval.generate import Decoding, generate
from self_model_sop.eval.models import open_model
from self_model_sop.infer import chat
from self_model_sop.train.model import load_model
from self_model_sop.train.template import renderer_for
from tiny_models import tiny_bert, tiny_llama, tiny_qwen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models whose attention matters: random weights as they come answer the same to anything."""
    folder = tmp_path_factory.mktemp("chat")
    for name, make in (("qwen", tiny_qwen), ("llama", tiny_llama)):
        model = load_model(make(folder / name))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "_proj" in parameter_name:
                    parameter.mul_(8)
        model.save_pretrained(folder / name)
    return folder


def conversation(folder: Path, name: str = "qwen", **settings: object) -> chat.Conversation:
    decoding = Decoding(**{"max_new_tokens": 12, **settings})  # type: ignore[arg-type]
    return chat.open_conversation(chat.Config(model=str(folder / name), decoding=decoding, device="cpu"))


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_turns_with_the_cache_equal_answers_from_scratch(folder: Path, name: str) -> None:
    talk = conversation(folder, name)
    opened = open_model(folder / name, device="cpu")
    renderer = renderer_for(opened.tokenizer)
    for question in ("你好", "什么是高血压？", "And in English?"):
        answer = talk.ask(question)
        whole = generate(*opened, renderer.prompt(talk.messages[:-1]), renderer.stop_ids, talk.decoding)
        assert (answer.text, answer.ids) == (whole.text, whole.ids)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 3
    assert len({m["content"] for m in talk.messages[1::2]}) == 3


def test_later_turns_read_only_what_is_new(folder: Path) -> None:
    talk = conversation(folder)
    talk.ask("你好" * 20)
    read: list[int] = []
    hook = talk.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    talk.ask("什么是高血压？")
    hook.remove()
    prompt = talk.renderer.prompt(talk.messages[:-1])
    assert read[0] < len(prompt) // 2 and set(read[1:]) == {1}


def test_reset_and_system(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(folder)
    first = talk.ask("你好").text
    talk.reset()
    assert talk.messages == [] and talk.ask("你好").text == first
    chat._command(talk, "/system 你是医生")
    assert talk.system == "你是医生" and talk.messages == []
    assert talk.ask("你好").text != first and "你是医生" in talk.tokenizer.decode(talk._prompt())


def test_old_turns_are_left_out_when_the_context_is_full(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(folder, max_new_tokens=8)
    talk.system = "你是医生"
    for i in range(8):
        talk.ask(f"{i}" + "血压" * 30)
    assert len(talk.messages) == 16 and len(talk._prompt()) + 8 <= 512
    assert "no longer fit" in capsys.readouterr().err
    assert talk.tokenizer.decode(talk._prompt()).count("你是医生") == 1
    with pytest.raises(SopError, match="do not fit"):
        talk.ask("长" * 900)
    assert len(talk.messages) == 16  # the question that was refused is not kept


def test_an_interrupted_answer_is_kept_as_far_as_it_was_seen(folder: Path) -> None:
    talk = conversation(folder)

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    answer = talk.ask("你好", stop)
    assert talk.messages[-1] == {"role": "assistant", "content": answer.text} and not answer.stopped
    assert talk.ask("你好").tokens > 0  # the cache was dropped, not left torn


def lines(*given: str) -> Iterator[str]:
    yield from given
    raise EOFError


def test_the_terminal(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(folder)
    given = lines("你好", "", "/save " + str(tmp_path / "talk.jsonl"), "/help", "/nonsense", "/save /no/such/folder/x", "/system", "/reset", "再见")
    chat.talk(talk, lambda: next(given))
    row = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] and row["messages"][0]["content"] == "你好"
    shown = capsys.readouterr()
    assert row["messages"][1]["content"] in shown.out and "no command '/nonsense'" in shown.err and "cannot write" in shown.err
    assert talk.messages[0]["content"] == "再见"
    ended = lines("/exit", "never read")
    chat.talk(talk, lambda: next(ended))
    assert len(talk.messages) == 2


def test_two_models_side_by_side_answer_as_each_would_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = {name: conversation(folder, name) for name in ("qwen", "llama")}
    both = chat.open_talk(chat.Config(model=str(folder / "qwen"), against=str(folder / "llama"), decoding=Decoding(max_new_tokens=12), device="cpu"))
    assert isinstance(both, chat.SideBySide) and list(both.conversations) == ["qwen", "llama"]
    given = lines("你好", "什么是高血压？", "/save " + str(tmp_path / "talk.jsonl"), "/system 你是医生", "再见")
    chat.talk(both, lambda: next(given))
    for talk in alone.values():
        talk.ask("你好")
        talk.ask("什么是高血压？")
    rows = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["model"], row["messages"]) for row in rows] == [(name, talk.messages) for name, talk in alone.items()]
    shown = capsys.readouterr().out
    for name, talk in alone.items():
        assert all(f"[{name}]\n{m['content']}" in shown for m in talk.messages[1::2])
        talk.reset()
        talk.system = "你是医生"
        assert both.conversations[name].messages[-1]["content"] == talk.ask("再见").text


def test_one_of_two_that_cannot_answer_does_not_stop_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = chat.SideBySide({"small": conversation(folder), "large": conversation(folder, "llama")})
    both.conversations["large"].model.config.max_position_embeddings = 4096
    answers = both.ask("长" * 900)
    assert list(answers) == ["large"] and "error: small" in capsys.readouterr().err
    assert both.conversations["small"].messages == [] and len(both.conversations["large"].messages) == 2


def test_one_question_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    def sop(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "self_model_sop.cli", "infer", "chat", "--device", "cpu", *argv]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=300, check=False)

    once = sop("--model", str(folder / "qwen"), "--prompt", "你好", "--temperature", "0", "--max-new-tokens", "5")
    assert once.returncode == 0, once.stderr
    opened = open_model(folder / "qwen", device="cpu")
    renderer = renderer_for(opened.tokenizer)
    expected = generate(*opened, renderer.prompt([{"role": "user", "content": "你好"}]), renderer.stop_ids, Decoding(max_new_tokens=5, repetition_penalty=1.05))
    assert once.stdout == expected.text + "\n"
    piped = sop("--model", str(folder / "qwen"), "--temperature", "0", "decoding.max_new_tokens=5", stdin="你好\n/exit\n")
    assert piped.returncode == 0 and piped.stdout == once.stdout


def test_what_is_no_model_to_talk_to(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert = tiny_bert(tmp_path / "bert")
    for argv, code, words in (
        ([], 2, "no model to talk to"), (["--model", str(bert)], 2, "masked model"), (["--model", str(tmp_path / "nothing")], 2, "no such file or folder"),
        (["--model", str(folder / "qwen"), "--adapter", str(folder / "llama")], 2, "adapter_config.json"),
        (["--model", str(folder / "qwen"), "--temperature", "-1"], 2, "temperature"),
    ):  # fmt: skip
        assert chat.main(argv) == code, argv
        assert words in capsys.readouterr().err, argv
