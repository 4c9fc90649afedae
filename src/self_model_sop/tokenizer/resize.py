"""`sop tokenizer resize`: grow a model's embeddings to an extended tokenizer; old rows stay bit-identical, new ones start from their pieces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import Target, files_below
from ..errors import DATA, SopError
from ..stage import Artifact, Run, Stage, stage_main
from ..train.preflight import kind_said, read_json
from .earlier import TokenizerStage
from .settings import Json, TokenizerConfig, local

if TYPE_CHECKING:
    from .new_rows import Init, NewRows

EXPANSION = "expansion.json"
PLAN = "plan.jsonl"
_NOT_TOKENIZER = {"config.json", "generation_config.json", PLAN, "gates.json"}
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
_SAMPLE = [{"role": "user", "content": "你好，什么是高血压？"}, {"role": "assistant", "content": "一种慢性病。"}, {"role": "user", "content": "Thanks!"}]


@dataclass(frozen=True)
class Expansion:
    """What an extended tokenizer added: the size of the base and the contiguous new ids `[first, last)`."""

    base_vocab_size: int
    ids: range
    record: Json


def read_expansion(folder: Path, base: Any, extended: Any) -> Expansion:
    """`expansion.json` of an extended tokenizer folder; without one, the ids after the base tokenizer's are the new ones.

    Raises:
        SopError: where the two tokenizers do not belong together.
    """
    path = folder / EXPANSION
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
    else:
        record = {"base_vocab_size": len(base), "new_ids": [_rows_of(base), _rows_of(extended)], "method": "unknown", "tokens": len(extended) - len(base)}
    first, last = record["new_ids"]
    if record["base_vocab_size"] != len(base):
        what = f"extended from a base of {record['base_vocab_size']} tokens, but the base tokenizer has {len(base)}"
        raise SopError(what, where=str(folder), fix="set base_tokenizer to the one that was extended", code=DATA)
    if not _rows_of(base) <= first <= last or last != max(_rows_of(extended), first):
        what = f"new ids {first}..{last - 1} do not follow the base's {_rows_of(base)} rows up to {_rows_of(extended)}"
        raise SopError(what, where=str(folder), fix="run the extend stage again", code=DATA)
    return Expansion(record["base_vocab_size"], range(first, last), record)


def _rows_of(tokenizer: Any) -> int:
    """Rows that a model needs for a tokenizer: the highest id + 1 (ids may have holes)."""
    return 1 + int(max(tokenizer.get_vocab().values()))


def check_same_base(base: Any, extended: Any, where: str) -> None:
    """Every base token keeps its id, special tokens their role, the chat template its text.

    Raises:
        SopError: naming the first token that moved.
    """
    new = extended.get_vocab()
    moved = next(((t, i, new.get(t)) for t, i in base.get_vocab().items() if new.get(t) != i), None)
    if moved:
        what = f"base token {moved[0]!r} had id {moved[1]} and now has {moved[2]}"
        raise SopError(what, where=where, fix="the tokenizer was not extended by appending; run the extend stage again", code=DATA)
    for role, token in base.special_tokens_map.items():
        # A class chosen by a config.json beside the tokenizer may add roles (unk_token): absent is not moved.
        if extended.special_tokens_map.get(role, token) != token:
            raise SopError(f"{role} was {token!r} and now is {extended.special_tokens_map.get(role)!r}", where=where, fix="run the extend stage again", code=DATA)
    if base.chat_template:
        texts = [t.apply_chat_template(_SAMPLE, tokenize=False, add_generation_prompt=True) for t in (base, extended)]
        if texts[0] != texts[1]:
            raise SopError("the chat template of the extended tokenizer renders another text", where=where, fix="copy the base tokenizer's chat template", code=DATA)


# --- growing ------------------------------------------------------------------------------------------------------------------------------


def rows_needed(rows: int, last: int, multiple: int | None) -> int:
    """Rows after growing: spare rows are used first, a multiple only rounds up, nothing ever shrinks."""
    needed = max(rows, last)
    return -(-needed // multiple) * multiple if multiple else needed


def is_tied(model: Any) -> bool:
    """True where the output layer shares the input embeddings' storage (or there is no output layer)."""
    head = model.get_output_embeddings()
    return head is None or head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def grow(model: Any, rows: int, values: NewRows, ids: range, *, old: int) -> None:
    """Grow to `rows` rows and write the values of `ids`; rows that no token uses get the mean row, so that they never win an argmax."""
    import torch

    before = model.get_input_embeddings().weight.shape[0]
    if rows > before:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    with torch.no_grad():
        tables = [(model.get_input_embeddings().weight, values.input)]
        if values.output is not None:
            tables.append((head.weight, values.output))
        if values.bias is not None:
            tables.append((head.bias, values.bias))
        for table, new in tables:
            table[before:] = table[:old].float().mean(0).to(table)
            table[ids.start : ids.stop] = new.to(table)


