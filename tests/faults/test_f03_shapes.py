"""F03: rows of every wrong shape are quarantined with a reason, without a traceback and in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from self_model_sop.data import process
from self_model_sop.data.process import Config, ProcessConfig
from self_model_sop.data.records import dumps, read

SHAPES: list[tuple[str, str]] = [
    ("null", "not_an_object"),
    ("[]", "not_an_object"),
    ("3", "not_an_object"),
    ('"text"', "not_an_object"),
    ("true", "not_an_object"),
    ("{", "bad_json"),
    ("{}}", "bad_json"),
    ("{'text': 'x'}", "bad_json"),
    ('{"text": "x",}', "bad_json"),
    ('{"text": "a\tb"}', "bad_json"),
    ('{"text": 01}', "bad_json"),
    ('{"n": ' + "9" * 10_000 + "}", "bad_json"),
    ('{"text": "x"} {"text": "y"}', "bad_json"),
    ("\ufeff{}", "bad_json"),
    ('{"text": NaN}', "not_finite"),
    ('{"text": "x", "score": Infinity}', "not_finite"),
    ('{"text": "x", "score": -1e400}', "not_finite"),
    ("[" * 100_000 + "]" * 100_000, "too_deep"),
    ('{"text":' * 100_000 + "1" + "}" * 100_000, "too_deep"),
    ('{"a":' * 150 + "1" + "}" * 150, "too_deep"),
    ('{"text": "x\\ud800"}', "lone_surrogate"),
    ('{"x\\udfff": 1, "text": "y"}', "lone_surrogate"),
    ('{"text": "x\\u0000"}', "nul"),
    ('{"text": "x\0"}', "bad_json"),
    ('{"text": null}', "not_text"),
    ('{"text": 3}', "not_text"),
    ('{"text": ["a"]}', "not_text"),
    ('{"text": {"a": "b"}}', "not_text"),
    ('{"text": true}', "not_text"),
    ("{}", "unknown_format"),
    ('{"": ""}', "unknown_format"),
    ('{"a": {"text": "x"}}', "unknown_format"),
    ('{"instruction": "x", "output": null}', "not_text"),
    ('{"instruction": ["x"], "output": "y"}', "not_text"),
    ('{"instruction": "x", "input": 5, "output": "y"}', "not_text"),
    ('{"conversations": [1]}', "bad_turn"),
    ('{"conversations": [{"from": "human", "value": {"a": 1}}]}', "not_text"),
    ('{"messages": [{"role": "user"}]}', "not_text"),
    ('{"prompt": "x", "chosen": 1, "rejected": "y"}', "not_text"),
    ('{"prompt": 1, "chosen": "x", "rejected": "y"}', "not_text"),
    ('{"prompt": "x", "chosen": [], "rejected": "y"}', "empty_chosen"),
    ('{"question": "x", "options": 3, "A": 1}', "unknown_format"),
]


def test_f03_every_shape_has_its_reason(tmp_path: Path) -> None:
    good = dumps({"text": "一条正常的记录，长度足够。"})
    (tmp_path / "in.jsonl").write_text("\n".join([good, *(line for line, _ in SHAPES)]), encoding="utf-8", newline="\n")
    stats = process.run(Config(input=tmp_path / "in.jsonl", output_dir=tmp_path / "out", subdir="mixed", process=ProcessConfig(max_bad_ratio=1.0))).stats
    assert stats["sets"]["mixed"]["kept"] == 1
    found = [r.row["reason"] for r in read(tmp_path / "out" / "mixed" / "train.rejected.jsonl") if r.row]
    assert list(zip(found, [line[:60] for line, _ in SHAPES], strict=True)) == [(reason, line[:60]) for line, reason in SHAPES]


def test_f03_memory_stays_bounded(tmp_path: Path) -> None:
    """Lines of 10 MB and more, and deep nesting: the process stays below 300 MB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    good = dumps({"text": "一条正常的记录，长度足够。"}).encode()
    with (tmp_path / "in.jsonl").open("wb") as f:
        f.write(good + b"\n")
        f.write(b'{"text": "' + b"a" * 9_500_000 + b'"}\n')
        f.write(b'{"text": "' + b"a" * 11_000_000 + b'"}\n')
        f.write(b'{"text": "' + b"b" * 60_000_000 + b'"}\n')
        f.write(b"[" * 9_000_000 + b"\n")
        f.write(good[:-2] + "！".encode() + b'"}')
    code = (
        "import sys, json, re; from pathlib import Path; from self_model_sop.data import process; p = Path(sys.argv[1]);"
        "done = process.run(process.Config(input=p / 'in.jsonl', output_dir=p / 'out', process=process.ProcessConfig(split_long=False, near_dedup=False, validation_ratio=0.0)));"
        "print(json.dumps([done.stats['sets']['pretrain'], int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stats, kilobytes = json.loads(done.stdout)
    assert stats["quarantined"] == {"line_too_long": 2, "too_deep": 1}
    assert stats["dropped"] == {"too_long": 1}
    assert stats["kept"] == 2
    assert kilobytes < 300_000
