"""Text of pretraining as blocks: which documents, how often, in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ..console import note
from ..errors import SopError
from . import cache, corpus
from .batches import CausalCollator, MaskedCollator
from .packing import Blocks, Examples
from .settings import paths
from .tokens import TokenSet

if TYPE_CHECKING:
    from .precision import Precision
    from .pretrain import PretrainConfig, PretrainData

_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(kw_only=True)
class Prepared:
    """Everything that the phases need, loaded; `model` changes hands from phase to phase."""

    model: Any
    tokenizer: Any
    objective: Literal["causal", "mlm"]
    tokens: TokenSet
    dataset: Blocks | Examples
    collator: Any
    precision: Precision
    reports: Any
    rows: dict[str, Any]
    new_rows: range | None
    measure: Callable[[], float | None] = lambda: None


def prepare(config: PretrainConfig, work: Path) -> Prepared:
    """Tokenise first, then load the model."""
    import transformers

    from . import adapters, precision, preflight, setup, trace
    from .loop import supervised_loss
    from .model import kind_of, load_model, load_tokenizer

    setup.quiet()
    flags = config.training_args
    chosen = precision.choose(config.precision, flags)
    note(f"precision: {chosen.mode} ({chosen.reason})")
    preflight.machine(config, qlora=False)
    tokenizer = load_tokenizer(config.tokenizer_source)
    kind = kind_of(config.model_name_or_path)
    objective: Literal["causal", "mlm"] = "mlm" if kind == "masked" else "causal"
    tokens = _documents(config, tokenizer, objective, "train")
    held_out = _documents(config, tokenizer, objective, "eval") if config.data.eval_file else None
    corpus.keep_apart(tokens, held_out, config.eval_overlap)
    dataset: Blocks | Examples = Blocks(tokens, reading_order(tokens, config.data, config.seed), config.data.block_size) if objective == "causal" else Examples(tokens)
    setup.check_length(config)
    transformers.set_seed(config.seed)
    model = load_model(config.model_name_or_path, kind=kind, dtype="float32", attn_implementation=config.attn_implementation)
    setup.make_saveable(model)
    setup.place(model, config)
    new_rows = adapters.new_rows(config.tokenizer_source, config.model_name_or_path)
    setup.fits(tokenizer, model, new_rows, config)
    prepared = Prepared(
        model=model, tokenizer=tokenizer, objective=objective, tokens=tokens, dataset=dataset, collator=_collator(config, tokenizer, objective), precision=chosen,
        reports=trace.start(config.trace, config.trace_project, work), rows=corpus.counts(tokens.meta),
        new_rows=new_rows,
    )  # fmt: skip
    if held_out:
        items = Blocks(held_out, np.arange(len(held_out)), config.data.block_size) if objective == "causal" else Examples(held_out)
        batch = int(flags.get("per_device_eval_batch_size", 4))

        def measure() -> float | None:
            return round(supervised_loss(prepared.model, items, prepared.collator, batch_size=batch, autocast=chosen.autocast)[0], 6)

        prepared.measure = measure
    return prepared


def _documents(config: PretrainConfig, tokenizer: Any, objective: str, part: Literal["train", "eval"]) -> TokenSet:
    data = config.data
    training = part == "train"
    files = [*paths(data.train_file), *([data.replay_file] if data.replay_file else [])] if training else [data.eval_file]
    most = data.max_samples if training else data.max_eval_samples
    return corpus.documents(
        [f for f in files if f], cache.of(config), tokenizer, end=document_end(tokenizer, data.document_end) if objective == "causal" else 0, text_fields=data.text_fields,
        max_samples=most, wrap=objective == "mlm", max_length=data.block_size,
    )  # fmt: skip


def document_end(tokenizer: Any, wanted: str) -> int:
    """The id that closes a document.

    Raises:
        SopError: where the vocabulary has no such token.
    """
    for text in _DOCUMENT_ENDS if wanted == "auto" else (wanted,):
        if text in tokenizer.get_vocab():
            return int(tokenizer.convert_tokens_to_ids(text))
    if wanted != "auto" or tokenizer.eos_token_id is None:
        raise SopError(f"the vocabulary has no token {wanted!r} to close a document with", where="data.document_end", fix="name one of its special tokens")
    return int(tokenizer.eos_token_id)


def _collator(config: PretrainConfig, tokenizer: Any, objective: str) -> Any:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if objective == "causal":
        return CausalCollator(pad if pad is not None else 0)
    return MaskedCollator(pad, tokenizer.mask_token_id, len(tokenizer), frozenset(tokenizer.all_special_ids), config.mlm_probability, config.seed)


def reading_order(tokens: TokenSet, data: PretrainData, seed: int) -> npt.NDArray[np.int64]:
    """Indices of the documents of one pass, shuffled, each as often as its file's weight says; cut at `max_tokens`."""
    generator = np.random.default_rng(seed)
    names: list[str] = tokens.meta["groups"]
    unknown = sorted(set(data.mix) - set(names))
    if unknown:
        raise SopError(f"data.mix names files that are not read: {', '.join(unknown)}", where="data.mix", fix=f"the files are: {', '.join(names)}")
    weights = np.array([data.mix.get(name, 1.0) for name in names])
    replay = names.index(data.replay_file.name) if data.replay_file and data.replay_file.name in names else None
    if replay is not None and data.replay_share:
        weights[replay] = _replay_weight(tokens, weights, replay, data.replay_share)
    wanted = weights[tokens.groups]
    times = np.floor(wanted).astype(np.int64)
    times += generator.random(len(tokens)) < wanted - times
    order = np.repeat(np.arange(len(tokens)), times)
    generator.shuffle(order)
    if data.max_tokens is not None:
        order = order[: int(np.searchsorted(np.cumsum(tokens.lengths[order]), data.max_tokens)) + 1]
    if not len(order):
        raise SopError("no document is left to read", where="data.mix", fix="raise a weight")
    return order


def _replay_weight(tokens: TokenSet, weights: npt.NDArray[np.float64], replay: int, share: float) -> float:
    """The weight that makes `share` of all tokens come from the replay file."""
    sums = np.bincount(tokens.groups, weights=tokens.lengths, minlength=len(weights))
    others = float((sums * weights).sum() - sums[replay] * weights[replay])
    return share / (1 - share) * others / float(sums[replay])
