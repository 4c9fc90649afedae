"""What an extended tokenizer must still do, checked on the reloaded files. A gate that fails names the offending token and stops the stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DATA, SopError
from . import bpe, regression
from .base import Base
from .plan import Row
from .script import HAN_RUN, has_script

NEVER_CHANGED = ("english", "code", "numbers", "korean", "cyrillic", "emoji")  # in every scope but `free`
SAMPLE = (
    {"role": "system", "content": "你是一名医生。You answer briefly."},
    {"role": "user", "content": "你好，什么是高血压？"},
    {"role": "assistant", "content": "一种慢性病。"},
    {"role": "user", "content": "谢谢！Thanks!"},
)
# The text by whose token ids llama.cpp's converter recognises a BPE pre-tokenizer (convert_hf_to_gguf.py, get_vocab_base_pre).
LLAMA_CPP_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫\ufe0f (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 "
    "33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)


@dataclass(frozen=True)
class Pair:
    """The base and the reloaded extended tokenizer (transformers), with the plan that was appended.

    Args:
        base: the base tokenizer's files.
        old: the base, loaded.
        new: the extension, loaded from its folder.
        rows: the plan.
        free: the scope was `free`: changes to other text are reported, not refused.
    """

    base: Base
    old: Any
    new: Any
    rows: Sequence[Row]
    free: bool = False


Fault = str
Gate = Callable[[Pair, Sequence[str]], Iterator[Fault]]


def ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []


# --- the gates ----------------------------------------------------------------------------------------------------------------------------


def base_ids(pair: Pair, texts: Sequence[str]) -> Iterator[Fault]:
    """Every base token has its old id, and the old id its token."""
    new = pair.new.get_vocab()
    back = {i: t for t, i in new.items()}
    for token, i in sorted(pair.old.get_vocab().items(), key=lambda item: item[1]):
        if new.get(token) != i:
            yield f"base token {token!r} had id {i}, now {new.get(token)}"
        elif back[i] != token:
            yield f"id {i} was {token!r}, now {back[i]!r}"


def special_ids(pair: Pair, texts: Sequence[str]) -> Iterator[Fault]:
    """Every special and added token, one by one: same id, same flags, still one token inside a text, same role."""
    new = pair.new.added_tokens_decoder
    for i, token in pair.old.added_tokens_decoder.items():
        if i not in new or new[i].content != token.content:
            yield f"special token {token.content!r} had id {i}, now {pair.new.convert_tokens_to_ids(token.content)}"
            continue
        for flag in ("special", "normalized", "lstrip", "rstrip", "single_word"):
            if getattr(new[i], flag) != getattr(token, flag):
                yield f"special token {token.content!r}: {flag} was {getattr(token, flag)}, now {getattr(new[i], flag)}"
        text = f"患者{token.content}高血压 {token.content}"
        old, now = ids(pair.old, [text])[0].count(i), ids(pair.new, [text])[0].count(i)
        if old != now:
            yield f"special token {token.content!r} (id {i}) was found {old} times in a text, now {now}"
    for role, content in pair.old.special_tokens_map.items():
        if pair.new.special_tokens_map.get(role) != content:
            yield f"{role} was {content!r}, now {pair.new.special_tokens_map.get(role)!r}"


def new_ids(pair: Pair, texts: Sequence[str]) -> Iterator[Fault]:
    """The new tokens have the ids of the plan, one behind the other, behind every base id."""
    vocab, first = pair.new.get_vocab(), 1 + max(pair.old.get_vocab().values())
    for n, row in enumerate(pair.rows):
        if row.id != first + n or vocab.get(row.token) != row.id:
            yield f"new token {row.text!r} should have id {first + n}, has {vocab.get(row.token)}"
    if len(vocab) != len(pair.old.get_vocab()) + len(pair.rows):
        yield f"{len(vocab)} tokens instead of {len(pair.old.get_vocab())} + {len(pair.rows)}"


def untouched_text(pair: Pair, texts: Sequence[str]) -> Iterator[Fault]:
    """A text in whose encoding no new token stands is encoded exactly as before; so is every text without Chinese (but in scope `free`)."""
    first = pair.rows[0].id if pair.rows else 0
    for text, old, new in zip(texts, ids(pair.old, texts), ids(pair.new, texts), strict=True):
        if old == new:
            continue
        where = next((f"token {pair.new.convert_ids_to_tokens(b)!r} instead of {pair.old.convert_ids_to_tokens(a)!r}" for a, b in zip(old, new, strict=False) if a != b), "")
        if all(i < first for i in new):
            yield f"no new token in it, yet encoded differently ({where}): {text[:60]!r}"
        elif not pair.free and not has_script(text):
            yield f"no Chinese in it, yet encoded differently ({where}): {text[:60]!r}"


def regression_lines(pair: Pair, texts: Sequence[str]) -> Iterator[Fault]:
    """English, code, numbers, Korean, Cyrillic and emoji lines do not change (scope `free` only reports them)."""
    for name in () if pair.free else NEVER_CHANGED:
        lines = regression.lines(name)
        for line, old, new in zip(lines, ids(pair.old, lines), ids(pair.new, lines), strict=True):
            if old != new and not has_script(line):
                token = next((pair.new.convert_ids_to_tokens(i) for i in new if i not in old), "?")
                yield f"{name} line changed by token {token!r}: {line[:60]!r}"


def round_trip(pair: Pair, texts: Sequence[str]) -> Iterator[Fault]:
    """decode(encode(x)) == x wherever the base does so."""
    decoded = [t.batch_decode(ids(t, texts), skip_special_tokens=False, clean_up_tokenization_spaces=False) if texts else [] for t in (pair.old, pair.new)]
    for text, old, new in zip(texts, *decoded, strict=True):
        if old == text and new != text:
            yield f"{text[:60]!r} comes back as {new[:60]!r}"


def reachable(pair: Pair, texts: Sequence[str]) -> Iterator[Fault]:
    """Each new token comes out of its own text, or (a beginning of a character, a token that needs its context) out of its own bytes."""
    backend = pair.new.backend_tokenizer
    whole = [r for r in pair.rows if not r.fragment]
    alone = {r.id for r, found in zip(whole, ids(pair.new, [r.text for r in whole]), strict=True) if r.id in found}
    for row in pair.rows:
        if row.id not in alone and not (pair.base.kind == "byte_bpe" and bpe.reaches(backend, row)):
            yield f"new token {row.text!r} (id {row.id}) is never reached"


def template(pair: Pair, texts: Sequence[str]) -> Iterator[Fault]:
    """The chat template has the same text and renders the same, with its special tokens at the same places."""
    if pair.old.chat_template != pair.new.chat_template:
        yield "the chat template's text differs"
        return
    if not isinstance(pair.old.chat_template, str):
        return
    for sample in (SAMPLE, SAMPLE[1:], SAMPLE[1:2]):
        try:
            old = pair.old.apply_chat_template(list(sample), tokenize=False, add_generation_prompt=True)
        except Exception:  # a template may refuse a system turn, in whatever way it likes: then there is nothing to compare
            continue
        new = pair.new.apply_chat_template(list(sample), tokenize=False, add_generation_prompt=True)
        special = set(pair.old.added_tokens_decoder)
        marks = [[i for i in ids(t, [text])[0] if i in special] for t, text in ((pair.old, old), (pair.new, new))]
        if old != new or marks[0] != marks[1]:
            yield f"the chat template renders {new[:80]!r} instead of {old[:80]!r}"


GATES: dict[str, Gate] = {
    "base ids": base_ids, "special ids": special_ids, "new ids": new_ids, "reachable": reachable, "untouched text": untouched_text,
    "regression lines": regression_lines, "round trip": round_trip, "chat template": template,
}  # fmt: skip


def check(pair: Pair, texts: Sequence[str]) -> dict[str, int]:
    """Run every gate on the regression set and `texts`; returns faults by gate (all 0).

    Raises:
        SopError: exit code 3, with the first offending token of each failed gate.
    """
    lines = [line for name in regression.NAMES for line in regression.lines(name)]
    found = {name: list(gate(pair, [*lines, *texts])) for name, gate in GATES.items()}
    failed = {name: faults for name, faults in found.items() if faults}
    if failed:
        what = "; ".join(f"gate {name!r} failed {len(faults)} times: {faults[0]}" for name, faults in failed.items())
        raise SopError(what, fix="the extension was not written; report this with the base tokenizer's name, or choose fewer tokens", code=DATA)
    return dict.fromkeys(found, 0)


# --- what is reported, not refused ---------------------------------------------------------------------------------------------------------


def changed_lines(pair: Pair) -> dict[str, int]:
    """Lines of each text of the regression set that are encoded differently. Japanese and traditional Chinese share characters with Chinese."""
    out = {}
    for name in regression.NAMES:
        lines = regression.lines(name)
        out[name] = sum(a != b for a, b in zip(ids(pair.old, lines), ids(pair.new, lines), strict=True))
    return out


def llama_cpp_probe(pair: Pair) -> dict[str, str | bool]:
    """Whether llama.cpp's converter still recognises the pre-tokenizer by itself; if not, export with the base's `tokenizer.ggml.pre`."""
    old, new = (hashlib.sha256(str(t.encode(LLAMA_CPP_PROBE)).encode()).hexdigest() for t in (pair.old, pair.new))
    return {"base": old, "extended": new, "same": old == new}


def without_chinese(texts: Sequence[str]) -> list[str]:
    """The texts with their Chinese runs cut out: a source of lines that no token may change."""
    return [rest for text in texts if (rest := HAN_RUN.sub(" ", text)).strip() and not has_script(rest)]


def dump(report: dict[str, Any]) -> str:
    """A gate report as JSON text."""
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"
