"""Which columns of a weight matrix matter: the mean squared input of each, over a text of the user (what llama.cpp calls an importance matrix)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DATA, USAGE, SopError

if TYPE_CHECKING:
    import numpy as np


def importance(model: Any, sequences: Sequence[Sequence[int]], architecture: str) -> dict[str, np.ndarray]:
    """GGUF name of each linear layer's matrix -> `[columns]` mean squared input, float32.

    Args:
        model: the source, in eval mode.
        sequences: token ids, each at most as long as the model's context.
        architecture: llama.cpp's name of the architecture (`general.architecture` of the unquantised file).

    Raises:
        SopError: where the matrices of this architecture are not plain linear layers (experts), or there is no text.
    """
    import gguf
    import torch

    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], model.config.get_text_config().num_hidden_layers)
    sums: dict[str, Any] = {}
    seen = 0
    hooks = []
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        target = names.get_name(f"{name}.weight", try_suffixes=(".weight",)) if isinstance(module, torch.nn.Linear) else None
        if target:
            target = "token_embd.weight" if tied and module is model.get_output_embeddings() else target
            hooks.append(module.register_forward_pre_hook(_counter(sums, target)))
    if not hooks:
        raise SopError("no linear layer of this architecture has a name in GGUF", fix="leave `imatrix` out", code=USAGE)
    try:
        with torch.inference_mode():
            for ids in sequences:
                model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
                seen += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise SopError("there is no text to measure importance on", fix="check `imatrix`", code=DATA)
    return {name: (total / seen).float().cpu().numpy() for name, total in sums.items()}


def _counter(sums: dict[str, Any], name: str) -> Any:
    def add(_: Any, inputs: tuple[Any, ...]) -> None:
        squares = inputs[0].detach().double().flatten(0, -2).square().sum(dim=0)
        sums[name] = squares if name not in sums else sums[name] + squares

    return add
