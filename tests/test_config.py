"""Layers of a configuration, paths, validation, and what enters a fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from self_model_sop.config import ConfigError, Setting, comparable, describe, load, option, parse_override, project_root
from self_model_sop.errors import USAGE, SopError
from self_model_sop.hub import HubConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = option(0.5, "a rate")
    kind: Literal["slow", "fast"] = option("slow", "how")
    source: Path | None = option(None, "a file", path="input")


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = option(help="needed")
    count: int = option(3, "how many", flag="--count")
    flag: bool = option(False, "yes or no")
    words: tuple[str, ...] = option((), "words")
    inner: Inner = option(factory=Inner)
    maybe: Inner | None = option(None, "optional part")
    model: str = option("bert-base", "folder or hub id", path="model")
    output_dir: Path = option(Path("out"), "where", path="output")
    threads: int = option(2, "cosmetic", cosmetic=True)
    free: dict[str, Any] = option(help="a free map", factory=dict, keys={"where": "output", "shown": "cosmetic"})
    huggingface: HubConfig = option(factory=HubConfig)

    def __post_init__(self) -> None:
        if self.count > 100:
            raise ValueError("count above 100 needs another tool")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config/model_config").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def file(project: Path, text: str) -> Path:
    path = project / "config/c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def bad(project: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(Config, file(project, text), [parse_override(o) for o in overrides])
    assert caught.value.code == USAGE
    return [str(p) for p in caught.value.problems]


def test_precedence_default_model_config_file_flag_override(project: Path) -> None:
    (project / "config/model_config/config.yaml").write_text("huggingface: {endpoint: https://a, offline: true}\nother: 1\n")
    path = file(project, "name: x\ncount: 4\nhuggingface: {endpoint: https://b}\n")
    loaded = load(Config, path)
    assert (loaded.config.count, loaded.config.huggingface.endpoint, loaded.config.huggingface.offline) == (4, "https://b", True)
    assert loaded.tree.where(("huggingface", "endpoint")) == "config/c.yaml:3"
    assert loaded.tree.where(("huggingface", "offline")) == "config/model_config/config.yaml:1"
    assert load(Config, path, [Setting("count", 5, "--count", project), parse_override("count=6")]).config.count == 6


def test_all_problems_at_once_in_order_of_the_file(project: Path) -> None:
    found = bad(project, "coutn: 3\nflag: yes\ncount: many\ninner:\n  kind: fsat\n  source: config/zzz\ncount: 4\nhf: hf_abcdefghijklmnopqrstuvwx\n")
    assert found == [
        "config/c.yaml:1: missing key 'name'; needed",
        "config/c.yaml:1: unknown key 'coutn'; did you mean 'count'?",
        'config/c.yaml:2: flag: expected boolean, got "yes"; write true or false',
        'config/c.yaml:3: count: expected integer, got "many"; write the number without quotes',
        "config/c.yaml:5: inner.kind: expected 'slow' or 'fast', got \"fsat\"; did you mean 'fast'?",
        "config/c.yaml:6: inner.source: no such file or folder: config/zzz",
        "config/c.yaml:7: count: given twice (first at config/c.yaml:3); keep one of the two",
        "config/c.yaml:8: hf: a secret must not be in a config file (value not shown); remove it, revoke it if it was shared, and set HF_TOKEN in the environment",
        "config/c.yaml:8: unknown key 'hf'; known keys: count, flag, free, huggingface, inner, maybe, model, name, output_dir, threads, words",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\nrate: 0.1\n", "unknown key 'rate'; did you mean 'inner.rate'?"),
        ("name: x\nmaybe: {rat: 0.1}\n", "unknown key 'maybe.rat'; did you mean 'rate'?"),
        ("name: x\nmaybe: {rate: fast}\n", 'maybe.rate: expected number, got "fast"'),
        ("name: 3\n", "name: expected string, got 3"),
        ("name: x\ncount: 3.5\n", "count: expected integer, got 3.5"),
        ("name: x\nwords: one\n", 'words: expected list, got "one"'),
        ("name: x\ninner: 3\n", "inner: expected map, got 3"),
        ("name: x\ninner:\n", "inner: expected map, got null"),
        ("name: x\ncount: 101\n", "count above 100 needs another tool"),
        ("name: x\nhuggingface: {trust_remote_code: true}\n", "no command runs code out of a repository"),
        ("name: x\nCount: 4\n", "unknown key 'Count'; did you mean 'count'?"),
        ("name: x\noutput-dir: y\n", "unknown key 'output-dir'; did you mean 'output_dir'?"),
        ("name: x\nmodel: ./gone\n", "model: no such file or folder: gone"),
        ("name: x\nwords: [a, 3]\n", "words.1: expected string, got 3"),
    ],
)
def test_single_problems(project: Path, text: str, expected: str) -> None:
    found = bad(project, text)
    assert len(found) == 1 and expected in found[0] and found[0].startswith("config/c.yaml:")


def test_a_missing_file_suggests_its_neighbour(project: Path) -> None:
    (project / "corpus.txt").write_text("")
    assert "did you mean 'corpus.txt'?" in bad(project, "name: x\ninner: {source: corpsu.txt}\n")[0]


def test_problems_of_the_command_line_name_it(project: Path) -> None:
    assert bad(project, "name: x\n", "coutn=3", "count=x") == [
        'command line (count=...): count: expected integer, got "x"; write the number without quotes',
        "command line (coutn=...): unknown key 'coutn'; did you mean 'count'?",
    ]
    with pytest.raises(SopError, match="not of the form"):
        parse_override("count")
    with pytest.raises(ConfigError):
        parse_override("count=[1")


def test_relative_paths(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "data.txt").write_text("")
    path = file(project, "name: x\ninner: {source: data.txt}\nmodel: owner/name\nfree: {where: here, other: here}\n")
    (project / "sub/owner/name").mkdir(parents=True)
    (project / "sub/mine.txt").write_text("")
    monkeypatch.chdir(project / "sub")
    c = load(Config, path).config
    assert c.inner.source == project / "data.txt", "YAML: relative to the project root"
    assert c.output_dir == project / "out", "a default: too"
    assert c.model == "owner/name", "no folder of that name at the root: a hub id"
    assert c.free == {"where": str(project / "here"), "other": "here"}
    over = load(Config, path, [parse_override("inner.source=mine.txt"), parse_override("model=owner/name")]).config
    assert over.inner.source == project / "sub/mine.txt", "command line: relative to the working directory"
    assert over.model == str(project / "sub/owner/name")


def test_pending_folders_need_not_exist_yet(project: Path) -> None:
    path = file(project, "name: x\ninner: {source: runs/first/data.txt}\n")
    assert load(Config, path, pending=[project / "runs/first"]).config.inner.source == project / "runs/first/data.txt"
    with pytest.raises(ConfigError):
        load(Config, path, pending=[project / "runs/second"])


def test_an_override_of_a_key_inside_a_map_keeps_the_rest(project: Path) -> None:
    c = load(Config, file(project, "name: x\nfree: {a: 1, b: {c: 2}}\ninner: {rate: 0.1, kind: fast}\n"), [parse_override("free.b.d=3"), parse_override("inner.rate=1e-3")]).config
    assert c.free == {"a": 1, "b": {"c": 2, "d": 3}}
    assert (c.inner.rate, c.inner.kind) == (0.001, "fast")


def test_an_int_is_a_float_but_not_the_other_way_round(project: Path) -> None:
    assert load(Config, file(project, "name: x\ninner: {rate: 2}\n")).config.inner.rate == 2.0


def test_comparable_leaves_out_paths_and_cosmetics(project: Path) -> None:
    (project / "m").mkdir()
    c = load(Config, file(project, "name: x\nmodel: ./m\nthreads: 8\nfree: {where: x, shown: 1, lr: 2}\n")).config
    got = comparable(c)
    assert got["free"] == {"lr": 2} and got["count"] == 3 and got["inner.rate"] == 0.5
    assert not {"model", "output_dir", "threads", "inner.source", "huggingface.endpoint"} & set(got)
    assert comparable(load(Config, file(project, "name: x\n")).config)["model"] == "bert-base", "a hub id is part of the question"
    assert set(comparable(c, ["count", "inner"])) == {"count", "inner.rate", "inner.kind"}


def test_describe_lists_every_key() -> None:
    rows = {key: (kind, default, text) for key, kind, default, text in describe(Config)}
    assert rows["count"] == ("int", "3", "how many")
    assert rows["name"] == ("str", "", "needed")
    assert "inner.rate" in rows and "huggingface.offline" in rows


def test_project_root(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "a/b").mkdir(parents=True)
    monkeypatch.chdir(project / "a/b")
    assert project_root() == project
    assert project_root(project / "config/model_config/config.yaml") == project


def test_no_file_at_all(project: Path) -> None:
    assert load(Config, None, [parse_override("name=x")]).config.count == 3
    with pytest.raises(ConfigError) as caught:
        load(Config, None)
    assert "missing key 'name'" in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Several:
    models: dict[str, str] = option(help="name -> model", path="model", factory=dict)
    texts: dict[str, Path] = option(help="name -> file", path="input", factory=dict)


def test_maps_of_names_to_paths(project: Path) -> None:
    (project / "m").mkdir()
    (project / "t.txt").write_text("")
    c = load(Several, file(project, "models: {a: ./m, b: owner/name}\ntexts: {t: t.txt}\n")).config
    assert c.models == {"a": str(project / "m"), "b": "owner/name"} and c.texts == {"t": project / "t.txt"}
    assert comparable(c) == {"models": {"a": None, "b": "owner/name"}}, "names and hub ids count, places do not"
    with pytest.raises(ConfigError) as caught:
        load(Several, file(project, "texts: {t: t.txt,\n  u: u.txt}\n"))
    assert str(caught.value.problems[0]).startswith("config/c.yaml:2: texts.u: no such file or folder: u.txt")
