"""Rows -> token sets: conversations rendered for fine-tuning, documents for pretraining. Every row is counted: kept, or dropped with a reason."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Protocol

from .. import errors
from ..console import note, progress, warn
from ..data import records
from ..data.formats import RowError, to_messages, to_text, tools_of
from ..errors import SopError
from ..workers import ordered
from . import cache, machine, tokens
from .cache import Cache
from .encoding import batches, special_tokens_as_text
from .settings import Overlong
from .tokens import Encoded, TokenSet

_BLOCK_ROWS = 256


def conversations(
    files: Sequence[Path], store: Cache, renderer: Any, *, max_length: int, overlong: Overlong, max_samples: int | None = None, workers: int | None = 1
) -> TokenSet:
    """The token set of every row of `files`, rendered in `workers` processes (None: by the size of the files), or found in `store`. Collective.

    Raises:
        SopError: where no row is left to train on (exit 3).
    """

    def write(folder: Path) -> None:
        meta = _meta()
        with progress(f"tokenise {files[0].name}", unit="rows") as advance:
            prepare = functools.partial(_rendering, renderer=renderer, max_length=max_length, overlong=overlong)
            rendered = ordered(prepare, blocks(some(files, max_samples)), workers or workers_for(files), key="data.workers=1")
            tokens.write(folder, _counted(chain.from_iterable(rendered), meta, advance), meta)

    asked = cache.key(files, renderer.tokenizer, kind="conversations", **renderer.identity, max_length=max_length, overlong=overlong, max_samples=max_samples)
    made, known = _opened(store, asked, write)
    cut = made.meta["truncated"]
    return _checked(made, files, [*([f"{cut:,} cut at {max_length:,} tokens"] if cut else []), *known])


def counts(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a token set's meta that a manifest shows: total = kept + sum(dropped)."""
    dropped = dict(sorted(meta["dropped"].items()))
    kept = meta["total"] - sum(dropped.values())
    return {"total": meta["total"], "kept": kept, "dropped": dropped, "truncated": meta["truncated"], "examples": meta["examples"], "tokens": meta["tokens"]}


def _opened(store: Cache, asked: Mapping[str, Any], write: Callable[[Path], None]) -> tuple[TokenSet, list[str]]:
    """(The token set that `asked` names, what is worth saying about where it came from)."""
    folder, there = store.folder(asked, write)
    made = tokens.read(folder)
    assert made is not None
    return made, ["tokenised before"] if there else []


def _meta() -> dict[str, Any]:
    return {"total": 0, "truncated": 0, "dropped": Counter[str]()}


def workers_for(files: Sequence[Path]) -> int:
    """How many processes tokenise these files. Starting processes costs seconds: one alone up to 16 MiB."""
    size = sum(p.stat().st_size for f in files for p in (f.rglob("*") if f.is_dir() else [f]) if p.is_file())
    return machine.cores() if size > 16 << 20 else 1


def _counted(rows: Iterator[str | tuple[Encoded, bool]], meta: dict[str, Any], advance: Any) -> Iterator[Encoded]:
    for found in rows:
        meta["total"] += 1
        advance()
        if isinstance(found, str):
            meta["dropped"][found] += 1
            continue
        example, cut = found
        meta["truncated"] += cut
        yield example


def blocks(rows: Iterator[records.Record]) -> Iterator[list[records.Record]]:
    """Records in the pieces that one process takes at a time."""
    while block := list(islice(rows, _BLOCK_ROWS)):
        yield block


def _rendering(renderer: Any, max_length: int, overlong: Overlong) -> Callable[[list[records.Record]], list[str | tuple[Encoded, bool]]]:
    return lambda block: [_render_one(record, renderer=renderer, max_length=max_length, overlong=overlong) for record in block]


def _render_one(record: records.Record, *, renderer: Any, max_length: int, overlong: Overlong) -> str | tuple[Encoded, bool]:
    """(A row's ids with the weight of each in the loss, cut?), or the reason why it is dropped."""
    if record.row is None:
        return record.error or "malformed"
    try:
        rendered = renderer.render(to_messages(record.row), tools=tools_of(record.row))
    except RowError as error:
        return error.reason
    except SopError:
        return "template_refuses"
    ids, weights = rendered.ids, rendered.weights
    if not any(weights[1:]):
        return "nothing_to_learn"
    cut = len(ids) > max_length
    if cut and overlong == "drop":
        return "too_long"
    if cut:
        ids, weights = ids[:max_length], weights[:max_length]
        if not any(weights[1:]):
            return "nothing_to_learn_before_the_cut"
    return Encoded(ids, weights, source_of(record), Path(record.file).name), cut


