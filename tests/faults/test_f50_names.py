"""F50, F51: names from outside never lead out of the output folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_server import HubServer, jsonl
from self_model_sop.artifact import sha256_file
from self_model_sop.data import fetch
from self_model_sop.data.fetch import STAGE, Config
from self_model_sop.errors import USAGE, SopError
from self_model_sop.hub import HubConfig
from self_model_sop.names import MAX_BYTES, safe_name, safe_relative

DATASET_NAMES = [
    "../../x", "../x", "..", ".", "a/../../b", "a/..", "/etc/passwd", "/nonexistent/x", "//x/y", "~/x", "~root/x", "a/b/c", "a/b/../../c", "./x", "a//b", "/", "", " ", "a b",
    "a/ b", "a\\..\\b", "C:\\x", "a:b", "x\0y", "a/\0", "x\ny", "x\ry", "x\ty", "\u202egpj.x", "a/\u200b", "a\u2215b", "a\uff0fb", "\uff0e\uff0e/x", "a/\u2024\u2024",
    "..\u2044x", "x" * 300, "a/" + "b" * 300, "-rf", "--help-me/x", "a/-b/..", "%2e%2e/x", "..%2fx", "$HOME/x", "${HOME}", "`id`", "a;b", "a|b", "a>b", "file:///etc/passwd",
    "hf://datasets/x/y", "https://x.y/z", "nul\\x", "a/b@main", "a/b#c", "*", "a/*",
]  # fmt: skip
SUBDIRS = [
    "../..", "..", ".", "/tmp", "a/../..", "a/./b", "~", "~/x", "a\\b", "x\0", "a/\u202e", "\uff0e\uff0e", "con", "a/NUL.txt", "..%2f/..", " ", "/", "a/b/../../../c",
    "a\nb", "a:b",
]  # fmt: skip


def snapshot(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with something to lose around the output folder."""
    for name in ("x", "c.jsonl", "keep/b.txt", "work/mine.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "work" / "config").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "keep"))
    return tmp_path


def test_there_are_enough_of_them() -> None:
    assert len(DATASET_NAMES) + len(SUBDIRS) >= 60


@pytest.mark.parametrize("name", DATASET_NAMES, ids=ascii)
def test_f50_dataset_names(outside: Path, name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = snapshot(outside)
    code = fetch.main([f"--dataset_name={name}", "--output_dir", "out", "--sample_limit", "1", "--local_files_only"])
    error = capfd.readouterr().err
    assert "Traceback" not in error
    after = {k: v for k, v in snapshot(outside).items() if not k.startswith("work/out/")}
    assert {k: v for k, v in after.items() if not k.startswith("keep/.cache")} == before
    assert code != 0
    assert error.strip()


@pytest.mark.parametrize("subdir", SUBDIRS, ids=ascii)
def test_f50_subfolders(outside: Path, subdir: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(outside)
    assert fetch.main(["--dataset_name", "a/b", f"--data_subdir={subdir}", "--output_dir", "out"]) == USAGE
    assert "data_subdir" in capfd.readouterr().err
    assert snapshot(outside) == before
    with pytest.raises(SopError):
        safe_relative(subdir, "data_subdir")


CARDS: list[tuple[str, dict[str, Any]]] = [
    ("split", {"split": "../../evil", "path": "train.jsonl"}), ("split", {"split": "/abs", "path": "train.jsonl"}), ("split", {"split": "a/b", "path": "train.jsonl"}),
    ("path", {"split": "train", "path": "../../../etc/*"}), ("path", {"split": "train", "path": "/etc/passwd"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "files"), CARDS)
def test_f50_what_the_dataset_itself_names(hub: HubServer, outside: Path, kind: str, files: dict[str, Any]) -> None:
    import yaml

    card = "---\n" + yaml.safe_dump({"configs": [{"config_name": "default", "data_files": [files]}]}) + "---\n"
    hub.add("dataset", "a/b", {"README.md": card.encode(), "train.jsonl": jsonl([{"a": 1}])})
    before = snapshot(outside)
    STAGE.run(Config(dataset_name="a/b", output_dir=outside / "work" / "out", huggingface=HubConfig(endpoint=hub.url, cache_dir=outside / "keep" / ".cache")))
    assert {k: v for k, v in snapshot(outside).items() if not k.startswith(("work/out/", "keep/.cache"))} == before
    assert [len(p.relative_to(outside / "work" / "out").parts) for p in (outside / "work" / "out").glob("**/*.jsonl")] == [1]


@pytest.mark.parametrize("path", ["../train.jsonl", "a/../../train.jsonl", "/train.jsonl", "..\\train.jsonl"])
def test_f50_files_of_a_hostile_listing(hub: HubServer, outside: Path, path: str) -> None:
    hub.add("dataset", "a/b", {"ok.jsonl": jsonl([{"a": 1}]), path: jsonl([{"evil": 1}])})
    before = snapshot(outside)
    with contextlib.suppress(SopError):
        STAGE.run(Config(dataset_name="a/b", output_dir=outside / "work" / "out", huggingface=HubConfig(endpoint=hub.url, cache_dir=outside / "keep" / ".cache")))
    after = snapshot(outside)
    assert {k: v for k, v in after.items() if not k.startswith(("work/out/", "keep/.cache"))} == before
    assert not [k for k in after if k.endswith("train.jsonl") and not k.startswith(("work/out/a_b__", "keep/.cache/hub/datasets--a--b/"))]


@given(st.text(max_size=400))
def test_f50_safe_name_is_one_harmless_component(text: str) -> None:
    name = safe_name(text)
    assert name not in ("", ".", "..")
    assert not set(name) & set('/\\:*?"<>|\0\n')
    assert name.isprintable()
    assert not name.startswith((".", "-", "~", " "))
    assert len(name.encode()) <= MAX_BYTES
    assert safe_name(name) == name
    assert Path(name).name == name


@pytest.mark.parametrize("name", ["shibing624_medical", "高血压（一）.jsonl", "a b+c.json", "x.tar", "été", "データ-1"])
def test_f50_ordinary_names_stay(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize(("name", "safe"), [("con", "_con"), ("NUL.txt", "_NUL.txt"), ("a/b", "a_b"), ("..", "_"), ("\u202ex", "_x"), ("a\uff0fb", "a_b"), ("", "_"), ("x.", "x_")])
def test_f50_the_others_are_changed(name: str, safe: str) -> None:
    assert safe_name(name) == safe


# --- F51 ------------------------------------------------------------------------------------------------------------------------------------------------


def test_f51_an_output_folder_that_is_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "x.jsonl").write_bytes(b"{}\n")
    STAGE.run(Config(dataset_name=str(tmp_path / "x.jsonl"), output_dir=tmp_path / "link"))
    assert (tmp_path / "real" / "x.jsonl").read_bytes() == b"{}\n"


def test_f51_a_subfolder_that_links_outwards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pretrain").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "x.jsonl").write_bytes(b"{}\n")
    with pytest.raises(SopError, match="outside of the output folder"):
        STAGE.run(Config(dataset_name=str(tmp_path / "x.jsonl"), data_subdir="pretrain", output_dir=tmp_path / "out"))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_f51_output_over_the_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n')
    with pytest.raises(SopError, match="in the way"):
        STAGE.run(Config(dataset_name=str(tmp_path / "x.jsonl"), output_dir=tmp_path, sample_limit=1))
    assert (tmp_path / "x.jsonl").read_bytes() == b'{"a": 1}\n'
