"""An opened base tokenizer: its files, its parsed `tokenizer.json`, and its tokens as bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import DATA, SopError
from ..hub import HubConfig, resolve_model
from .settings import Json

Kind = Literal["byte_bpe", "sentencepiece_bpe", "unigram", "wordpiece"]

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip
SENTENCEPIECE = tuple(name for name in FILES if name.endswith(".model"))
_STALE = ("vocab.json", "merges.txt", "added_tokens.json")  # second spellings of what tokenizer.json says: an extension leaves them out


def _byte_alphabet() -> dict[int, str]:
    """The printable character of each byte in byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = (b for b in range(256) if b not in plain)
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(spare)}


BYTE_TO_CHARACTER = _byte_alphabet()
CHARACTER_TO_BYTE = {c: b for b, c in BYTE_TO_CHARACTER.items()}


def spell(data: bytes) -> str:
    """Bytes in the spelling of a byte-level vocabulary."""
    return "".join(BYTE_TO_CHARACTER[b] for b in data)


def unspell(token: str) -> bytes:
    """The bytes of a byte-level vocabulary entry; an entry of another spelling (a special token) is its UTF-8."""
    return bytes(CHARACTER_TO_BYTE[c] for c in token) if all(c in CHARACTER_TO_BYTE for c in token) else token.encode()


@dataclass(frozen=True)
class Base:
    """A tokenizer folder that holds `tokenizer.json`; `data` is that file, parsed."""

    folder: Path
    data: Json

    @cached_property
    def kind(self) -> Kind:
        """What the model is; decides the extension method."""
        return kind_of(self.data, str(self.folder))

    @cached_property
    def added(self) -> dict[int, str]:
        """Added (special and user) tokens by id."""
        return {a["id"]: a["content"] for a in self.data["added_tokens"]}

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Token -> id of the model, without added tokens that stand outside of it."""
        model = self.data["model"]
        return {piece: i for i, (piece, _) in enumerate(model["vocab"])} if isinstance(model["vocab"], list) else dict(model["vocab"])

    @cached_property
    def next_id(self) -> int:
        """The first id after every token of the model and every added token."""
        return 1 + max(*self.vocab.values(), *self.added, 0)

    @cached_property
    def size(self) -> int:
        """Number of tokens, as `len()` of a transformers tokenizer counts them."""
        return len({*self.vocab.values(), *self.added})

    @cached_property
    def bytes_of(self) -> dict[int, bytes]:
        """The bytes of every token."""
        out = {i: self.token_bytes(token) for token, i in self.vocab.items()}
        return out | {i: content.encode() for i, content in self.added.items()}

    def token_bytes(self, token: str) -> bytes:
        """The bytes that a vocabulary entry stands for."""
        if self.kind == "byte_bpe":
            return unspell(token)
        if self.kind == "wordpiece":
            return token.removeprefix("##").encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    @cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers` object without post-processor: no token that the text does not hold."""
        return bare(self.data)


def bare(data: Json) -> Any:
    """A `tokenizers.Tokenizer` of parsed JSON without post-processor."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps({**data, "post_processor": None, "truncation": None, "padding": None}))


def kind_of(data: Json, where: str) -> Kind:
    """The kind of a parsed `tokenizer.json`.

    Raises:
        SopError: for models that cannot be extended (WordLevel).
    """
    model = data["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece")
    if kind == "BPE":
        return "byte_bpe" if "ByteLevel" in json.dumps([data.get("pre_tokenizer"), data.get("decoder"), data.get("normalizer")]) else "sentencepiece_bpe"
    if kind in ("Unigram", "WordPiece"):
        return "unigram" if kind == "Unigram" else "wordpiece"
    raise SopError(f"a tokenizer of type {kind} cannot be extended", where=where, fix="use a base with a BPE, Unigram or WordPiece tokenizer", code=DATA)


def open_base(folder: Path) -> Base:
    """Open a folder that holds `tokenizer.json`.

    Raises:
        SopError: where there is none or it is broken.
    """
    path = folder / "tokenizer.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not {"model", "added_tokens"} <= data.keys():
            raise ValueError("no model or no added_tokens in it")
    except FileNotFoundError:
        raise SopError("no tokenizer.json here", where=str(folder), fix="point to a tokenizer folder") from None
    except ValueError as error:
        raise SopError(f"no tokenizer: {error}", where=str(path), fix="fetch the tokenizer again", code=DATA) from None
    return Base(folder, data)


def resolve(source: str | Path, hub: HubConfig) -> Path:
    """The local folder of a tokenizer: a folder as it is, a hub id through the hub."""
    return resolve_model(source, hub, weights=False)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files of a folder (weights and configs are none)."""
    return [folder / name for name in FILES if (folder / name).is_file()]


def gather(folder: Path, out: Path) -> None:
    """Copy a tokenizer's files to `out`; without a `tokenizer.json` it is made by the library's own conversion.

    Raises:
        SopError: where the folder holds no tokenizer that loads without remote code.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").is_file():
        convert(folder).save_pretrained(out)
    for path in tokenizer_files(folder):
        if not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


def convert(folder: Path) -> Any:
    """A transformers tokenizer of a folder without `tokenizer.json`. A lone `vocab.txt` is read as BERT's."""
    from transformers import BertTokenizer

    from ..train.model import load_tokenizer

    vocab = folder / "vocab.txt"
    if not vocab.is_file() or (folder / "tokenizer_config.json").is_file() or (folder / "config.json").is_file():
        return load_tokenizer(folder)
    words = vocab.read_text(encoding="utf-8").split("\n")
    cased = any(w.isascii() and w.isalpha() and w != w.lower() for w in words)
    return BertTokenizer.from_pretrained(str(folder), do_lower_case=not cased)


def copy_side_files(base: Base, out: Path, *, leave: Sequence[str] = ()) -> None:
    """Copy everything but `tokenizer.json`, files that would contradict it, and those named in `leave`."""
    for path in tokenizer_files(base.folder):
        if path.name not in ("tokenizer.json", *_STALE, *leave):
            shutil.copyfile(path, out / path.name)


def pinned(data: Json) -> Json:
    """A copy (of what an extension changes) in which every added token stands in the model's vocabulary with its id.

    Without this the `tokenizers` library numbers added tokens anew after the (grown) vocabulary when the file is loaded.
    """
    model = {k: v.copy() if isinstance(v, (dict, list)) else v for k, v in data["model"].items()}
    if isinstance(model["vocab"], dict):
        for added in data["added_tokens"]:
            model["vocab"].setdefault(added["content"], added["id"])
    return {**data, "model": model, "added_tokens": list(data["added_tokens"])}
