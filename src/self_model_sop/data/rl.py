"""Rows as prompts for reinforcement learning, in the contract that verl reads from Parquet.

Fields as in verl 0.9 (docs/preparation/prepare_data.rst, verl/utils/dataset/rl_dataset.py and the reward managers): `prompt` (chat messages that end where the model is to
answer), `data_source` (names the reward function), `ability`, `reward_model` {style, ground_truth}, `extra_info` {split, index, ...}. `style` is `rule` where the answer is
compared, `model` where a reward model judges it; verl's own script for preference data writes the chosen answer as the ground truth of a `model` row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import option
from .formats import Message, Row, RowError, detect, to_messages, to_preference

_ABILITIES = {"preference": "preference", "choice": "multiple_choice"}
_ROWS = 5000  # of a row group


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """`rl:` prompts for reinforcement learning."""

    enabled: bool = option(True, "write rl/train.parquet and rl/validation.parquet, the contract of verl's RLHFDataset")
    data_source: str | None = option(None, "names the reward function; none: the row's own field, else the name of its file")
    ability: str | None = option(None, "kind of task; none: the row's own field, else preference, multiple_choice or question_answering")
    style: Literal["auto", "rule", "model"] = option("auto", "who judges an answer; auto: a reward model for preferences, a rule (comparison) for the rest")
    answer_pattern: str | None = option(None, r"regular expression whose last match in the answer is the ground truth (its group, if any): '####\s*(.+)'; none: the whole answer")
    system: str | None = option(None, "system turn for prompts that have none")
    instruction: str | None = option(None, "added to the last user turn, such as the form in which to answer")


def to_rl(row: Row, config: RLConfig) -> dict[str, Any]:
    """prompt, data_source (or None), ability and reward_model of a row.

    Raises:
        RowError: no_prompt, prompt_ends_with_assistant, tools_in_prompt, no_ground_truth, or what reading the row raises.
    """
    kind = detect(row)
    prompt, answer = _parts(row, kind)
    if not any(m["role"] == "user" and m["content"].strip() for m in prompt):
        raise RowError("no_prompt")
    if prompt[-1]["role"] == "assistant":
        raise RowError("prompt_ends_with_assistant")
    if any(m.get("tool_calls") or m["role"] == "tool" for m in prompt):
        raise RowError("tools_in_prompt", "the contract holds role and content only")
    given = row.get("reward_model")
    given = given if isinstance(given, dict) else {}
    truth = given.get("ground_truth")
    truth = _truth(answer, None if kind == "choice" else config.answer_pattern) if truth is None else str(truth)
    if not truth:
        raise RowError("no_ground_truth")
    style = config.style if config.style != "auto" else given.get("style") or ("model" if kind == "preference" else "rule")
    return {
        "prompt": _messages(prompt, config),
        "data_source": config.data_source or _own(row, "data_source"),
        "ability": config.ability or _own(row, "ability") or _ABILITIES.get(kind or "", "question_answering"),
        "reward_model": {"style": str(style), "ground_truth": truth},
    }


def _parts(row: Row, kind: str | None) -> tuple[list[Message], str]:
    """The turns before the answer, and the answer (of a preference: the chosen one)."""
    if kind == "preference":
        prompt, chosen, _ = to_preference(row)
        return [*prompt, *chosen[:-1]], str(chosen[-1]["content"])
    if kind in ("text", None):
        raise RowError("no_prompt")
    messages = to_messages(row)
    if kind == "rl" or not messages or messages[-1]["role"] != "assistant":
        return messages, ""
    return messages[:-1], str(messages[-1]["content"])


def _truth(answer: str, pattern: str | None) -> str:
    if pattern is None:
        return answer.strip()
    found = list(re.finditer(pattern, answer))
    return found[-1][found[-1].lastindex or 0].strip() if found else ""


def _own(row: Row, key: str) -> str | None:
    return row[key] if isinstance(row.get(key), str) and row[key] else None


def _messages(prompt: list[Message], config: RLConfig) -> list[dict[str, str]]:
    """The prompt with nothing but role and content, the configured system turn and instruction added."""
    out = [{"role": m["role"], "content": m["content"]} for m in prompt]
    if config.instruction:
        last = max(i for i, m in enumerate(out) if m["role"] == "user")
        out[last] = {"role": "user", "content": f"{out[last]['content']}\n{config.instruction}"}
    return [{"role": "system", "content": config.system}, *out] if config.system and out[0]["role"] != "system" else out


def write_rl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows of the contract as Parquet, in blocks; returns how many. The schema is the same for any number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    schema = pa.schema(
        [
            ("data_source", text),
            ("prompt", pa.list_(pa.struct([("role", text), ("content", text)]))),
            ("ability", text),
            ("reward_model", pa.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", pa.struct([("split", text), ("index", pa.int64()), ("source", text)])),
        ]
    )
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for block in _blocks(rows):
            writer.write_table(pa.Table.from_pylist(block, schema=schema))
            count += len(block)
    return count


def _blocks(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    block: list[dict[str, Any]] = []
    for row in rows:
        block.append(row)
        if len(block) == _ROWS:
            yield block
            block = []
    if block:
        yield block