def _old_parts(model: Any, old: int, ids: range) -> dict[str, Any]:
    """Clones of every row that must not move, by name; spare rows that no new token takes are among them."""
    import torch

    head = model.get_output_embeddings()
    tables = {"input": model.get_input_embeddings().weight, "output": getattr(head, "weight", None), "bias": getattr(head, "bias", None)}
    return {name: torch.cat([t.detach()[: min(ids.start, old)], t.detach()[ids.stop : old]]).clone() for name, t in tables.items() if t is not None}


# --- the stage ----------------------------------------------------------------------------------------------------------------------------


def build(run: Run[TokenizerConfig]) -> dict[str, Any]:
    """Load, grow, initialise, save, reload, verify."""
    from ..train.model import kind_of, load_model, load_tokenizer

    config, settings = run.config, run.config.resize
    base, extended = load_tokenizer(config.base_tokenizer), load_tokenizer(config.extended_tokenizer)
    check_same_base(base, extended, str(config.extended_tokenizer))
    expansion = read_expansion(config.extended_tokenizer, base, extended)
    kind = kind_of(config.model_source()) if settings.kind == "auto" else settings.kind
    for key, what, fix in _calibration_of(settings.init, kind):  # of a hub id this is known only now
        raise SopError(what, where=key, fix=fix)
    model = load_model(config.model_source(), kind=kind, dtype=settings.dtype)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < _rows_of(base):
        what = f"the model has {rows} embedding rows, its tokenizer needs {_rows_of(base)}"
        raise SopError(what, where=config.model_source(), fix="base_model and base_tokenizer do not belong together: set both to the same source", code=DATA)
    tied = is_tied(model)
    old = _old_parts(model, rows, expansion.ids)
    init, values = _values(config, kind, model, base, extended, expansion, tied)
    after = rows_needed(rows, expansion.ids.stop, settings.pad_to_multiple_of)
    grow(model, after, values, expansion.ids, old=min(expansion.ids.start, rows))
    if init == "calibrated":
        grow(model, after, _calibrated(config, model, base, extended, expansion, values), expansion.ids, old=min(expansion.ids.start, rows))
    model.save_pretrained(run.work)
    copy_tokenizer(config.extended_tokenizer, run.work, expansion)
    del model
    model, tokenizer = load_model(run.work, kind=kind, dtype="auto"), load_tokenizer(run.work)
    check_same_base(base, tokenizer, str(run.work))
    check_same_text(extended, tokenizer, expansion.ids, str(run.work))
    verify(model, tokenizer, old=old, ids=expansion.ids, rows=after, before=rows, tied=tied, where=str(run.work))
    return {
        "kind": kind, "rows_before": rows, "rows_after": after, "new_rows": len(expansion.ids), "new_ids": [expansion.ids.start, expansion.ids.stop],
        "init": init, "tied": tied, "params": sum(p.numel() for p in model.parameters()), "dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip


def _values(config: TokenizerConfig, kind: str, model: Any, base: Any, extended: Any, expansion: Expansion, tied: bool) -> tuple[Init, NewRows]:
    """The method and the values of the new rows; a count bias is fitted on the corpus stage's training text, else on the plan's."""
    from . import new_rows as rows

    plan, texts = rows.read_plan(plan_path(config)), training_text(config)
    init = config.resize.init
    if init == "auto":
        if tied:
            init = "calibrated" if kind == "causal" and texts else "mean_of_pieces"
        else:
            init = "count_bias" if texts or plan else "weighted"
    tables = rows.Tables.of(model, expansion.ids.start)
    if init == "random" or init == "library":
        return init, rows.plain_rows(tables, len(expansion.ids), init, config.seed)
    pieces = rows.pieces_of(base, extended, expansion.ids, plan)
    values = rows.mixed_rows(tables, pieces, init)
    if init != "count_bias":
        return init, values
    counts = rows.count_text(base, extended, expansion.ids, texts) if texts else rows.count_plan(plan, expansion.ids, pieces)
    direction = None if values.bias is not None else rows.output_direction(model, base, texts or [row["text"] for row in plan.values()])
    return init, rows.add_count_bias(values, pieces, counts, config.resize.count_bias, direction)


def _calibrated(config: TokenizerConfig, model: Any, base: Any, extended: Any, expansion: Expansion, values: NewRows) -> NewRows:
    """The rows of a grown model, moved so that it expects each new token as often as the corpus stage's training text has it."""
    from . import new_rows as rows

    texts = training_text(config)
    uses = rows.count_text(base, extended, expansion.ids, texts).new
    return rows.shifted(values, *rows.calibration(model, extended, texts, expansion.ids, uses))


def plan_path(config: TokenizerConfig) -> Path | None:
    """The plan beside the extended tokenizer, else the select stage's."""
    return next((p for p in (config.extended_tokenizer / PLAN, config.below("selection").folder / PLAN) if p.is_file()), None)


def training_text(config: TokenizerConfig, limit: int = 20_000) -> list[str]:
    """Up to `limit` documents of the corpus stage's training text, evenly spread; none where that stage has not run."""
    from .corpus import TRAIN, documents

    path = config.below("corpus").folder / TRAIN
    return [document.text for document in documents(path, limit)] if path.is_file() else []


def copy_tokenizer(source: Path, target: Path, expansion: Expansion) -> None:
    """Copy the tokenizer's files byte for byte (loading and saving again would rewrite them); weights, model configs and reports stay behind."""
    for path in files_below(source):
        name = path.relative_to(source)
        if str(name) in _NOT_TOKENIZER or path.name.endswith(_WEIGHTS):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
    if not (target / EXPANSION).is_file():
        (target / EXPANSION).write_text(json.dumps(expansion.record), encoding="utf-8")


def check_same_text(extended: Any, saved: Any, ids: range, where: str) -> None:
    """The copied tokenizer, which loads by the class that the model's config names, writes every new token's text as the extended one does.

    Raises:
        SopError: naming the first text that it writes otherwise.
    """
    texts = [extended.decode([i]) for i in ids]
    pairs = zip(texts, extended(texts, add_special_tokens=False)["input_ids"], saved(texts, add_special_tokens=False)["input_ids"], strict=True) if texts else ()
    wrong = next(((t, a, b) for t, a, b in pairs if a != b), None)
    if wrong:
        what = f"beside the model's config the tokenizer writes {wrong[0]!r} as {wrong[2]}, the extended one as {wrong[1]}"
        raise SopError(what, where=where, fix="name tokenizer_class in tokenizer_config.json", code=DATA)


def verify(model: Any, tokenizer: Any, *, old: Mapping[str, Any], ids: range, rows: int, before: int, tied: bool, where: str) -> None:
    """Check the reloaded model: rows, tie, old rows bit for bit, finite outputs, generation.

    Raises:
        SopError: naming what does not hold.
    """
    import torch

    def fail(what: str) -> None:
        fix = "this is a fault of the model class or of self-model-sop; nothing was published"
        raise SopError(f"the saved model does not pass its check: {what}", where=where, fix=fix, code=DATA)

    table = model.get_input_embeddings().weight
    if table.shape[0] != rows or model.config.get_text_config().vocab_size != rows:
        fail(f"{table.shape[0]} rows and vocab_size {model.config.get_text_config().vocab_size}, expected {rows}")
    if is_tied(model) != tied:
        fail("input and output embeddings were tied and no longer are" if tied else "input and output embeddings became tied")
    for name, now in _old_parts(model, before, ids).items():
        if not torch.equal(now, old[name]):
            fail(f"old {name} rows have changed")
    with torch.inference_mode():
        probe = torch.tensor([(tokenizer("高血压 test", add_special_tokens=False)["input_ids"] + list(ids)[-4:])], device=model.device)
        more = {"decoder_input_ids": probe} if model.config.is_encoder_decoder else {}
        if not torch.isfinite(model(input_ids=probe, **more).logits).all():
            fail("outputs are not finite")
        if model.can_generate():
            model.generate(probe, attention_mask=torch.ones_like(probe), max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)


def _inputs(config: TokenizerConfig) -> dict[str, Path | None]:
    found = {"base_model": local(config.model_source()), "base_tokenizer": local(config.base_tokenizer), "extended_tokenizer": config.extended_tokenizer, "plan": plan_path(config)}
    if config.resize.init in ("auto", "count_bias", "calibrated"):
        found["corpus"] = local(config.below("corpus").folder)
    return found


def _preflight(config: TokenizerConfig) -> Sequence[tuple[str, str, str]]:
    multiple, kind = config.resize.pad_to_multiple_of, config.resize.kind
    said = kind_said(read_json(config.model_source(), "config.json") or {}) if kind == "auto" else kind
    found = [("resize.pad_to_multiple_of", f"{multiple} is no number of rows", "for example 64; leave it out for none")] if multiple is not None and multiple < 1 else []
    return [*found, *_calibration_of(config.resize.init, said)]


def _calibration_of(init: str, kind: str | None) -> Sequence[tuple[str, str, str]]:
    """What is wrong with calibrating the rows of a model of this kind (None: not known yet)."""
    wrong = init == "calibrated" and kind not in ("causal", None)
    return [("resize.init", f"calibrated is for causal models, this is a {kind} one", "choose mean_of_pieces")] if wrong else []


def _summary(done: Artifact) -> list[str]:
    s = done.stats
    tied = "tied" if s["tied"] else "untied"
    return [f"{s['rows_before']} -> {s['rows_after']} rows, {s['new_rows']} new ones by {s['init']} ({tied}, {s['params'] / 1e6:.1f} M parameters, {s['dtype']})"]


def _earlier(config: TokenizerConfig) -> list[Stage[TokenizerConfig]]:
    """The extended tokenizer is made where there is none, and taken as it is where there is one."""
    if config.extended_tokenizer.is_dir() and any(p for p in config.extended_tokenizer.iterdir() if not p.name.startswith(".")):
        return []
    from . import extend

    return [extend.STAGE]


STAGE = TokenizerStage(
    name="tokenizer.resize", version=2, config=TokenizerConfig, output=lambda config: Target(config.extended_model), inputs=_inputs,
    uses=("base_tokenizer", "base_model", "resize", "huggingface", "seed"), build=build, preflight=_preflight, summary=_summary, earlier=_earlier,
    plan=lambda config: [f"model {config.model_source()}, tokenizer {config.extended_tokenizer}, new rows by {config.resize.init}"],
    next=lambda config: f"sop train pretrain model_name_or_path={config.extended_model}",
)  # fmt: skip


def run(config: TokenizerConfig) -> Artifact:
    """Grow the embeddings, or find it done."""
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sop tokenizer resize`."""
    return stage_main(STAGE, argv)
