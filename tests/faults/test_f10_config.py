"""F10: a misspelt key gets the right suggestion; a wrong config is never a traceback."""

from __future__ import annotations

import importlib
import random
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from self_model_sop.config import ConfigError, fields, load
from self_model_sop.stages import STAGES

CLASSES = {s.name: s.config for e in STAGES if e.stage for s in [importlib.import_module(e.module).STAGE]}
KEYS = sorted({(name, loc) for name, cls in CLASSES.items() for loc, _, _ in fields(cls)})


def edits(key: str, draw: random.Random) -> str:
    """The key with one letter dropped, doubled, replaced, or two swapped."""
    i = draw.randrange(len(key))
    kind = draw.choice(["drop", "double", "replace", "swap"])
    if kind == "drop":
        return key[:i] + key[i + 1 :]
    if kind == "double":
        return key[:i] + key[i] + key[i:]
    if kind == "replace":
        return key[:i] + draw.choice(string.ascii_lowercase) + key[i + 1 :]
    i = min(i, len(key) - 2)
    return key[:i] + key[i + 1] + key[i] + key[i + 2 :]


def suggestion(cls: type, loc: tuple[str, ...], typo: str, path: Path) -> str:
    data: Any = 1
    for part in reversed((*loc[:-1], typo)):
        data = {part: data}
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(cls, path, check_paths=False)
    dotted = ".".join((*loc[:-1], typo))
    found = [p for p in caught.value.problems if f"unknown key {dotted!r}" in p.what]
    assert found and found[0].where.rsplit(":", 1)[1] == str(len(loc)), caught.value
    return found[0].fix


def test_one_edit_of_every_key_gets_the_right_suggestion(tmp_path: Path) -> None:
    draw, right, wrong = random.Random(10), 0, []
    for name, loc in KEYS:
        typo = loc[-1]
        siblings = {other[-1] for n, other in KEYS if n == name and other[:-1] == loc[:-1]}
        while typo in siblings or not typo:
            typo = edits(loc[-1], draw)
        fix = suggestion(CLASSES[name], loc, typo, tmp_path / "c.yaml")
        if fix == f"did you mean {loc[-1]!r}?":
            right += 1
        else:
            wrong.append((name, ".".join(loc), typo, fix))
    assert right >= 0.95 * len(KEYS), (right, len(KEYS), wrong)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.sampled_from(["5e-5", "no", "08", "${x}", "~", "hf_" + "a" * 20])
trees = st.recursive(scalars, lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=6), child, max_size=3), max_leaves=6)


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(CLASSES)))
    out: dict[str, Any] = {}
    for loc in draw(st.lists(st.sampled_from([loc for n, loc in KEYS if n == name]), max_size=5)):
        node = out
        for part in loc[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        else:
            node[loc[-1]] = draw(trees)
    for key, value in draw(st.dictionaries(st.text(max_size=5), trees, max_size=2)).items():
        out[key] = value
    return name, out


def check(case: tuple[str, dict[str, Any]], folder: Path) -> None:
    name, data = case
    path = folder / "c.yaml"
    try:
        path.write_text(yaml.dump(data, allow_unicode=True), encoding="utf-8")
    except UnicodeEncodeError:
        return
    try:
        load(CLASSES[name], path)
    except ConfigError as error:
        assert error.problems and all(p.where and p.what for p in error.problems) and str(error)


@given(configs())
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_config_is_valid_or_a_list_of_problems(tmp_path_factory: pytest.TempPathFactory, case: tuple[str, dict[str, Any]]) -> None:
    check(case, tmp_path_factory.getbasetemp())


@pytest.mark.exhaustive
@given(configs())
@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_two_thousand_configs(tmp_path_factory: pytest.TempPathFactory, case: tuple[str, dict[str, Any]]) -> None:
    check(case, tmp_path_factory.getbasetemp())
