"""Template files (`self_model/template/NAME.json`): finding, reading, and comparing with the template of a tokenizer.

A file serves a base without a template of its own. Where the tokenizer has one, both must write the same for every probe.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import project_root
from ..errors import SopError
from . import sandbox

SCHEMA = 1
FOLDER = Path("self_model/template")
_KEYS = {
    "schema": int, "name": str, "family": str, "jinja": (str, list), "default_system": (str, type(None)), "control": list, "stop": list,
    "verified": list, "unverified": str, "differs_on": dict,
}  # fmt: skip
_CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "天气 \"北京\"", "days": 3}}}
_TOOL = {"type": "function", "function": {"name": "search", "description": "找 <b>", "parameters": {"type": "object", "properties": {"query": {"type": "string"}}}}}
_ASK, _ANSWER = {"role": "user", "content": "你好，who are you?"}, {"role": "assistant", "content": "我是助手。\n\n1. x"}
_CALLS = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "content": '{"temperature": 21}'}

PROBES: Mapping[str, Mapping[str, Any]] = {
    "question": {"messages": [_ASK], "add_generation_prompt": True},
    "answer": {"messages": [_ASK, _ANSWER]},
    "system": {"messages": [{"role": "system", "content": "你是医生。"}, _ASK, _ANSWER]},
    "turns": {"messages": [{"role": "system", "content": "s"}, _ASK, _ANSWER, _ASK, _ANSWER, _ASK], "add_generation_prompt": True},
    "white space": {"messages": [{"role": "user", "content": "  a \n"}, {"role": "assistant", "content": "\n b  "}]},
    "late system": {"messages": [_ASK, _ANSWER, {"role": "system", "content": "late"}, _ASK, _ANSWER]},
    "reasoning": {"messages": [_ASK, {**_ANSWER, "reasoning_content": "想一想"}, _ASK, {**_ANSWER, "reasoning_content": "再想"}]},
    "think text": {"messages": [_ASK, {"role": "assistant", "content": "<think>\n想\n</think>\n\n答"}]},
    "tools": {"messages": [_ASK, _CALLS, _RESULT, _ANSWER], "tools": [_TOOL]},
    "two calls": {"messages": [_ASK, {"role": "assistant", "content": "看", "tool_calls": [_CALL, _CALL]}, _RESULT, _RESULT, _ANSWER], "tools": [_TOOL]},
    "call prompt": {"messages": [{"role": "system", "content": "s"}, _ASK, _CALLS, _RESULT], "tools": [_TOOL], "add_generation_prompt": True},
}


@dataclass(frozen=True)
class TemplateFile:
    """One template file.

    Args:
        source: complete Jinja, the default system prompt included.
        control: texts that must be single tokens of the tokenizer.
        stop: texts that end an answer.
        verified: for each tokenizer whose own template wrote every probe the same: its name and what was compared.
        unverified: why there is none.
        differs_on: probe -> why this file deliberately writes something else there.
    """

    path: Path
    name: str
    family: str
    source: str
    control: tuple[str, ...]
    stop: tuple[str, ...]
    verified: tuple[Mapping[str, str], ...]
    unverified: str
    differs_on: Mapping[str, str]


def find(name: str | Path) -> Path:
    """A template file by path, or by bare name in `self_model/template` of the project or of the installation.

    Raises:
        SopError: where there is none, with the nearest name.
    """
    path = Path(name)
    if path.is_file():
        return path
    folders = [project_root() / FOLDER]
    try:
        from ..ops.init import shipped

        folders.append(shipped() / FOLDER)
    except SopError:
        pass  # an installation without the shipped files: the project's own remain
    known = {p.stem: p for folder in reversed(folders) if folder.is_dir() for p in folder.glob("*.json")}
    bare = path.stem if path.suffix in ("", ".json") else path.name
    if bare in known:
        return known[bare]
    near = difflib.get_close_matches(bare, known, 1)
    raise SopError("no such chat template", where=str(name), fix=f"did you mean {near[0]!r}?" if near else f"templates: {', '.join(sorted(known))}")


def read(path: Path) -> TemplateFile:
    """Read and check a template file: our JSON, or bare Jinja (`.jinja`).

    Raises:
        SopError: with the key that is wrong.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".jinja", ".j2"):
        return TemplateFile(path, path.stem, "", text, (), (), (), "a bare Jinja file names no tokenizer that proved it", {})
    try:
        data = json.loads(text)
    except ValueError as error:
        raise SopError(f"this template file is not JSON: {error}", where=str(path), fix="see docs/templates.md") from error
    if not isinstance(data, dict):
        raise SopError("a template file holds one object", where=str(path), fix="see docs/templates.md")
    for key, value in data.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            raise SopError(f"unknown key {key!r}", where=str(path), fix=f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]):  # type: ignore[arg-type]
            raise SopError(f"{key}: wrong type {type(value).__name__}", where=str(path), fix="see docs/templates.md")
    if data.get("schema") != SCHEMA or "name" not in data or "jinja" not in data:
        raise SopError(f"a template file needs schema: {SCHEMA}, name and jinja", where=str(path), fix="see docs/templates.md")
    jinja = data["jinja"] if isinstance(data["jinja"], str) else "\n".join(data["jinja"])
    system = data.get("default_system")
    # Jinja reads the escapes of JSON strings; the template of a saved tokenizer must stand alone
    preset = "" if system is None else "{%- set default_system = " + json.dumps(system, ensure_ascii=False) + " -%}\n"
    return TemplateFile(
        path, data["name"], data.get("family", ""), preset + jinja, tuple(data.get("control", ())), tuple(data.get("stop", ())),
        tuple(data.get("verified", ())), data.get("unverified", "" if data.get("verified") else "no tokenizer proved it"), data.get("differs_on", {}),
    )  # fmt: skip


