"""Text with known origins -> token ids: the template's control tokens become control ids, the same characters in data never do.

One encoding of the whole text gives the ids of `apply_chat_template`. Where that encoding finds a control token in data, the text is encoded once more
by a copy of the tokenizer whose control tokens have secret names, with the template's own control tokens written by those names: everything else
(pre-tokenisation, merges, prefix spaces) is the same, so the rest of the ids stays what it was.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import SopError

_LETTERS = "".join(chr(0x10600 + i) for i in range(32))  # Linear A: letters that no normaliser changes
_BRACKETED = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
Span = tuple[int, int]  # [start, end) in characters of the rendered text
T = TypeVar("T")


def batches(items: Iterable[T], text: Callable[[T], str], *, most: int = 8192, characters: int = 1 << 20) -> Iterator[list[T]]:
    """Items in lists of `most`, or fewer where their texts are long: what the library answers takes some hundred bytes a token until the list is done."""
    batch, size = list[T](), 0
    for item in items:
        batch.append(item)
        size += len(text(item))
        if len(batch) >= most or size > characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, with the characters that each token stands for: `starts[i]:ends[i]` of the text.

    `spelled`: data held text that looks like a control token; it is spelled as plain text.
    """

    ids: list[int]
    starts: Sequence[int]
    ends: Sequence[int]
    spelled: bool = False


class Encoder:
    """Encodes rendered conversations with one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template: the chat template; added tokens that it writes are control tokens even where they are not declared special.
    """

    def __init__(self, tokenizer: Any, template: str = "") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise SopError("this tokenizer has no fast version", where=str(tokenizer.name_or_path), fix="save it with a tokenizer.json (AutoTokenizer with use_fast)")
        self.backend = backend
        self.control = control_tokens(tokenizer, template)
        self.control_ids = frozenset(self.control.values())
        self._renamed: _Renamed | None = None

    def encode(self, text: str, data: Sequence[Span]) -> Encoded:
        """Ids of `text`; in the spans of `data` no control token is recognised.

        Args:
            text: the rendered text.
            data: sorted, disjoint character spans that came from messages or tools.
        """
        text = str.__str__(text)
        self.backend.encode_special_tokens = False  # `split_special_tokens=True` of an earlier call of the tokenizer stays on in its backend
        encoding = self.backend.encode(text, add_special_tokens=False)
        found = _from_encoding(encoding)
        if not self._injected(text, found, data):
            return found
        return self._plain(text, data)

    def _injected(self, text: str, found: Encoded, data: Sequence[Span]) -> bool:
        """Whether a control id covers characters of the data."""
        control = self.control_ids
        firsts = [span[0] for span in data]
        for k in [k for k, number in enumerate(found.ids) if number in control]:
            start, end = found.starts[k], found.ends[k]
            piece = text[start:end]  # with the white space that some tokens swallow
            start, end = start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
            before = bisect_left(firsts, end) - 1  # the last span that begins before the token ends
            if before >= 0 and data[before][1] > start:
                return True
        return False

    def _plain(self, text: str, data: Sequence[Span]) -> Encoded:
        """The encoding by secret names, its offsets brought back to `text`."""
        if self._renamed is None:
            self._renamed = _Renamed(self.backend, self.control)
        renamed = self._renamed
        changed, shifts, expected = renamed.write(text, data)
        found = _from_encoding(renamed.backend.encode(changed, add_special_tokens=False))
        ids = [renamed.original.get(i, i) for i in found.ids]
        if sum(i in self.control_ids for i in ids) != expected:
            raise SopError("text that looks like a control token cannot be encoded as plain text with this tokenizer", where=_excerpt(text, data), fix="remove it from the data")
        return Encoded(ids, [shifts.back(i) for i in found.starts], [shifts.back(i, is_end=True) for i in found.ends], spelled=True)


@contextmanager
def special_tokens_as_text(tokenizer: Any) -> Iterator[dict[str, bool]]:
    """Keyword arguments for calls of `tokenizer` in which what looks like a special token is text; afterwards its backend is as it was.

    (The library leaves the switch on in the backend, where a later `backend.encode` would split the control tokens of a chat template.)
    """
    before = tokenizer.backend_tokenizer.encode_special_tokens
    try:
        yield {"split_special_tokens": True}
    finally:
        tokenizer.backend_tokenizer.encode_special_tokens = before


def _from_encoding(encoding: Any) -> Encoded:
    offsets = encoding.offsets
    return Encoded(encoding.ids, [offset[0] for offset in offsets], [offset[1] for offset in offsets])


def _excerpt(text: str, data: Sequence[Span]) -> str:
    return f"conversation starting {text[data[0][0] : data[0][0] + 40]!r}" if data else "conversation"


def control_tokens(tokenizer: Any, template: str = "") -> dict[str, int]:
    """Text -> id of every token that must never come out of data: special tokens, added tokens that the template writes, and added tokens shaped like `<...>` or `[...]`.

    Other added tokens (words of a domain vocabulary) are ordinary text.
    """
    special = set(tokenizer.all_special_tokens)
    found = {}
    for number, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        if token.special or text in special or (len(text) > 1 and not text.isalnum() and text in template) or _BRACKETED.fullmatch(text):
            found[text] = number
    return found


