"""Answers of a model through the one rendering, and what can be counted about them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import option
from .models import context_length

_GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # the library's defaults: nothing of the model's own file is left

REFUSALS = (
    r"(抱歉|对不起|很遗憾).{0,20}(无法|不能|没法|不便)",
    r"我(无法|不能|没有办法|没法)(回答|提供|给出|协助|帮助|讨论|满足)",
    r"作为(一个|一名)?.{0,6}(AI|人工智能|语言模型).{0,20}(无法|不能|没有)",
    r"\b(I'm|I am) (sorry|unable|not able)\b",
    r"\bI (cannot|can't|can not|won't) (help|assist|answer|provide|discuss|give)",
    r"\bas an? (AI|artificial|language model)\b.{0,60}\b(cannot|can't|unable|not able)",
)
_REFUSAL_CHARS = 120


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How an answer is written."""

    max_new_tokens: int = option(128, "longest answer, tokens", flag="--max_new_tokens")
    temperature: float = option(0.0, "0: greedy; above: sampled", flag="--temperature")
    top_p: float = option(1.0, "sample among the most likely tokens that make up this share", flag="--top_p")
    top_k: int = option(0, "sample among the most likely so many tokens; 0: all", flag="--top_k")
    repetition_penalty: float = option(1.0, "above 1: tokens that were there already become less likely", flag="--repetition_penalty")
    seed: int = option(0, "seed of sampled answers", flag="--seed")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.repetition_penalty <= 0:
            raise ValueError("needs max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1, top_k >= 0, repetition_penalty > 0")


@dataclass(frozen=True)
class Answer:
    """One answer. `tokens` counts a stop token too; `stopped`: it ended by one, not by its length; `ids` are all new ids."""

    text: str
    tokens: int
    stopped: bool
    ids: tuple[int, ...] = ()


def generate(
    model: Any, tokenizer: Any, prompt: Sequence[int], stop: Sequence[int], decoding: Decoding, *, on_text: Callable[[str], None] | None = None, cache: Any = None
) -> Answer:
    """Continue `prompt` until a stop token, `max_new_tokens`, or the model's context is full.

    Args:
        on_text: called with pieces of text as they become whole characters.
        cache: key/value cache that already holds a beginning of `prompt`; it grows in place.
    """
    import torch
    from transformers import GenerationConfig

    room = (context_length(model) or 1 << 62) - len(prompt)
    sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k} if decoding.temperature else _GREEDY
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0] if stop else 0
    settings = GenerationConfig(
        max_new_tokens=max(1, min(decoding.max_new_tokens, room)), repetition_penalty=decoding.repetition_penalty, eos_token_id=list(stop) or None, pad_token_id=pad,
        use_cache=True, num_beams=1, no_repeat_ngram_size=0, min_new_tokens=0, **sampling,
    )  # fmt: skip
    ids = torch.tensor([list(prompt)], device=model.device)
    more = {} if cache is None else {"past_key_values": cache}
    with torch.inference_mode(), torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(decoding.seed)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=_streamer(tokenizer, stop, on_text) if on_text else None, **more)
    new = out[0, len(prompt) :].tolist()
    stopped = bool(new) and new[-1] in stop
    return Answer(tokenizer.decode(new[:-1] if stopped else new, skip_special_tokens=True), len(new), stopped, tuple(new))


def _streamer(tokenizer: Any, stop: Sequence[int], on_text: Callable[[str], None]) -> Any:
    """Passes text on as soon as its characters are whole (the library's own streamer waits for spaces)."""
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.shown = self.context = 0  # ids whose text was passed on; where decoding begins, so that a tokenizer's leading spaces come out right
            self.in_prompt = True

        def put(self, value: Any) -> None:
            if not self.in_prompt:
                self.ids += [i for i in value.reshape(-1).tolist() if i not in stop]
                self.flush()
            self.in_prompt = False

        def flush(self, *, last: bool = False) -> None:
            before, now = (tokenizer.decode(self.ids[self.context : end], skip_special_tokens=True) for end in (self.shown, len(self.ids)))
            if len(now) > len(before) and (last or not now.endswith("\ufffd")):
                on_text(now[len(before) :])
                self.context, self.shown = self.shown, len(self.ids)

        def end(self) -> None:
            self.flush(last=True)

    return Streamer()


# --- counting -----------------------------------------------------------------------------------------------------------------------------


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct character n-grams as a share of all, over all texts (distinct-n, Li et al. 2016, on characters: comparable across vocabularies)."""
    grams = [t[i : i + n] for t in texts for i in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's character n-grams that it already had before (0: none; near 1: a loop)."""
    total = len(text) - n + 1
    return 1 - len({text[i : i + n] for i in range(total)}) / total if total > 0 else 0.0


def refused(text: str, patterns: Sequence[str] = REFUSALS) -> bool:
    """Whether an answer declines: one of the patterns within its first sentences."""
    return any(re.search(p, text[:_REFUSAL_CHARS], re.IGNORECASE) for p in patterns)


def overlap(text: str, reference: str) -> float:
    """ROUGE-L (Lin 2004) on characters, spaces left out: F1 of the longest common subsequence; 1 for equal texts, 0 where nothing is shared."""
    a, b = ("".join(t.split()) for t in (text, reference))
    return 2 * _common(a, b) / (len(a) + len(b)) if a and b else 0.0


def _common(a: str, b: str) -> int:
    """Length of the longest common subsequence, a word of len(a) bits at a time (Hyyrö 2004)."""
    where: dict[str, int] = {}
    for i, c in enumerate(a):
        where[c] = where.get(c, 0) | 1 << i
    full = v = (1 << len(a)) - 1
    for c in b:
        u = v & where.get(c, 0)
        v = ((v + u) | (v - u)) & full
    return len(a) - v.bit_count()


def measure(answers: Sequence[Answer], references: Sequence[str | None] = ()) -> dict[str, float]:
    """distinct-1, distinct-2, mean repetition, mean length in characters, shares that ended by themselves and that decline; mean overlap where there are references."""
    texts = [a.text for a in answers]
    count = max(1, len(answers))
    overlaps = [overlap(t, r) for t, r in zip(texts, references, strict=True) if r] if references else []
    return {
        "distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2), "repetition": sum(map(repetition, texts)) / count,
        "chars": sum(map(len, texts)) / count, "stopped": sum(a.stopped for a in answers) / count, "refused": sum(map(refused, texts)) / count,
        **({"overlap": sum(overlaps) / len(overlaps)} if overlaps else {}),
    }  # fmt: skip
