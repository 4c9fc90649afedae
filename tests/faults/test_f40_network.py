"""F40, F41, F43, F44: what the network and the hub do wrong; the real client against a server that misbehaves on command."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hub_server import HubServer, jsonl
from self_model_sop.artifact import files_below
from self_model_sop.data.fetch import STAGE, Config
from self_model_sop.errors import NETWORK, USAGE, SopError
from self_model_sop.hub import MAX_RETRIES, HubConfig, resolve_model

NAME = "owner/data"
ROWS = [{"id": i, "text": f"{random.Random(i).getrandbits(8000):x}"} for i in range(600)]  # 1.2 MB: two blocks
LARGE = "data/train.jsonl.gz"
INFO, HEAD, FILE, CDN = r"^/api/datasets/owner/data$", r"/resolve/", r"/resolve/.*train", r"^/cdn/"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The test does not sleep; the seconds that it would have slept are recorded. Threads that earlier tests left behind go on as before."""
    slept: list[float] = []
    real = time.sleep

    def sleep(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            slept.append(seconds)
        else:
            real(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr("self_model_sop.repository._TIMEOUT", 0.3)
    constants = pytest.importorskip("huggingface_hub.constants")
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.3)
    return slept


def fetch(hub: HubServer, tmp_path: Path, **options: Any) -> list[Any]:
    where = HubConfig(endpoint=hub.url, cache_dir=tmp_path / "cache")
    STAGE.run(Config(dataset_name=NAME, output_dir=tmp_path / "out", huggingface=where, **options))
    return [json.loads(line) for line in (tmp_path / "out" / "owner_data__train.jsonl").read_text().splitlines()]


PASSING = {
    "info-429": ("GET", INFO, {"status": 429}), "info-500": ("GET", INFO, {"status": 500}), "info-502": ("GET", INFO, {"status": 502, "times": 3}),
    "info-503": ("GET", INFO, {"status": 503, "times": 5}), "info-504": ("GET", INFO, {"status": 504}), "info-408": ("GET", INFO, {"status": 408}),
    "info-reset": ("GET", INFO, {"reset_after": 0}), "info-cut": ("GET", INFO, {"reset_after": 20, "times": 2}), "info-timeout": ("GET", INFO, {"stall": 1.0}),
    "info-retry-after": ("GET", INFO, {"status": 429, "headers": {"Retry-After": "7"}}),
    "head-429": ("HEAD", HEAD, {"status": 429}), "head-503": ("HEAD", HEAD, {"status": 503, "times": 2}), "head-timeout": ("HEAD", HEAD, {"stall": 1.0}),
    "file-429": ("GET", FILE, {"status": 429, "times": 2}), "file-500": ("GET", FILE, {"status": 500}), "file-503": ("GET", FILE, {"status": 503, "times": 3}),
    "file-reset-0": ("GET", FILE, {"reset_after": 0}), "file-reset-1k": ("GET", FILE, {"reset_after": 1000}),
    "file-reset-twice": ("GET", FILE, {"reset_after": 70_000, "times": 2}),
    "file-short": ("GET", FILE, {"short_by": 1}), "file-short-twice": ("GET", FILE, {"short_by": 5000, "times": 2}), "file-timeout": ("GET", FILE, {"stall": 1.0}),
}  # fmt: skip


# under a limit ranges are read, which need no HEAD
@pytest.mark.parametrize(("script", "limit"), [(s, n) for s in PASSING for n in (None, 550) if not (n and s.startswith("head"))])
def test_f40_what_passes_is_waited_out(hub: HubServer, tmp_path: Path, waits: list[float], script: str, limit: int | None) -> None:
    hub.add("dataset", NAME, {"train.jsonl": jsonl(ROWS)})
    method, path, what = PASSING[script]
    fault = hub.misbehave(method, path, **what)
    assert fetch(hub, tmp_path, sample_limit=limit) == ROWS[:limit]
    assert fault.times == 0
    if script not in ("info-timeout", "head-timeout", "file-timeout") and script.startswith("info"):
        assert len(waits) >= what.get("times", 1)
    if script == "info-retry-after":
        assert max(waits) >= 7


@pytest.mark.parametrize("what", [{"status": 503}, {"reset_after": 30_000}, {"short_by": 100}], ids=["503", "reset", "short"])
def test_f40_the_same_behind_a_redirect(hub: HubServer, tmp_path: Path, waits: list[float], what: dict[str, Any]) -> None:
    import gzip

    hub.add("dataset", NAME, {LARGE: gzip.compress(jsonl(ROWS), 1)})
    hub.misbehave("GET", CDN, times=2, **what)
    assert fetch(hub, tmp_path) == ROWS


@pytest.mark.parametrize(("limit", "at"), [(None, 10 << 20), (5500, 5 << 20)], ids=["whole", "limited"])
def test_f40_a_broken_transfer_goes_on_where_it_stopped(hub: HubServer, tmp_path: Path, waits: list[float], limit: int | None, at: int) -> None:
    rows = [{**row, "n": i} for i in range(10) for row in ROWS]
    data = jsonl(rows)
    assert len(data) > 11 << 20
    hub.add("dataset", NAME, {"train.jsonl": data})
    if limit:
        hub.misbehave("GET", FILE, times=5)  # five blocks arrive as they should
    hub.misbehave("GET", FILE, reset_after=len(data) - 1000 if limit is None else 1000)
    assert fetch(hub, tmp_path, sample_limit=limit) == rows[:limit]
    after = f"bytes={at}-"
    assert any(after in r for r in hub.requests)
    assert hub.sent < len(data) * 1.2


@pytest.mark.parametrize("limit", [None, 5], ids=["whole", "limited"])
@pytest.mark.parametrize(
    ("path", "what", "says"),
    [
        (INFO, {"status": 503}, "503"), (INFO, {"status": 429}, "429"), (INFO, {"status": 500}, "500"), (INFO, {"reset_after": 0}, "cannot be fetched"),
        (FILE, {"status": 502}, "502"), (FILE, {"status": 429}, "429"), (FILE, {"reset_after": 0}, "cannot be fetched"), (FILE, {"short_by": 9}, "cannot be fetched"),
    ],
    ids=["info-503", "info-429", "info-500", "info-reset", "file-502", "file-429", "file-reset", "file-short"],
)  # fmt: skip
def test_f40_what_does_not_pass_ends_with_advice(hub: HubServer, tmp_path: Path, waits: list[float], path: str, what: dict[str, Any], says: str, limit: int | None) -> None:
    hub.add("dataset", NAME, {"train.jsonl": jsonl(ROWS)})
    hub.misbehave("GET", path, times=10_000, **what)
    with pytest.raises(SopError, match=says) as caught:
        fetch(hub, tmp_path, sample_limit=limit)
    assert caught.value.code == NETWORK
    assert "hf-mirror.com" in str(caught.value)
    assert "--local_files_only" in str(caught.value)
    assert not files_below(tmp_path / "out")


def test_f40_back_off_grows_with_jitter_and_stops_after_five(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    hub.add("dataset", NAME, {"train.jsonl": jsonl(ROWS)})
    hub.misbehave("GET", INFO, times=10_000, status=503)
    with pytest.raises(SopError, match="gave up"):
        fetch(hub, tmp_path)
    assert len(waits) == MAX_RETRIES == 5
    assert all(2**i * 0.5 <= wait <= 2**i for i, wait in enumerate(waits))
    assert len(hub.requests) == 6


def test_f40_nobody_listens(tmp_path: Path, waits: list[float]) -> None:
    where = HubConfig(endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "cache")
    with pytest.raises(SopError, match=r"cannot be fetched from http://127\.0\.0\.1:9") as caught:
        STAGE.run(Config(dataset_name=NAME, output_dir=tmp_path / "out", huggingface=where))
    assert caught.value.code == NETWORK


# --- F41: wrong bytes -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["train.jsonl", "train.jsonl.gz", "data/train.parquet"])
def test_f41_other_bytes_than_declared_are_refused(hub: HubServer, tmp_path: Path, waits: list[float], path: str) -> None:
    hub.add("dataset", NAME, {path: jsonl(ROWS)})
    hub.misbehave("GET", r"/(resolve|at)/.*train\.", flip=True, times=1 if path == "train.jsonl" else 2)
    with pytest.raises(SopError, match="other bytes arrived") as caught:
        fetch(hub, tmp_path)
    assert caught.value.code == NETWORK
    assert not files_below(tmp_path / "out")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and "blobs" in p.parts and p.stat().st_size > 1000]


def test_f41_a_refused_file_is_fetched_anew(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    hub.add("dataset", NAME, {"train.jsonl": jsonl(ROWS)})
    hub.misbehave("GET", FILE, flip=True)
    with pytest.raises(SopError, match="refused"):
        fetch(hub, tmp_path)
    assert fetch(hub, tmp_path) == ROWS


def test_f41_wrong_weights_are_refused(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    hub.add("model", "a/model", {"config.json": b"{}", "model.safetensors": b"0" * 5000})
    hub.misbehave("GET", r"/cdn/.*safetensors", flip=True)
    with pytest.raises(SopError, match="other bytes arrived"):
        resolve_model("a/model", HubConfig(endpoint=hub.url, cache_dir=tmp_path))


# --- F43: who may read --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name", "code", "says", "advice"),
    [
        ({}, "owner/dta", NETWORK, "401: it does not exist, or it is private", "check the spelling"),
        ({"private": True}, NAME, NETWORK, "401: it does not exist, or it is private", "HF_TOKEN"),
        ({"gated": True}, NAME, NETWORK, "gated", "accept"),
    ],
)
def test_f43_missing_private_and_gated(hub: HubServer, tmp_path: Path, options: dict[str, Any], name: str, code: int, says: str, advice: str) -> None:
    hub.add("dataset", NAME, {"train.jsonl": jsonl(ROWS)}, **options)
    with pytest.raises(SopError, match=says) as caught:
        STAGE.run(Config(dataset_name=name, output_dir=tmp_path / "out", huggingface=HubConfig(endpoint=hub.url, cache_dir=tmp_path / "cache")))
    assert caught.value.code == code
    assert advice in str(caught.value)
    assert len(hub.requests) == 1, "no retry, and no other name is tried"


@pytest.mark.parametrize(("status", "code", "says"), [(404, USAGE, "404: no such"), (403, NETWORK, "403: this token"), (401, NETWORK, "401")])
def test_f43_other_refusals_are_told_apart(hub: HubServer, tmp_path: Path, status: int, code: int, says: str) -> None:
    hub.misbehave("GET", "/api/", status=status)
    with pytest.raises(SopError, match=says) as caught:
        fetch(hub, tmp_path)
    assert caught.value.code == code


# --- F44: a moving dataset -----------------------------------------------------------------------------------------------------------------------------------


def test_f44_the_commit_is_pinned_and_a_move_is_told(hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = hub.add("dataset", NAME, {"train.jsonl": jsonl(ROWS[:5])})
    fetch(hub, tmp_path)
    second = hub.add("dataset", NAME, {"train.jsonl": jsonl(ROWS[:6])})
    manifest = json.loads((tmp_path / "out" / "owner_data.manifest.json").read_text())
    assert manifest["stats"]["commit"] == first
    assert len(fetch(hub, tmp_path, force_download=True)) == 6
    assert f"upstream moved {first[:12]} -> {second[:12]}" in capfd.readouterr().err
    manifest = json.loads((tmp_path / "out" / "owner_data.manifest.json").read_text())
    assert manifest["stats"]["upstream_moved"] == f"upstream moved {first[:12]} -> {second[:12]}"


def test_f44_a_commit_that_moves_between_listing_and_reading_changes_nothing(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("dataset", NAME, {"train.jsonl": jsonl(ROWS[:5])})
    from self_model_sop import repository

    original = repository.download

    def move_then_download(*args: Any, **options: Any) -> Path:
        hub.add("dataset", NAME, {"train.jsonl": jsonl(ROWS[:6])})
        return original(*args, **options)

    monkeypatch.setattr(repository, "download", move_then_download)
    assert fetch(hub, tmp_path) == ROWS[:5]
