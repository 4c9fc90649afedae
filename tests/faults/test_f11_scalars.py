"""F11: thirty scalars, as typed as YAML 1.2 says, or refused with their line where a field wants another type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.config import ConfigError, load, option
from self_model_sop.yaml_source import Problem, parse

GOLDEN: list[tuple[str, Any]] = [
    ("5e-5", 5e-5), ("5.0e-5", 5e-5), ("1e3", 1000.0), ("-1.5E+2", -150.0), (".5", 0.5), ("1.", 1.0), ("0", 0), ("-7", -7), ("+7", 7), ("1_000", 1000),
    ("08", "08"), ("007", "007"), ("0x1F", "0x1F"), ("0o17", "0o17"), ("1:30", "1:30"), ("12:30:45", "12:30:45"), ("2024-01-01", "2024-01-01"), ("1.2.3", "1.2.3"),
    ("no", "no"), ("off", "off"), ("yes", "yes"), ("on", "on"), ("y", "y"), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
    ("nan", "nan"), (".inf", ".inf"),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Typed:
    text: str = option("", "text")
    number: float = option(0.0, "number")
    count: int = option(0, "count")
    flag: bool = option(False, "flag")


@pytest.mark.parametrize(("scalar", "value"), GOLDEN, ids=lambda x: repr(x))
def test_golden(scalar: str, value: Any) -> None:
    problems: list[Problem] = []
    data, _ = parse(f"k: {scalar}\n", "f", problems)
    assert not problems and data == {"k": value} and type(data["k"]) is type(value)


@pytest.mark.parametrize(("scalar", "value"), GOLDEN, ids=lambda x: repr(x))
@pytest.mark.parametrize("key", ["text", "number", "count", "flag"])
def test_a_field_takes_its_own_type_or_names_the_line(scalar: str, value: Any, key: str, tmp_path: Path) -> None:
    fits = {"text": isinstance(value, str), "number": type(value) in (int, float), "count": type(value) is int, "flag": isinstance(value, bool)}[key]
    path = tmp_path / "c.yaml"
    path.write_text(f"# a comment\n{key}: {scalar}\n")
    if fits:
        assert getattr(load(Typed, path).config, key) == value
        return
    with pytest.raises(ConfigError) as caught:
        load(Typed, path)
    (problem,) = caught.value.problems
    assert problem.where.endswith("c.yaml:2") and problem.what.startswith(f"{key}: expected ")
    if key == "flag" and isinstance(value, str):
        assert problem.fix == "write true or false"


def test_quoted_is_text() -> None:
    data, _ = parse("a: '5e-5'\nb: \"true\"\nc: 'null'\n", "f", [])
    assert data == {"a": "5e-5", "b": "true", "c": "null"}
