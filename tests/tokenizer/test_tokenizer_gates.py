"""Each gate lets a good extension pass and names the token that breaks a bad one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.errors import DATA, SopError
from self_model_sop.tokenizer import extend, gates, methods
from self_model_sop.tokenizer.base import Base, open_base
from self_model_sop.tokenizer.methods import Corpus
from self_model_sop.tokenizer.plan import Row
from self_model_sop.tokenizer.settings import SelectionConfig
from tiny_tokenizers import chinese, make

Json = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, list[Row], Path]:
    folder = tmp_path_factory.mktemp("gates")
    base = open_base(make("qwen", folder))
    rows = methods.propose(base, Corpus(lambda: ((t, 1.0) for t in chinese(100))), SelectionConfig(min_freq=3), 60)
    extend.write(base, rows, "continued_bpe", folder / "good")
    return base, rows, folder / "good"


def broken(made: tuple[Base, list[Row], Path], out: Path, change: Callable[[Json], object], rows: list[Row] | None = None) -> gates.Pair:
    base, good, folder = made
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    data = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (out / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return extend.opened_pair(base, good if rows is None else rows, out, free=False)


def failed(pair: gates.Pair) -> str:
    with pytest.raises(SopError) as caught:
        gates.check(pair, chinese(20, seed=3))
    assert caught.value.code == DATA
    return caught.value.what


def test_a_good_extension_passes_every_gate(made: tuple[Base, list[Row], Path], tmp_path: Path) -> None:
    assert gates.check(broken(made, tmp_path / "x", lambda data: None), chinese(20, seed=3)) == dict.fromkeys(gates.GATES, 0)


def test_special_tokens_left_out_of_the_vocabulary_move(made: tuple[Base, list[Row], Path], tmp_path: Path) -> None:
    def unpin(data: Json) -> None:
        for added in data["added_tokens"]:
            data["model"]["vocab"].pop(added["content"])

    what = failed(broken(made, tmp_path / "x", unpin))
    assert "gate 'special ids'" in what and "'<|endoftext|>'" in what


def test_two_base_tokens_exchanged(made: tuple[Base, list[Row], Path], tmp_path: Path) -> None:
    def exchange(data: Json) -> None:
        vocab = data["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    what = failed(broken(made, tmp_path / "x", exchange))
    assert "gate 'base ids'" in what and "had id" in what


def test_a_merge_of_english_changes_english(made: tuple[Base, list[Row], Path], tmp_path: Path) -> None:
    base, rows, _ = made
    known = {tuple(m) for m in base.data["model"]["merges"]}
    merge = next((a, b) for a in "teoi" for b in "xywlte" if (a, b) not in known and a + b not in base.vocab)
    token = "".join(merge)
    row = replace(rows[-1], id=rows[-1].id + 1, token=token, data=token.encode(), merge=merge)

    def add(data: Json) -> None:
        data["model"]["vocab"][token] = row.id
        data["model"]["merges"].append(list(merge))

    what = failed(replace(broken(made, tmp_path / "x", add), rows=[*rows, row]))
    assert "gate 'regression lines'" in what and repr(token) in what


def test_a_token_without_its_merge_is_never_reached(made: tuple[Base, list[Row], Path], tmp_path: Path) -> None:
    _, rows, _ = made
    what = failed(broken(made, tmp_path / "x", lambda data: data["model"]["merges"].remove(list(rows[-1].merge or ()))))
    assert "gate 'reachable'" in what and rows[-1].text in what


def test_merges_in_front_of_the_base_merges_change_text_without_new_tokens(made: tuple[Base, list[Row], Path], tmp_path: Path) -> None:
    def reorder(data: Json) -> None:
        data["model"]["merges"] = data["model"]["merges"][1:] + data["model"]["merges"][:1]

    what = failed(broken(made, tmp_path / "x", reorder))
    assert "gate 'untouched text'" in what and "encoded differently" in what


def test_a_moved_new_id(made: tuple[Base, list[Row], Path], tmp_path: Path) -> None:
    _, rows, _ = made

    def move(data: Json) -> None:
        data["model"]["vocab"][rows[-1].token] += 5

    what = failed(broken(made, tmp_path / "x", move))
    assert "gate 'new ids'" in what and rows[-1].text in what


def test_a_changed_template(made: tuple[Base, list[Row], Path], tmp_path: Path) -> None:
    pair = broken(made, tmp_path / "x", lambda data: None)
    pair.new.chat_template += " "
    assert "gate 'chat template'" in failed(pair)


def test_an_added_token_of_latin_1_letters_does_not_come_back(made: tuple[Base, list[Row], Path], tmp_path: Path) -> None:
    _, rows, _ = made
    row = replace(rows[-1], id=rows[-1].id + 1, token="éÿ", data="éÿ".encode(), merge=None)

    def add(data: Json) -> None:
        data["added_tokens"].append({"id": row.id, "content": "éÿ", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False})

    pair = replace(broken(made, tmp_path / "x", add), rows=[*rows, row])
    with pytest.raises(SopError, match="round trip"):
        gates.check(pair, ["caféÿ crème"])


def test_the_probe_of_llama_cpp_is_reported(made: tuple[Base, list[Row], Path], tmp_path: Path) -> None:
    pair = broken(made, tmp_path / "x", lambda data: None)
    probe = gates.llama_cpp_probe(pair)
    assert probe["same"] is (pair.old.encode(gates.LLAMA_CPP_PROBE) == pair.new.encode(gates.LLAMA_CPP_PROBE))
