"""A model of transformers as one side of the parity gate: the source of every export, and exports that transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parity import Parity, Reference, refer
from .probes import shipped

if TYPE_CHECKING:
    import numpy as np

_BATCH = 8


class TorchSide:
    """A causal model and its tokenizer, asked through the one rendering.

    Args:
        model: in eval mode; its logits are taken in fp32.
        tokenizer: fast, with the template that was trained with.
        name: what reports call it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        from ..eval.perplexity import start_id
        from ..train.template import renderer_for

        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.renderer = renderer_for(tokenizer, None) if tokenizer.chat_template else None
        start = start_id(tokenizer)
        self._start = [] if start is None else [start]

    def template(self) -> str | None:
        found = self.tokenizer.chat_template
        return found if isinstance(found, str) else None

    def vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def encode(self, texts: Sequence[str], *, control: bool) -> list[list[int]]:
        from ..eval.perplexity import encode_plain

        return list(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if control and texts else encode_plain(self.tokenizer, texts)

    def stops(self, token: int) -> bool:
        ends = self.model.generation_config.eos_token_id
        return token in (ends if isinstance(ends, list) else [ends])

    def stop_ids(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        known = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return list(dict.fromkeys([*(self.renderer.stop_ids if self.renderer else []), *known]))

    def start(self) -> list[int]:
        return self._start

    def prompt(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[int]]:
        """Of a model without a template (after pretraining alone) the user's text itself."""
        if self.renderer is None:
            text = "".join(self.tokenizer.convert_ids_to_tokens(self._start)) + str(messages[-1]["content"])
            return text, self.encode([text], control=True)[0]
        return self.renderer.prompt_text(messages), self.renderer.prompt(messages)

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Greedy, in batches padded on the left; prompts of like length together."""
        import torch
        from transformers import GenerationConfig

        settings = GenerationConfig(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None, pad_token_id=0)
        out: dict[int, list[int]] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for at in range(0, len(order), _BATCH):
            batch = order[at : at + _BATCH]
            longest = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([[0] * (longest - len(prompts[i])) + list(prompts[i]) for i in batch], device=self.model.device)
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=self.model.device)
            with torch.inference_mode():
                grown = self.model.generate(ids, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
            out.update(zip(batch, grown, strict=True))
        return [out[i] for i in range(len(prompts))]

    def logits(self, ids: Sequence[int], first: int) -> np.ndarray:
        import torch

        with torch.inference_mode():
            out = self.model(input_ids=torch.tensor([list(ids)], device=self.model.device), use_cache=False).logits[0, first:]
        table: np.ndarray = out.float().cpu().numpy()
        return table


def reference_of(source: TorchSide, parity: Parity, folder: Path, new_words: Sequence[str] = ()) -> Reference:
    """The source asked as the settings say; its logits lie in `folder` until the caller removes it."""
    from ..eval.sets import documents

    probes = shipped(parity.prompts, parity.lines, new_words)
    texts: list[str] = list(probes.passages)
    if parity.heldout is not None:
        texts, left = [], parity.heldout_chars
        for document in documents(parity.heldout, limit=max(200, parity.heldout_chars // 10)).items:
            if left <= 0:
                break
            texts.append(document[:left])
            left -= len(document)
    limit = _window(source)
    return refer(source, probes, [t for t in _short(source, texts, limit) if t], parity.tokens, folder)


def _window(source: TorchSide) -> int:
    from ..eval.models import context_length

    return min(context_length(source.model) or 1024, 1024)


def _short(source: TorchSide, texts: Sequence[str], limit: int) -> list[str]:
    """Texts cut into pieces that fit into the window by halving: both sides read the same pieces."""
    out: list[str] = []
    for text, ids in zip(texts, source.encode(texts, control=False), strict=True):
        if len(text) > 1 and len(ids) >= limit:
            out += _short(source, [text[: len(text) // 2], text[len(text) // 2 :]], limit)
        else:
            out.append(text)
    return out


def new_texts(folder: str | Path, tokenizer: Any) -> list[str]:
    """The texts of appended tokens (at most 2,000 of them, evenly): each is a line that must be tokenised alike."""
    from ..train.adapters import new_rows

    rows = new_rows(folder)
    if not rows:
        return []
    chosen = list(rows)[:: max(1, len(rows) // 2000)]
    texts = (tokenizer.decode([i]) for i in chosen)
    return [t for t in texts if t and "\ufffd" not in t]
