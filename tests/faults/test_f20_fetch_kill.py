"""F20: kill -9 of `sop data fetch` (from a hub) at any moment: no torn artifact, no lying manifest, no debris, and the same hashes from a rerun."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hub_server import HubServer, jsonl
from killing import Killer
from self_model_sop.artifact import Target, content_hash, differences

GROUP = "owner_data"


def kill_and_rerun(hub: HubServer, folder: Path, points: int, seed: int) -> None:
    draw = random.Random(seed)
    rows = [{"id": i, "text": f"{draw.getrandbits(4000):x}"} for i in range(8000)]
    hub.add("dataset", "owner/data", {"data/train.jsonl": jsonl(rows), "data/valid.json": json.dumps(rows[:2000]).encode()})
    environment = hub.environment(folder / "home")
    command = [sys.executable, "-m", "self_model_sop.cli", "data", "fetch", "--dataset_name", "owner/data", "--output_dir"]
    start = time.perf_counter()
    subprocess.run([*command, str(folder / "whole")], check=True, capture_output=True, env=environment, cwd=folder)
    seconds = time.perf_counter() - start
    target, out = Target(folder / "out", GROUP), folder / "out"
    expected = content_hash(json.loads(Target(folder / "whole", GROUP).manifest.read_text()))
    killer = Killer(seconds, draw)
    for i in range(points):
        if i % 3 == 0:
            shutil.rmtree(folder / "home")  # downloads too, not only the cache
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=environment, cwd=folder)
        killer.kill(process)
        if target.manifest.exists():
            assert differences(target, json.loads(target.manifest.read_text()), deep=True) == []
        if i % 2:
            continue  # kill over the debris of a kill too
        subprocess.run([*command, str(out)], check=True, capture_output=True, env=environment, cwd=folder)
        assert content_hash(json.loads(target.manifest.read_text())) == expected
        assert sorted(p.name for p in out.iterdir()) == [f"{GROUP}.manifest.json", f"{GROUP}__train.jsonl", f"{GROUP}__validation.jsonl"]
        shutil.rmtree(out)
    assert killer.killed > 0


@pytest.mark.slow
def test_f20_fetch_three_kills(hub: HubServer, tmp_path: Path) -> None:
    kill_and_rerun(hub, tmp_path, 3, seed=int(time.time()))


@pytest.mark.exhaustive
def test_f20_fetch_two_hundred_kills(hub: HubServer, tmp_path: Path) -> None:
    kill_and_rerun(hub, tmp_path, 200, seed=0)
