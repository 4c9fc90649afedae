"""`sop tokenizer baseline`: record a base tokenizer as the contract that an extension is checked against."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifact import files_below, sha256_file, sha256_json
from ..stage import Artifact, Run, stage_main
from . import regression
from .base import Base, gather, open_base, resolve, tokenizer_files
from .earlier import TokenizerStage
from .settings import Json, TokenizerConfig, local

RECORD = "baseline.json"
TOKENIZER = "tokenizer"


def build(run: Run[TokenizerConfig]) -> dict[str, Any]:
    """Copy the tokenizer's files and describe what they do."""
    from ..train.model import load_tokenizer

    gather(resolve(run.config.base_tokenizer, run.config.huggingface), run.work / TOKENIZER)
    base, tokenizer = open_base(run.work / TOKENIZER), load_tokenizer(run.work / TOKENIZER)
    record = describe(base, tokenizer)
    (run.work / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    return {k: record[k] for k in ("kind", "class", "tokens", "model_tokens", "added_tokens", "vocab_sha256")} | {"special_ids": len(record["special_ids"])}


def describe(base: Base, tokenizer: Any) -> Json:
    """Class, sizes, special ids, normaliser, pre-tokenizer, decoder, hashes of template, vocabulary, files and of the regression set's ids."""
    vocab = tokenizer.get_vocab()
    template = tokenizer.chat_template
    return {
        "kind": base.kind, "class": type(tokenizer).__name__,
        "tokens": len(tokenizer), "model_tokens": len(base.vocab), "added_tokens": len(base.added), "highest_id": max(vocab.values()),
        "special_ids": special_ids(tokenizer), "special_roles": {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
        **{part: base.data.get(part) for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor")},
        "chat_template_sha256": hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else None,
        "vocab_sha256": sha256_json(sorted(vocab.items())),
        "regression_sha256": {name: sha256_json(tokenizer(list(regression.lines(name)), add_special_tokens=False)["input_ids"]) for name in regression.NAMES},
        "files": {str(p.relative_to(base.folder)): sha256_file(p) for p in files_below(base.folder)},
    }  # fmt: skip


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Every special and added token with its id, by name."""
    return {token.content: i for i, token in sorted(tokenizer.added_tokens_decoder.items())}


def inputs(config: TokenizerConfig) -> Mapping[str, Path]:
    """The files of a local base tokenizer; weights beside them do not count."""
    folder = local(config.base_tokenizer)
    return {p.name: p for p in tokenizer_files(folder)} if folder else {}


def opened(config: TokenizerConfig) -> Base:
    """The base tokenizer as the baseline stage kept it."""
    return open_base(folder(config))


def folder(config: TokenizerConfig) -> Path:
    """Where the baseline stage keeps the base tokenizer's files."""
    return config.below("baseline").folder / TOKENIZER


def summary(done: Artifact) -> list[str]:
    """One line."""
    s = done.stats
    return [f"{s['class']} ({s['kind']}): {s['tokens']} tokens, {s['special_ids']} of them special or added"]


def _plan(config: TokenizerConfig) -> Sequence[str]:
    return [f"record the tokenizer of {config.base_tokenizer}"]


STAGE = TokenizerStage(
    name="tokenizer.baseline", version=1, config=TokenizerConfig, output=lambda c: c.below("baseline"), build=build, inputs=inputs,
    uses=("base_tokenizer", "huggingface"), plan=_plan, summary=summary, next=lambda c: "sop tokenizer corpus",
)  # fmt: skip


def run(config: TokenizerConfig) -> Artifact:
    """Record the base tokenizer."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop tokenizer baseline`."""
    return stage_main(STAGE, argv)
