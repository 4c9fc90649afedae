"""F12: YAML that wants to run code, or to fill the memory, is refused in no time."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from self_model_sop.config import ConfigError, load
from self_model_sop.hub import HubConfig


def laughs(levels: int = 12, width: int = 10) -> str:
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


PAYLOADS = {
    "aliases that expand to 10^11 values": laughs(),
    "an alias of itself": "a: &a [*a]\n",
    "a tag that calls a function": 'a: !!python/object/apply:os.system ["touch {canary}"]\n',
    "a tag that builds an object": "a: !!python/object/new:pathlib.Path [x]\n",
    "a tag that imports a module": "a: !!python/module:antigravity\n",
    "lists in lists in lists": "a: " + "[" * 5000 + "]" * 5000 + "\n",
    "maps in maps in maps": "".join(" " * i + f"k{i}:\n" for i in range(400)),
    "fifty megabytes": "# " + "x" * (50 << 20) + "\n",
    "eighteen thousand keys": "".join(f"k{i}: {i}\n" for i in range(18_000)),
    "a number without end": "a: " + "9" * 200_000 + "\n",
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_refused_at_once_and_nothing_runs(name: str, tmp_path: Path) -> None:
    load(HubConfig, None)  # pydantic is imported before the clock starts
    canary, path = tmp_path / "canary", tmp_path / "c.yaml"
    path.write_text(PAYLOADS[name].replace("{canary}", str(canary)))
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(3):  # the fastest of three: a busy machine slows single ones
        start = time.process_time()
        with pytest.raises(ConfigError) as caught:
            load(HubConfig, path)
        seconds.append(time.process_time() - start)
    assert not canary.exists() and caught.value.problems[0].where
    assert all(len(str(p)) < 2000 for p in caught.value.problems)
    assert min(seconds) < 0.2, seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10
