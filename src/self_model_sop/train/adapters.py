"""LoRA and its relatives through peft, with the new rows of an expanded vocabulary trained beside the adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import errors
from ..config import option
from ..errors import SopError

EXPANSION = "expansion.json"
NEW_ROWS = "trainable_tokens"  # in the names that peft gives to rows trained by themselves


@dataclass(frozen=True)
class Group:
    """What a group of parameters has of its own; None: what the run has. `epsilon` auto is resolved by the loop, which knows a step."""

    learning_rate: float | None = None
    epsilon: float | Literal["auto"] | None = None


@dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """`peft:` adapter training; `enabled: false` trains every weight."""

    enabled: bool = option(True, "LoRA is applied when true; false: full fine-tuning")
    lora_r: int = option(8, "rank")
    lora_alpha: float = option(16.0, "scale; the update is multiplied by lora_alpha / lora_r")
    lora_dropout: float = option(0.0, "dropout on the adapter's input")
    target_modules: tuple[str, ...] | Literal["all-linear"] = option(("q_proj", "k_proj", "v_proj", "o_proj"), "names of the layers that get an adapter, or all-linear")
    qlora: bool = option(False, "4-bit NF4 base weights (needs a CUDA GPU and bitsandbytes)")
    dora: bool = option(False, "weight-decomposed LoRA (arXiv 2402.09353)")
    rslora: bool = option(False, "scale by lora_alpha / sqrt(lora_r) (arXiv 2312.03732)")
    init: Literal["default", "gaussian", "pissa", "olora", "orthogonal"] = option("default", "how the adapter starts; default: no change at step 0")
    new_rows: Literal["auto", "train", "freeze"] = option("auto", "rows of an expanded vocabulary; auto: trained where expansion.json is beside the tokenizer")
    new_rows_learning_rate: float | None = option(None, "none: the run's learning rate")
    new_rows_epsilon: float | Literal["auto"] | None = option(None, "Adam's epsilon for the new rows; auto: 1 / learned tokens of a step (sft); none: the run's (docs/training.md)")
    lora_plus_ratio: float | None = option(None, "learning rate of the B matrices, as a multiple of the run's (LoRA+, arXiv 2402.12354; 16 is its authors' choice)")

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError("peft.lora_r must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError("peft.lora_dropout must be in [0, 1)")
        if self.lora_plus_ratio is not None and self.lora_plus_ratio <= 0:
            raise ValueError("peft.lora_plus_ratio must be above 0")
        if self.new_rows_epsilon is not None and self.new_rows_epsilon != "auto" and self.new_rows_epsilon <= 0:
            raise ValueError("peft.new_rows_epsilon must be above 0")
        if self.qlora and not self.enabled:
            raise ValueError("peft.qlora needs peft.enabled: true")


def new_rows(*folders: str | Path) -> range | None:
    """The ids that an expansion appended, from the `expansion.json` of the first folder that has one.

    Raises:
        SopError: where the file is there but not readable.
    """
    for folder in folders:
        path = Path(folder) / EXPANSION
        if path.is_file():
            try:
                first, end = json.loads(path.read_text(encoding="utf-8"))["new_ids"]
                return range(int(first), int(end))
            except (ValueError, KeyError, TypeError):
                raise SopError("not an expansion record (new_ids: [first, last + 1])", where=str(path), fix="run `sop tokenizer extend` again", code=errors.DATA) from None
    return None


def optimizer_groups(settings: PeftSettings, arguments: Mapping[str, Any]) -> dict[str, Group]:
    """Part of a parameter's name -> what its optimizer group has of its own."""
    found = {NEW_ROWS: Group(settings.new_rows_learning_rate, settings.new_rows_epsilon)}
    if settings.lora_plus_ratio is not None:
        found["lora_B"] = Group(settings.lora_plus_ratio * float(arguments.get("learning_rate", 5e-5)))
    return found


def embedding_names(model: Any) -> list[str]:
    """Module names of the input embedding and, where it is not tied to it, of the output layer."""
    names = {id(module): name for name, module in model.named_modules()}
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    found = [names[id(inner)]]
    if outer is not None and outer.weight is not inner.weight:
        found.append(names[id(outer)])
    return found


def attach(model: Any, settings: PeftSettings, rows: range | None) -> Any:
    """The model with a fresh adapter; of an expanded vocabulary only `rows` are trained, old rows never move and tied weights stay tied.

    Raises:
        SopError: where a target module is not in the model.
    """
    import peft

    return peft.get_peft_model(model, adapter_config(model, settings, rows))


def adapter_config(model: Any, settings: PeftSettings, rows: range | None, *, task: str = "CAUSAL_LM") -> Any:
    """peft's config of the adapter; for `task` SEQ_CLS the scoring head is trained and saved too.

    Raises:
        SopError: where a target module is not in the model.
    """
    import peft

    wanted = settings.target_modules
    if not isinstance(wanted, str):
        missing = missing_targets(wanted, [name for name, _ in model.named_modules()])
        if missing:
            raise SopError(f"peft.target_modules: no layer named {', '.join(missing)} in {type(model).__name__}", fix="write all-linear, or names of this model")
    options: dict[str, Any] = {}
    if rows:
        options["trainable_token_indices"] = {name: list(rows) for name in embedding_names(model)}
    return peft.LoraConfig(
        task_type=task, r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        target_modules=wanted if isinstance(wanted, str) else list(wanted), use_dora=settings.dora, use_rslora=settings.rslora,
        init_lora_weights=True if settings.init == "default" else settings.init, **options,
    )  # fmt: skip


def give_bias(model: Any) -> None:
    """Let an output layer with trainable tokens answer for its `bias`, which peft's wrapper does not; TRL asks for it, to get log-probabilities without logits.

    (Its `weight` the wrapper knows: the trained rows, and with adapters disabled the old ones, as the reference of DPO needs them.)
    """
    if not hasattr(model, "peft_config"):
        return
    from peft.utils.other import TrainableTokensWrapper

    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            vars(module)["bias"] = getattr(module.original_module, "bias", None)  # not registered: it is the wrapped layer's


def attach_rows(model: Any, rows: range) -> Any:
    """The frozen model with only `rows` of its embeddings trainable (peft's trainable tokens); `merge_and_unload` writes them back."""
    import peft

    config = peft.TrainableTokensConfig(token_indices=list(rows), target_modules=embedding_names(model))
    return peft.get_peft_model(model, config)


def missing_targets(wanted: tuple[str, ...], names: list[str]) -> list[str]:
    """Which of the wanted names match no module (peft matches whole names or endings after a dot)."""
    return [w for w in wanted if not any(name == w or name.endswith("." + w) for name in names)]
