"""Row formats: recognised from a row's fields, never from a registration file.

| format | fields |
|---|---|
| preference | chosen and rejected (several spellings) beside a prompt, a conversation, or inside two conversations with a common start |
| rl | prompt: [{role, content}] beside reward_model: {ground_truth} |
| choice | question with options or choices (or columns A, B, C, D) |
| messages | messages: [{role, content, tool_calls?, reasoning_content?, train?, weight?}] |
| sharegpt | conversations: [{from, value}], with function_call and observation turns |
| alpaca | instruction, input, output, system?, history? |
| io | prompt/response, question/answer, query/response, input/output, system?, history? |
| text | text (or content, ...) |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]

TEXT_KEYS = ("text", "content", "raw_content", "body", "article", "passage")
PAIR_KEYS = (
    ("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("query", "response"), ("input", "output"),
    ("question", "response"), ("prompt", "answer"), ("input", "target"),
)  # fmt: skip
PREFERENCE_KEYS = (("chosen", "rejected"), ("response_chosen", "response_rejected"), ("chosen_response", "rejected_response"), ("preferred", "dispreferred"))
PROMPT_KEYS = ("prompt", "question", "query", "instruction", "input")
DIALOGUE_KEYS = ("messages", "conversations", "conversation")
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
_LETTERS = "ABCDEFGHIJ"
_ANSWER_KEYS = frozenset(answer for _, answer in PAIR_KEYS)
_REJECTED_KEYS = frozenset(rejected for _, rejected in PREFERENCE_KEYS)
_NOT_TEXT = frozenset({"prompt", "question", "Question", "instruction", *DIALOGUE_KEYS}) | _ANSWER_KEYS | _REJECTED_KEYS  # a row without any of these can only be text


class RowError(ValueError):
    """A row that cannot be read in its format; `reason` is a short code such as `unknown_role`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else reason)


# --- which format -------------------------------------------------------------------------------------------------------------------------


def detect(row: Row) -> str | None:
    """The format of a row: preference, rl, choice, messages, sharegpt, alpaca, io, text; None where no field is known."""
    if _NOT_TEXT.isdisjoint(row):
        return "text" if text_key(row) else None
    if preference_keys(row):
        return "preference"
    if isinstance(row.get("prompt"), list) and isinstance(row.get("reward_model"), dict):
        return "rl"
    if _is_choice(row):
        return "choice"
    if isinstance(row.get("messages"), list):
        return "messages"
    key = dialogue_key(row)
    if key:
        first = next((m for m in row[key] if isinstance(m, dict)), {})
        return "messages" if "role" in first else "sharegpt"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if pair_keys(row):
        return "io"
    return "text" if text_key(row) else None


def text_key(row: Row) -> str | None:
    """The field of a pretraining row that holds its text."""
    for key in TEXT_KEYS:
        if key in row:
            return key
    return None


def pair_keys(row: Row) -> tuple[str, str] | None:
    """The (question, answer) fields of an io row."""
    if _ANSWER_KEYS.isdisjoint(row):
        return None
    return next((p for p in PAIR_KEYS if p[0] in row and p[1] in row), None)


def preference_keys(row: Row) -> tuple[str, str] | None:
    """The (chosen, rejected) fields of a preference row."""
    if _REJECTED_KEYS.isdisjoint(row):
        return None
    return next((p for p in PREFERENCE_KEYS if p[0] in row and p[1] in row), None)


def dialogue_key(row: Row) -> str | None:
    """The field that holds a list of turns."""
    return next((k for k in DIALOGUE_KEYS if isinstance(row.get(k), list)), None)


def missing_part(row: Row) -> str | None:
    """What a row without a format lacks to be a preference or a question with its answer: no_chosen, no_rejected, no_answer, no_prompt; None where it is neither."""
    for chosen, rejected in PREFERENCE_KEYS:
        if (chosen in row) != (rejected in row):
            return "no_rejected" if chosen in row else "no_chosen"
    if any(key in row for key in PROMPT_KEYS):
        return "no_answer"
    return "no_prompt" if any(answer in row for _, answer in PAIR_KEYS) else None


def _is_choice(row: Row) -> bool:
    asked = "question" in row or "Question" in row
    return asked and (isinstance(row.get("options"), (list, dict)) or isinstance(row.get("choices"), (list, dict)) or all(c in row for c in "ABCD"))


# --- dialogues ----------------------------------------------------------------------------------------------------------------------------


