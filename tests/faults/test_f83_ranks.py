"""F83: when one rank of a distributed training dies, all stop within a minute."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tiny_models import tiny_qwen
from tiny_runs import chats, sft_settings, torchrun


def test_one_dead_rank_stops_all(tmp_path: Path) -> None:
    """Rank 1 dies in the middle; rank 0 does not wait for ever."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, threading\n"
        "if os.environ.get('RANK') == '1':\n"
        "    threading.Timer(float(os.environ['DIE_AFTER']), lambda: os._exit(9)).start()\n"
    )
    values = sft_settings(tiny_qwen(tmp_path / "model"), chats(tmp_path / "chats.jsonl", 40), tmp_path / "out", training_args__max_steps=100_000, training_args__save_steps=10_000)
    began = time.monotonic()
    done = torchrun(tmp_path, "train sft", values, PYTHONPATH=os.pathsep.join([str(hook), *sys.path]), DIE_AFTER="15")
    assert done.returncode != 0 and time.monotonic() - began < 15 + 60
    assert not (tmp_path / "out" / "manifest.json").exists()
