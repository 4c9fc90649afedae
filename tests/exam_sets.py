"""Small multiple-choice sets in the layouts of the real ones, for the tests of eval/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[2] / "shared" / "data" / "eval"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def rows(path: Path, lines: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def cmmlu(folder: Path) -> Path:
    """The layout of CMMLU: an index column, Question, A to D, Answer; dev and test folders."""
    head = ",Question,A,B,C,D,Answer\n"
    for subject in ("anatomy", "world_history"):
        write(folder / "test" / f"{subject}.csv", head + "".join(f'{i},"{subject}，第{i}题？",一,2,"三,3",四,{"ABCD"[i % 4]}\n' for i in range(6)))
        write(folder / "dev" / f"{subject}.csv", head + "".join(f"{i},{subject} 例题{i},甲,乙,丙,丁,{'DCBA'[i % 4]}\n" for i in range(5)))
    return folder
