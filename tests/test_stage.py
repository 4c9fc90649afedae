"""The stage protocol: do, skip, refuse, resume; and the command line around it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import light_stages
from light_stages import JOIN, WRITE, JoinConfig, WriteConfig
from self_model_sop import artifact, errors, stages
from self_model_sop.artifact import Target
from self_model_sop.data import process
from self_model_sop.errors import SopError
from self_model_sop.stage import Run, fingerprint_of, guarded, parse_arguments, stage_main

LIGHT = Path(light_stages.__file__)


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "STAGES", stages.STAGES)
    light_stages.add_to_table()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_the_manifest_says_everything(out: Path, tmp_path: Path) -> None:
    (tmp_path / "head.txt").write_text("h")
    done = WRITE.run(WriteConfig(output_dir=out, source=tmp_path / "head.txt", seed=7), pipeline="p")
    m = json.loads((out / "manifest.json").read_text())
    assert m == done.manifest and not done.skipped and done.path == out and done.stats["rows"] == 3
    assert (m["schema"], m["stage"], m["status"], m["pipeline"], m["seed"], m["code"]["stage"]) == (1, "data.write", "complete", "p", 7, 1)
    assert m["config"]["lines"] == 3 and "output_dir" not in m["config"] and m["paths"]["output_dir"] == str(out)
    assert m["inputs"]["source"]["path"] == str(tmp_path / "head.txt") and len(m["inputs"]["source"]["sha256"]) == 64
    assert m["outputs"][0]["rows"] == 3 and m["seconds"] >= 0 and m["libraries"]["python"] and m["peak_memory_mib"] > 1 and m["started"].endswith("Z")
    assert m["fingerprint"] == fingerprint_of(m)


def test_same_question_is_answered_from_disk(out: Path) -> None:
    first = WRITE.run(WriteConfig(output_dir=out))
    again = WRITE.run(WriteConfig(output_dir=out, pause=0.001, note="cosmetic"))
    assert again.skipped and again.manifest == first.manifest
    assert not WRITE.run(WriteConfig(output_dir=out), again=True).skipped


def test_another_question_is_refused_with_what_differs(out: Path) -> None:
    WRITE.run(WriteConfig(output_dir=out))
    other = WriteConfig(output_dir=out, lines=4)
    with pytest.raises(SopError) as caught:
        WRITE.run(other)
    assert caught.value.code == errors.USAGE and "lines: 3 -> 4" in str(caught.value) and "--overwrite" in str(caught.value)
    assert WRITE.why(other) == "lines: 3 -> 4"
    WRITE.run(other, overwrite=True)
    assert WRITE.why(other) == "" and WRITE.run(other).skipped


def test_changed_input_edited_output_new_version_and_other_stage(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "s.txt"
    source.write_text("1")
    config = WriteConfig(output_dir=out, source=source)
    WRITE.run(config)
    source.write_text("2")
    with pytest.raises(SopError, match="contents of input source"):
        WRITE.run(config)
    source.write_text("1")
    assert WRITE.run(config).skipped, "the bytes are the same again, whatever the time says"
    (out / "data.jsonl").write_text("edited")
    with pytest.raises(SopError, match=r"no longer match its manifest: data\.jsonl: changed") as caught:
        WRITE.run(config)
    assert caught.value.code == errors.DATA
    WRITE.run(config, overwrite=True)
    with pytest.raises(SopError, match="stage code version: 1 -> 2"):
        dataclasses.replace(WRITE, version=2).run(config)
    with pytest.raises(SopError, match=r"stage: data\.write -> data\.join"):
        JOIN.run(JoinConfig(input=(source,), output_dir=out))


def test_uses_limits_what_reruns(out: Path) -> None:
    stage = dataclasses.replace(WRITE, uses=("lines", "output_dir"))
    stage.run(WriteConfig(output_dir=out))
    assert stage.run(WriteConfig(output_dir=out, word="other")).skipped
    with pytest.raises(SopError):
        stage.run(WriteConfig(output_dir=out, lines=9))


def test_a_failure_leaves_the_old_artifact(out: Path) -> None:
    before = WRITE.run(WriteConfig(output_dir=out))
    with pytest.raises(SopError, match="asked to fail"):
        WRITE.run(WriteConfig(output_dir=out, word="fail"), overwrite=True)
    assert WRITE.run(WriteConfig(output_dir=out)).manifest == before.manifest
    assert sorted(p.name for p in out.iterdir()) == ["data.jsonl", "manifest.json"], "the next run swept the debris"


def resumable(counts: list[int], fail: bool) -> Callable[[Run[WriteConfig]], dict[str, Any]]:
    def build(run: Run[WriteConfig]) -> dict[str, Any]:
        path = run.work / "checkpoints/1/COMPLETE.json"
        counts.append(int(path.exists()))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        if fail:
            raise KeyboardInterrupt
        (run.work / "model.txt").write_text("done")
        return {}

    return build


def test_a_resumable_stage_goes_on_and_is_never_swept_by_another(out: Path) -> None:
    seen: list[int] = []
    stage = dataclasses.replace(WRITE, resumable=True, build=resumable(seen, fail=True))
    with pytest.raises(KeyboardInterrupt):
        stage.run(WriteConfig(output_dir=out))
    with pytest.raises(SopError, match="interrupted run with complete checkpoints") as caught:
        stage.run(WriteConfig(output_dir=out, lines=5))
    assert "lines: 3 -> 5" in str(caught.value) and caught.value.code == errors.USAGE
    dataclasses.replace(stage, build=resumable(seen, fail=False)).run(WriteConfig(output_dir=out))
    assert seen == [0, 1], "the second run found the checkpoint of the first"


def test_overwrite_drops_the_interrupted_run(out: Path) -> None:
    seen: list[int] = []
    stage = dataclasses.replace(WRITE, resumable=True, build=resumable(seen, fail=True))
    with pytest.raises(KeyboardInterrupt):
        stage.run(WriteConfig(output_dir=out))
    dataclasses.replace(stage, build=resumable(seen, fail=False)).run(WriteConfig(output_dir=out, lines=5), overwrite=True)
    assert seen == [0, 0] and not list(out.glob(".work*"))


def test_secrets_do_not_reach_the_manifest(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-without-a-shape")
    WRITE.run(WriteConfig(output_dir=out, note="a-secret-without-a-shape", word="hf_" + "x1" * 12))
    assert "a-secret" not in (out / "manifest.json").read_text() and "x1x1" not in (out / "manifest.json").read_text()
    assert WRITE.run(WriteConfig(output_dir=out, word="hf_" + "x1" * 12)).skipped


# --- the command line


def sop(*argv: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(LIGHT), *argv], cwd=cwd, capture_output=True, text=True, check=False, **options)


def test_from_the_command_line(tmp_path: Path) -> None:
    done = sop("data", "write", "--lines", "4", "word=x", "--output_dir", "there", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "4 rows" and done.stdout.splitlines()[2] == "next: sop data join"
    assert "data.write: done in" in done.stdout and (tmp_path / "there/data.jsonl").is_file()
    assert "up to date" in sop("data", "write", "lines=4", "word=x", "output_dir=there", cwd=tmp_path).stdout


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = sop("data", "write", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "writes 3 lines" in done.stdout and list(tmp_path.iterdir()) == []
    assert sop("data", "write", "--dry_run", "lines=-1", cwd=tmp_path).returncode == errors.USAGE


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["lines=x"], errors.USAGE, "expected integer"), (["--lines", "x"], errors.USAGE, "--lines: lines: expected integer"),
        (["lines=-1"], errors.USAGE, "must not be negative; write 0 or more"),
        (["--config", "gone.yaml"], errors.USAGE, "no such config file"), (["word=fail"], errors.DATA, "asked to fail"),
        (["source=gone"], errors.USAGE, "no such file or folder"),
        (["output_dir=/proc/nowhere"], errors.USAGE, "/proc/nowhere"), (["lnies=3"], errors.USAGE, "did you mean 'lines'?"),
    ],
)  # fmt: skip
def test_exit_codes(tmp_path: Path, argv: list[str], code: int, text: str) -> None:
    done = sop("data", "write", *argv, cwd=tmp_path)
    assert done.returncode == code and text in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and not done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, errors.SIGTERM), (signal.SIGINT, errors.SIGINT)])
def test_signals_end_with_their_code_and_the_next_run_is_clean(tmp_path: Path, number: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, str(LIGHT), "data", "write", "files=200", "pause=0.05"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background hands on that SIGINT is ignored
    )  # fmt: skip
    while not list(tmp_path.glob("out/.work*/part/002*")):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and "Traceback" not in err and "finished work is kept" in err
    assert not (tmp_path / "out/manifest.json").exists()
    assert sop("data", "write", "files=2", cwd=tmp_path).returncode == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "part"]


def test_a_bug_is_called_one_and_shows_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "s3cr3t-value")

    def work() -> int:
        raise KeyError("with s3cr3t-value")

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert guarded(work) == errors.BUG
    finally:
        signal.signal(signal.SIGTERM, before)
    err = capsys.readouterr().err
    assert "Traceback" in err and "please report" in err and "s3cr3t" not in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), errors.ENVIRONMENT), (ModuleNotFoundError("no", name="bitsandbytes.nn"), errors.ENVIRONMENT), (OSError(28, "No space left", "x"), errors.DISK),
        (BrokenPipeError(), errors.OK), (PermissionError(13, "denied", "x"), errors.USAGE), (ModuleNotFoundError("no", name="self_model_sop.gone"), errors.BUG),
    ],
)
def test_errors_of_the_system(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise error

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert guarded(work) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ("Traceback" in capsys.readouterr().err) == (code == errors.BUG)


def test_flags_and_overrides_in_any_order() -> None:
    args, settings = parse_arguments(WRITE, ["word=a", "--lines", "5", "note=b", "--overwrite"])
    assert args.overwrite and [(s.key, s.value) for s in settings] == [("lines", 5), ("word", "a"), ("note", "b")]


def test_a_flag_of_several_values_takes_no_override() -> None:
    argv = ["--input", "a.jsonl", "odd=name.jsonl", "process.min_chars=2", "--subdir", "pretrain", "--input_typo=1"]
    _, settings = parse_arguments(process.STAGE, argv[:-1])
    assert {s.key: s.value for s in settings} == {"input": ["a.jsonl", "odd=name.jsonl"], "process.min_chars": 2, "subdir": "pretrain"}
    _, settings = parse_arguments(process.STAGE, ["--input", "process.min_chars=2"])
    assert {s.key: s.value for s in settings} == {"input": ["process.min_chars=2"]}, "a file may have such a name"


def test_run_from_python_and_from_the_command_line_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert stage_main(WRITE, ["output_dir=a"]) == errors.OK
    finally:
        signal.signal(signal.SIGTERM, before)
    WRITE.run(WriteConfig(output_dir=tmp_path / "b"))
    one, two = (artifact.read_manifest(Target(tmp_path / name).manifest) for name in "ab")
    assert one and two and one["fingerprint"] == two["fingerprint"] and artifact.content_hash(one) == artifact.content_hash(two)


def test_broken_stdout_is_no_error(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([sys.executable, str(LIGHT), "data", "write"], cwd=tmp_path, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak can be started anew on Linux only")
def test_peak_memory_is_that_of_the_stage(tmp_path: Path) -> None:
    def large(run: Run[WriteConfig]) -> dict[str, Any]:
        return {"bytes": len(bytearray(200 << 20))}

    first = dataclasses.replace(WRITE, build=large).run(WriteConfig(output_dir=tmp_path / "one"))
    second = WRITE.run(WriteConfig(output_dir=tmp_path / "two"))
    assert first.manifest["peak_memory_mib"] - second.manifest["peak_memory_mib"] > 100