def to_messages(row: Row, kind: str | None = None) -> list[Message]:
    """A dialogue row (alpaca, sharegpt, messages, io, choice) as messages; of an rl row the prompt. `kind`: its format, where it is known.

    Raises:
        RowError: unknown_role, bad_turn, not_text, bad_tool_call, no_answer, or not_a_dialogue.
    """
    kind = kind or detect(row)
    if kind in ("messages", "sharegpt"):
        turns = row[dialogue_key(row) or "messages"]
        return [*_system(row), *(_message(turn) for turn in turns)]
    if kind == "alpaca":
        return [*_system(row), *_history(row), _turn("user", _joined(row, ("instruction", "input"))), _turn("assistant", _string(row["output"]))]
    if kind == "io":
        ask, answer = pair_keys(row) or ("", "")
        return [*_system(row), *_history(row), _turn("user", _string(row[ask])), _turn("assistant", _string(row[answer]))]
    if kind == "choice":
        return _choice_messages(row)
    if kind == "rl":
        return [*_system(row), *map(_message, row["prompt"])]
    raise RowError("not_a_dialogue", str(kind))


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """The tool declarations of a row (`tools`: a list, or its JSON), or None.

    Raises:
        RowError: bad_tools.
    """
    tools = row.get("tools") or row.get("functions")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise RowError("bad_tools") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise RowError("bad_tools")
    return tools


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise RowError("not_text", type(value).__name__)
    return value


def _joined(row: Row, keys: Sequence[str]) -> str:
    """Instruction and input, one below the other; an absent or null input is none."""
    parts = [_string(row[keys[0]])] + [_string(row[k]) for k in keys[1:] if row.get(k) is not None]
    return "\n".join(p for p in parts if p)


def _system(row: Row) -> list[Message]:
    system = row.get("system")
    return [_turn("system", _string(system))] if system else []


def _history(row: Row) -> list[Message]:
    out: list[Message] = []
    for pair in row.get("history") or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError("bad_turn", "history holds [question, answer] pairs")
        out += [_turn("user", _string(pair[0])), _turn("assistant", _string(pair[1]))]
    return out


def _message(turn: Any) -> Message:
    """One turn of a messages or sharegpt list."""
    if not isinstance(turn, dict):
        raise RowError("bad_turn", type(turn).__name__)
    said = turn.get("role", turn.get("from"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise RowError("unknown_role", str(said)[:40])
    content = _content(turn.get("content", turn.get("value")), bool(turn.get("tool_calls")))
    message: Message = _turn(role, content)
    if said == "function_call":
        message = {"role": "assistant", "content": "", "tool_calls": _tool_calls(content)}
    elif turn.get("tool_calls"):
        message["tool_calls"] = turn["tool_calls"]
    for key, kind in (("reasoning_content", str), ("name", str), ("tool_call_id", str), ("train", bool), ("weight", (int, float))):
        if isinstance(turn.get(key), kind):
            message[key] = turn[key]
    return message


def _content(value: Any, has_calls: bool) -> str:
    if value is None and has_calls:
        return ""
    if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(_string(p.get("text")) for p in value)
    return _string(value)


def _tool_calls(value: str) -> list[dict[str, Any]]:
    """A sharegpt `function_call` value ({name, arguments} or a list of them) as tool_calls."""
    try:
        calls = json.loads(value)
    except ValueError:
        raise RowError("bad_tool_call") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise RowError("bad_tool_call")
    return [{"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments", {})}} for c in calls]


def _choice_messages(row: Row) -> list[Message]:
    question, options, answer = choice_of(row)
    if answer is None:
        raise RowError("no_answer")
    lines = [question, *(f"{letter}. {text}" for letter, text in zip(_LETTERS, options, strict=False)), "答案："]
    return [_turn("user", "\n".join(lines)), _turn("assistant", answer)]


def choice_of(row: Row) -> tuple[str, list[str], str | None]:
    """(question with its passage, options without letters, answer letters such as `A` or `AC`, or None).

    Raises:
        RowError: not_text or bad_options.
    """
    question = _string(row.get("question", row.get("Question")))
    passage = row.get("passage") or row.get("context")
    raw = row.get("options") or row.get("choices") or [row.get(c) for c in _LETTERS if c in row]
    raw = raw.get("text", [raw[k] for k in sorted(raw)]) if isinstance(raw, dict) else raw
    if not isinstance(raw, list) or not 2 <= len(raw) <= len(_LETTERS):
        raise RowError("bad_options")
    options = [_without_letter(_string(o), _LETTERS[i]) for i, o in enumerate(raw)]
    found = next((row[k] for k in ("label", "answer", "Answer", "answerKey", "gold") if row.get(k) is not None), None)
    return (f"{passage}\n{question}" if isinstance(passage, str) and passage else question), options, _letters(found, options)


def _without_letter(option: str, letter: str) -> str:
    for prefix in (f"({letter})", f"（{letter}）", f"{letter}.", f"{letter}．", f"{letter}、", f"{letter}:", f"{letter}："):
        if option.startswith(prefix):
            return option[len(prefix) :].strip()
    return option.strip()


def _letters(answer: Any, options: Sequence[str]) -> str | None:
    if isinstance(answer, bool) or answer is None:
        return None
    if isinstance(answer, int):
        return _LETTERS[answer] if 0 <= answer < len(options) else None
    if isinstance(answer, list):
        answer = "".join(a for a in answer if isinstance(a, str))
    if not isinstance(answer, str):
        return None
    letters = answer.strip().strip("()（）.。")
    valid = _LETTERS[: len(options)]
    if letters and all(c in valid for c in letters):
        return "".join(sorted(set(letters)))
    return valid[options.index(answer)] if answer in options else None


