"""YAML in, plain data with a place for every key out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from self_model_sop.yaml_source import Problem, Tree, parse, read


def parsed(text: str) -> tuple[Any, list[str]]:
    problems: list[Problem] = []
    data, _ = parse(text, "f.yaml", problems)
    return data, [str(p) for p in problems]


def test_every_key_and_item_has_its_line() -> None:
    problems: list[Problem] = []
    data, origin = parse("a: 1\nb:\n  c: [1,\n    2]\n  d:\n    - x\n", "f.yaml", problems)
    assert data == {"a": 1, "b": {"c": [1, 2], "d": ["x"]}} and not problems
    assert origin[("a",)] == "f.yaml:1"
    assert (origin[("b", "c")], origin[("b", "c", 1)], origin[("b", "d")], origin[("b", "d", 0)]) == ("f.yaml:3", "f.yaml:4", "f.yaml:5", "f.yaml:6")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a: given twice (first at f.yaml:1); keep one of the two"),
        ("x:\n  k: 1\n  k: 2\n", "f.yaml:3: x.k: given twice (first at f.yaml:2); keep one of the two"),
        ("? [1, 2]\n: 3\n", "f.yaml:1: a key must be text"),
        ("base: &b {k: 1}\nx:\n  <<: *b\n", "f.yaml:3: merge keys (<<) are not supported; write the keys out"),
        ("a: !!python/object:os.system x\n", "f.yaml:1: the tag 'tag:yaml.org,2002:python/object:os.system' is not allowed; write plain YAML"),
        ("a: !mine {b: 1}\n", "f.yaml:1: the tag '!mine' is not allowed; write plain YAML"),
        ("a: [1, 2\nb: 3\n", "f.yaml:2:2: not YAML: expected ',' or ']', but got ':'"),
        ("a: 1e999\n", "f.yaml:1: 1e999 is too large for a number"),
        ("a: " + "9" * 5000 + "\n", "f.yaml:1: a number of more than 4,000 digits"),
    ],
)
def test_refused_with_its_line(text: str, expected: str) -> None:
    assert expected in parsed(text)[1]


def test_aliases_that_stay_small_are_allowed() -> None:
    assert parsed("a: &x [1, 2]\nb: *x\n") == ({"a": [1, 2], "b": [1, 2]}, [])


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa: 1\r\nb: 2\r\n", b"a: 1\nb: 2", "a: 1\nb: 2 # 中文\n".encode()])
def test_read_takes_a_bom_and_crlf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.yaml").write_bytes(content)
    problems: list[Problem] = []
    assert read(tmp_path / "f.yaml", problems).data == {"a": 1, "b": 2} and not problems


@pytest.mark.parametrize(("content", "what"), [(b"a: \xff\xfe\n", "not UTF-8"), (b"- 1\n- 2\n", "must hold keys and values"), (b"", ""), (b"# only a comment\n", "")])
def test_read_of_odd_files(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "f.yaml").write_bytes(content)
    problems: list[Problem] = []
    assert read(tmp_path / "f.yaml", problems).data == {}
    assert (what in str(problems[0])) if what else not problems


def test_read_of_a_folder_is_a_problem(tmp_path: Path) -> None:
    problems: list[Problem] = []
    read(tmp_path, problems)
    assert "cannot read" in str(problems[0])


def test_merge_goes_key_by_key_and_keeps_origins() -> None:
    problems: list[Problem] = []
    lower, upper = (Tree(*parse(text, name, problems)) for text, name in (("a: {x: 1, y: [1, 2]}\nb: 1\n", "low"), ("a: {y: [3]}\nc: {}\n", "high")))
    lower.merge(upper)
    assert lower.data == {"a": {"x": 1, "y": [3]}, "b": 1, "c": {}}
    assert (lower.where(("a", "x")), lower.where(("a", "y")), lower.where(("a", "y", 0)), lower.where(("b",))) == ("low:1", "high:1", "high:1", "low:2")


def test_merge_of_a_map_over_a_scalar_and_back() -> None:
    tree = Tree({"a": 1}, {("a",): "low"})
    tree.merge(Tree({"a": {"b": 2}}, {("a",): "high", ("a", "b"): "high"}))
    assert tree.data == {"a": {"b": 2}}
    tree.merge(Tree({"a": None}, {("a",): "top"}))
    assert tree.data == {"a": None} and tree.where(("a", "b")) == "top"


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    lambda child: st.lists(child, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8).filter(lambda k: k != "<<"), child, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(st.characters(categories=["L"]), min_size=1, max_size=6), values, max_size=4))
@settings(max_examples=150, deadline=None)
def test_json_reads_back_as_itself(data: dict[str, Any]) -> None:
    """JSON is YAML: whatever json writes comes back."""
    import json

    assert parsed(json.dumps(data, ensure_ascii=False)) == (data, [])


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_no_text_makes_it_crash(text: str) -> None:
    parsed(text)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_no_bytes_make_it_crash(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("y") / "f.yaml"
    path.write_bytes(content)
    read(path, [])
