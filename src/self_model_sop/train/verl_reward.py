"""The reward function that verl calls, copied into the artifact beside `rewards.json` and `sop_rewards/`: the same functions with the same weights as on the other engine.

The copy runs in verl's environment on any node that sees the folder; it needs the standard library only.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@functools.lru_cache(maxsize=1)
def _parts() -> tuple[Any, list[Any]]:
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    import sop_rewards  # type: ignore[import-not-found]

    listed = json.loads((HERE / "rewards.json").read_text(encoding="utf-8"))
    return sop_rewards, [sop_rewards.part(one["name"], one["weight"], one["options"], HERE) for one in listed]


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any) -> dict[str, float]:
    """The weighted sum as `score`, and what each reward gave, which verl logs."""
    library, parts = _parts()
    row = {"data_source": data_source, "ground_truth": ground_truth, "extra_info": extra_info or {}}
    scores = library.each(parts, solution_str, row)
    return {"score": library.total(parts, scores), **scores}