def documents(
    files: Sequence[Path], store: Cache, tokenizer: Any, *, end: int, text_fields: Sequence[str] = (), max_samples: int | None = None,
    wrap: bool = False, max_length: int | None = None,
) -> TokenSet:  # fmt: skip
    """The token set of every text of `files`, each closed with the id `end` (or, with `wrap`, between the tokenizer's own special tokens, in parts of `max_length`); encoded,
    or found in `store`. Collective.

    Raises:
        SopError: where no row is left to train on (exit 3).
    """

    def write(folder: Path) -> None:
        meta = _meta()
        with progress(f"tokenise {files[0].name}", unit="rows") as advance:
            tokens.write(folder, _encoded(some(files, max_samples), tokenizer, end, text_fields, meta, advance, wrap, max_length), meta)

    limit = max_length if wrap else None  # whole documents are cut into blocks later
    asked = cache.key(files, tokenizer, kind="documents", end=end, text_fields=text_fields, max_samples=max_samples, wrap=wrap, max_length=limit)
    made, known = _opened(store, asked, write)
    return _checked(made, files, known)


def _encoded(
    rows: Iterator[records.Record], tokenizer: Any, end: int, text_fields: Sequence[str], meta: dict[str, Any], advance: Any, wrap: bool, max_length: int | None
) -> Iterator[Encoded]:
    def texts() -> Iterator[tuple[str, str, str]]:
        """(Text, where it came from, its group)."""
        for record in rows:
            meta["total"] += 1
            advance()
            try:
                text = to_text(record.row, text_fields) if record.row is not None else None
            except RowError as error:
                meta["dropped"][error.reason] += 1
                continue
            if text and text.strip():
                yield text, source_of(record), Path(record.file).name
            else:
                meta["dropped"]["empty" if text is not None else record.error or "malformed"] += 1

    for batch in batches(texts(), lambda item: item[0]):
        with special_tokens_as_text(tokenizer) as options:  # a `<|im_end|>` that someone wrote in a text is text, never a control token
            encoded = tokenizer([text for text, _, _ in batch], add_special_tokens=not wrap, **options)["input_ids"]
        for ids, (_, source, group) in zip(encoded, batch, strict=True):
            if wrap:
                head, tail = ([i] if i is not None else [] for i in (tokenizer.cls_token_id, tokenizer.sep_token_id))
                size = (max_length or len(ids) + 2) - len(head) - len(tail)
                for at in range(0, len(ids), size):
                    yield Encoded([*head, *ids[at : at + size], *tail], True, source, group)
            else:
                yield Encoded(ids if ids and ids[-1] == end else [*ids, end], True, source, group)


class Digested(Protocol):
    """Examples that can be told apart: a hash and a source of each."""

    def digests(self) -> Iterator[bytes]: ...

    def names(self, indices: Sequence[int]) -> list[str]: ...


def keep_apart(train: Digested, held_out: Digested | None, mode: Literal["refuse", "warn"]) -> None:
    """See that no held-out example is learned, token for token: what is measured on it would be memory.

    Raises:
        SopError: exit 3 where one is (with `mode` warn it is said, and the training goes on).
    """
    if held_out is None:
        return
    measured = list(held_out.digests())
    learned = set(measured).intersection(train.digests())  # the larger set is not held in memory
    both = [i for i, digest in enumerate(measured) if digest in learned]
    if not both:
        return
    what = f"{len(both):,} of {len(measured):,} held-out examples are in the training data as well, token for token (first: {held_out.names(both[:1])[0]})"
    if mode == "warn":
        warn(what)
        return
    fix = "take them out of one of the files (`sop data process` keeps the same text on one side), or write eval_overlap: warn"
    raise SopError(what, where="data.eval_file", fix=fix, code=errors.DATA)


def source_of(record: records.Record) -> str:
    """Where a record came from, for messages."""
    return str((record.row or {}).get("_source") or f"{Path(record.file).name}:{record.line}")


def some(files: Sequence[Path], most: int | None) -> Iterator[records.Record]:
    """Every record, or (in their order) the `most` whose content hash is smallest: a sample that one changed row does not reshuffle."""
    if most is None:
        yield from records.read(files)
        return
    ranked = sorted((hashlib.sha256(r.raw.encode(errors="surrogatepass")).digest(), i) for i, r in enumerate(records.read(files)))
    chosen = {i for _, i in ranked[:most]}
    yield from (r for i, r in enumerate(records.read(files)) if i in chosen)


def _checked(made: TokenSet, files: Sequence[Path], remarks: Sequence[str]) -> TokenSet:
    meta: Mapping[str, Any] = made.meta
    dropped = sum(meta["dropped"].values())
    said = f"{', '.join(p.name for p in files)}: {meta['total']:,} rows, {meta['total'] - dropped:,} kept, {meta['tokens']:,} tokens"
    note("; ".join([said, *remarks]) + (f"; dropped: {', '.join(f'{k} {v:,}' for k, v in sorted(meta['dropped'].items()))}" if dropped else ""))
    if not len(made):
        reasons = ", ".join(f"{k} ({v:,})" for k, v in meta["dropped"].items()) or "the file has no rows"
        raise SopError(f"no row is left to train on: {reasons}", where=", ".join(map(str, files)), fix="look at the rows, or at data.max_length", code=errors.DATA)
    if dropped > meta["total"] / 2:
        warn(f"more than half of the rows were dropped ({dropped:,} of {meta['total']:,})")
    return made