def require_tokens(file: TemplateFile, tokenizer: Any) -> None:
    """Refuse a tokenizer that would spell the file's control tokens in pieces.

    Raises:
        SopError: naming them.
    """
    lacking = [token for token in file.control if token not in tokenizer.added_tokens_encoder]
    if lacking:
        raise SopError(
            f"the template {file.name} writes {', '.join(lacking)}, which this tokenizer does not have as single tokens", where=str(tokenizer.name_or_path),
            fix="choose the template of the model's family (plain works with every tokenizer), or set template_override: true to write them as ordinary text",
        )  # fmt: skip


def difference(file: TemplateFile, own: str, variables: Mapping[str, Any]) -> str:
    """What the file and the tokenizer's own template write differently, as text for people; "" where all probes agree.

    A template that writes the next prompt even where none was asked for is compared without it.
    """
    compared = {name: probe for name, probe in PROBES.items() if name not in file.differs_on}
    ours = sandbox.try_out(file.source, list(compared.values()), variables)
    theirs = sandbox.try_out(own, list(compared.values()), variables)
    for name, mine, other in zip(compared, ours, theirs, strict=True):
        if not _same(mine, other, theirs[0], compared["question"]):
            return _shown(name, mine, other)
    return ""


def _same(mine: Mapping[str, str], other: Mapping[str, str], question: Mapping[str, str], asked: Mapping[str, Any]) -> bool:
    if "text" not in mine or "text" not in other:
        return "text" not in mine and "text" not in other
    a, b = mine["text"], other["text"]
    if a == b:
        return True
    tail = b[len(a) :] if b.startswith(a) else ""
    return bool(tail) and question.get("text", "").endswith(tail) and tail.strip() != "" and asked["messages"][-1]["content"] not in tail


def _shown(name: str, mine: Mapping[str, str], other: Mapping[str, str]) -> str:
    a, b = (r.get("text", f"(refused: {r.get('error')})") for r in (mine, other))
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return (
        f"probe {name!r}, from character {at}:\n    file:      ...{a[max(0, at - 30) : at]!r} then {a[at : at + 60]!r}\n"
        f"    tokenizer: ...{b[max(0, at - 30) : at]!r} then {b[at : at + 60]!r}"
    )