class _Shifts:
    """Positions of a rewritten text -> positions of the original: each rewritten piece maps to the start of its original, what follows moves along."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.pieces: list[tuple[int, Span]] = []  # end in the new text, span in the old one

    def add(self, new: Span, old: Span) -> None:
        self.starts.append(new[0])
        self.pieces.append((new[1], old))

    def back(self, position: int, *, is_end: bool = False) -> int:
        """The original position; inside a rewritten piece its start (as an end: its end)."""
        i = bisect_right(self.starts, position - is_end) - 1
        if i < 0:
            return position
        end, old = self.pieces[i]
        if position < end + is_end:
            return old[1] if is_end else old[0]
        return old[1] + position - end


class _Renamed:
    """A copy of a tokenizer backend in which control tokens are spelled by secret names."""

    def __init__(self, backend: Any, control: dict[str, int]) -> None:
        from tokenizers import Tokenizer

        nonce = "".join(secrets.choice(_LETTERS) for _ in range(24))
        self.names = {text: nonce + "".join(_LETTERS[int(d)] for d in f"{i:06d}") + _LETTERS[31] for i, text in enumerate(control)}
        state = json.loads(backend.to_str())
        state["post_processor"] = None
        inside = _vocabulary(state)
        for token in state["added_tokens"]:
            token["content"] = self.names.get(token["content"], token["content"])
        # a token that also stands in the model's vocabulary gets a new id under its secret name: those come last, so that no other id moves
        state["added_tokens"].sort(key=lambda token: (token["id"] in inside and token["content"] in self.names.values(), token["id"]))
        self.backend = Tokenizer.from_str(json.dumps(state))
        self.original = {self.backend.token_to_id(name): control[text] for text, name in self.names.items()}
        for token in state["added_tokens"]:
            if token["content"] not in self.names.values() and self.backend.token_to_id(token["content"]) != token["id"]:
                raise SopError(f"the added token {token['content']!r} cannot be separated from control tokens", fix="save the tokenizer again with transformers")
        self.pattern = re.compile("|".join(re.escape(text) for text in sorted(self.names, key=len, reverse=True)))

    def write(self, text: str, data: Sequence[Span]) -> tuple[str, _Shifts, int]:
        """`text` with the template's control tokens by their secret names; how positions moved; how many there are."""
        pieces: list[str] = []
        shifts, length, at = _Shifts(), 0, 0
        for start, end in self._template_tokens(text, data):
            name = self.names[text[start:end]]
            pieces += [text[at:start], name]
            length += start - at
            shifts.add((length, length + len(name)), (start, end))
            length += len(name)
            at = end
        return "".join([*pieces, text[at:]]), shifts, len(shifts.starts)

    def _template_tokens(self, text: str, data: Sequence[Span]) -> Iterator[Span]:
        at = 0
        for start, end in [*data, (len(text), len(text))]:
            for match in self.pattern.finditer(text, at, start):
                yield match.span()
            at = end


def _vocabulary(state: dict[str, Any]) -> set[int]:
    vocab = state["model"].get("vocab") or {}
    return set(vocab.values()) if isinstance(vocab, dict) else set(range(len(vocab)))


_END_MARKER = re.compile(r"im_end|eot|eom|end.?of.?(text|turn|sentence|message)|/s>|endofturn|<\|end\|>", re.IGNORECASE)
_PAD_CANDIDATES = (r"^\W*pad\W*$|pad_id", r"finetune", r"reserved|unused|place.?holder|extra_id", r"pad", r"endoftext", r"unk", r"filename|empty_output|repo_?name")


def ensure_pad(tokenizer: Any) -> str:
    """Give the tokenizer a padding token that is no end marker; answers its text.

    Padding is masked, so padding with the end marker would mask the end of every answer. An existing token is taken, never a new one: the embedding has no row for it.

    Raises:
        SopError: where the tokenizer has no token that can serve.
    """
    current = tokenizer.pad_token
    if current is not None and not _ends(tokenizer, current):
        return str(current)
    known = [*tokenizer.added_tokens_encoder, *([tokenizer.unk_token] if tokenizer.unk_token else [])]
    for pattern in _PAD_CANDIDATES:
        for text in known:
            if re.search(pattern, text, re.IGNORECASE) and not _ends(tokenizer, text):
                tokenizer.pad_token = text
                return str(text)
    raise SopError(
        "the tokenizer has no padding token, and no unused token that could be one", where=str(tokenizer.name_or_path),
        fix="add one and resize the embeddings: tokenizer.add_special_tokens({'pad_token': '<|pad|>'})",
    )  # fmt: skip


def _ends(tokenizer: Any, text: str) -> bool:
    """Whether a token begins or ends texts or turns. `<|endoftext|>`, the end of a document, may pad where it is not the end token."""
    return text in (tokenizer.eos_token, tokenizer.bos_token) or (bool(_END_MARKER.search(text)) and "endoftext" not in text)
