"""Which number format a run computes in, by what the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from self_model_sop.train import machine, plan
from self_model_sop.train.precision import Mode, choose

INTEL, EPYC, OLD = "avx512f amx_bf16 avx512_bf16 amx_tile", "avx512f avx512_bf16", "avx2 avx512f avx512_vnni"


def _with_flags(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu vme {flags} end\n")
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / "cpuinfo" if name == "/proc/cpuinfo" else Path(name))


@pytest.mark.parametrize(
    ("flags", "wanted", "given", "mode", "words"),
    [
        (INTEL, "auto", {}, "bf16", "AMX"),
        (EPYC, "auto", {}, "bf16", "AVX-512 BF16"),
        (OLD, "auto", {}, "fp32", "no instructions for bf16"),
        (OLD, "auto", {"fp16": True}, "fp32", "fp16 was asked for"),
        (EPYC, "auto", {"fp16": True}, "bf16", "fp16 was asked for"),
        (OLD, "auto", {"bf16": True}, "bf16", "fp32 is faster here"),
        (EPYC, "fp32", {"bf16": True}, "fp32", "asked for"),
    ],
)
def test_on_a_cpu(flags: str, wanted: Mode, given: dict[str, bool], mode: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_flags(flags, tmp_path, monkeypatch)
    chosen = choose(wanted, {**given, "use_cpu": True})
    assert chosen.mode == mode and words in chosen.reason


def test_the_plan_expects_what_the_run_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from self_model_sop.train.sft import STAGE
    from tiny_runs import chats, config_of, sft_settings

    monkeypatch.setattr(machine, "gpus", list)
    config = config_of(STAGE, {**sft_settings(tmp_path, chats(tmp_path / "c.jsonl"), tmp_path / "out"), "precision": "auto"})
    for flags in (INTEL, EPYC, OLD):
        _with_flags(flags, tmp_path, monkeypatch)
        assert plan._half(config) is (choose("auto", {"use_cpu": True}).mode != "fp32")