# --- preferences --------------------------------------------------------------------------------------------------------------------------


def to_preference(row: Row) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected) of a preference row; the last two hold only what follows the prompt.

    Raises:
        RowError: not_a_preference, empty_chosen, empty_rejected, no_prompt, not_text, bad_turn, unknown_role.
    """
    keys = preference_keys(row)
    if keys is None:
        raise RowError("not_a_preference")
    for key, part in zip(keys, ("chosen", "rejected"), strict=True):
        if row[key] is None or row[key] == []:
            raise RowError(f"empty_{part}")
    chosen, rejected = (_answer(row[k]) for k in keys)
    prompt = _preference_prompt(row)
    if not prompt or chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        n = 0
        while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
            n += 1
        prompt, chosen, rejected = [*(_system(row) if not prompt else []), *chosen[:n]], chosen[n:], rejected[n:]
    elif len(chosen) > 1 and len(rejected) > 1 and chosen[0]["role"] == "user":  # whole conversations beside a prompt that only repeats their start
        return to_preference({keys[0]: row[keys[0]], keys[1]: row[keys[1]], "system": row.get("system")})
    if not any(m["role"] == "user" for m in prompt):
        raise RowError("no_prompt")
    return prompt, chosen, rejected


def _answer(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [_turn("assistant", value)]
    if isinstance(value, dict):
        return [_message({"role": "assistant", **value} if "from" not in value else value)]
    if isinstance(value, list) and value:
        return [_message(turn) for turn in value]
    raise RowError("not_text", type(value).__name__)


def _preference_prompt(row: Row) -> list[Message]:
    key = dialogue_key(row)
    if key:
        return [*_system(row), *(_message(turn) for turn in row[key])]
    key = next((k for k in PROMPT_KEYS if row.get(k) is not None), None)
    if key is None:
        return []
    value = row[key]
    if isinstance(value, list):
        return [*_system(row), *(_message(turn) for turn in value)]
    text = _joined(row, ("instruction", "input")) if key == "instruction" else _string(value)
    return [*_system(row), *_history(row), _turn("user", text)]


# --- text ---------------------------------------------------------------------------------------------------------------------------------


def to_text(row: Row, text_fields: Sequence[str] = (), kind: str | None = None) -> str:
    """All text of a row, its parts joined by newlines; with `text_fields`, the text of those fields only. `kind`: its format, where it is known.

    Raises:
        RowError: unknown_format, not_text, or what `to_messages` and `to_preference` raise.
    """
    if text_fields:
        present = [row[k] for k in text_fields if row.get(k) is not None]
        if not present:
            raise RowError("no_text_field", ", ".join(text_fields))
        return "\n".join(_string(v) for v in present)
    kind = kind or detect(row)
    if kind == "text":
        return _string(row[text_key(row) or "text"])
    if kind == "preference":
        return "\n".join(m["content"] for part in to_preference(row) for m in part if m["content"])
    if kind == "choice":
        question, options, _ = choice_of(row)
        return "\n".join([question, *options])
    if kind is None:
        raise RowError("unknown_format", ", ".join(map(str, list(row)[:6])))
    return "\n".join(m["content"] for m in to_messages(row, kind) if m["content"])


def map_texts(
    row: Row, change: Callable[[str], str], text_fields: Sequence[str] = (), *, programs: Callable[[Any], Any] = lambda data: data, kind: str | None = None
) -> Row:
    """A copy of the row with `change` applied to every natural-language text of its format, in a fixed order, and everything else as it was.

    Tool calls and tool results are data for programs: they stay byte for byte, but for what `programs` makes of them. `kind`: the row's format, where it is known.
    """
    kind = None if text_fields else kind or detect(row)
    keys: Sequence[str] = text_fields
    if kind == "text":
        keys = (text_key(row) or "text",)
    elif kind == "alpaca":
        keys = ("instruction", "input", "output", "system")
    elif kind == "io":
        keys = (*(pair_keys(row) or ()), "system")
    elif kind == "choice":
        keys = ("question", "Question", "passage", "options", "choices", *_LETTERS)
    elif kind == "preference":
        keys = (*(preference_keys(row) or ()), *PROMPT_KEYS, *DIALOGUE_KEYS, "system")
    elif kind == "rl":
        keys = ("prompt", "system")
    elif kind in ("messages", "sharegpt"):
        keys = (dialogue_key(row) or "messages", "system")
    out = dict(row)
    for key in (*keys, "history"):
        if key in out:
            out[key] = _map_value(out[key], change, programs)
    return out


def _map_value(value: Any, change: Callable[[str], str], programs: Callable[[Any], Any]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_value(v, change, programs) for v in value]
    if not isinstance(value, dict):
        return value
    said = value.get("role", value.get("from"))
    data = isinstance(said, str) and (ROLES.get(said) == "tool" or said == "function_call")
    out = {}
    for key, inner in value.items():
        if key == "tool_calls" or (data and key in ("value", "content")):
            out[key] = programs(inner)
        elif key in ("value", "content", "text", "reasoning_content"):
            out[key] = _map_value(inner, change, programs)
        else:
            out[key] = inner
    return out
