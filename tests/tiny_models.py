"""Tiny random models with real tokenizers, made in a second; each folder loads like the real model of that name.

`tiny_qwen` and `tiny_llama` are causal (byte-level BPE, ChatML and Llama 3 templates), `tiny_bert` is masked (WordPiece). Same seed, same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

QWEN2_CHATML = Path(__file__).parent.parent / "self_model" / "template" / "qwen2_chatml.json"
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")

_ENGLISH = (
    "The patient should drink enough water and rest. A model reads text as tokens and learns to predict the next one. def main(argv): return 0\n"
    "Please explain the answer step by step. Training needs data, and data needs care. for i in range(10): print(i)\n"
)
_CHINESE = "我们的医生说要多喝水，注意休息。请问这是什么？高血压患者应当按时服药，定期测量血压。人工智能模型可以回答问题。感冒通常由病毒引起。\n"


def sentences() -> Iterator[str]:
    """What the tokenizers are trained on: mostly English, a little Chinese, like a base model that is weak in Chinese."""
    for i in range(40):
        yield _ENGLISH + f"Line {i} of the text, number {i * 37}."
        yield _CHINESE if i % 4 == 0 else _CHINESE[i % 20 : i % 20 + 24]


def _template(path: Path) -> str:
    """The Jinja of a template file: that of the real model, which the tiny one stands in for."""
    from self_model_sop.train.families import read

    return read(path).source


def _byte_level(vocab_size: int, split: str, specials: list[str]) -> Any:
    """A trained byte-level BPE whose special tokens come after the vocabulary, as in Qwen and Llama 3."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC() if split is QWEN2_SPLIT else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(specials), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return tokenizer


def _save(model_class: Any, config: Any, tokenizer: Any, path: Path, seed: int) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_qwen(path: Path, *, vocab_size: int = 640, hidden_size: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """A Qwen2 causal model of about 0.2 M parameters, tied, ChatML, pad `<|endoftext|>`, eos `<|im_end|>`; returns `path`."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
    from transformers import PreTrainedTokenizerFast as Fast

    backend = _byte_level(vocab_size, QWEN2_SPLIT, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = Fast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"],
        model_max_length=512, chat_template=_template(QWEN2_CHATML), clean_up_tokenization_spaces=False,
    )  # fmt: skip
    ids = {"bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=hidden_size * 2, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, dtype="float32", **ids,
    )  # fmt: skip
    _save(Qwen2ForCausalLM, config, tokenizer, path, seed)
    GenerationConfig(do_sample=False, **ids).save_pretrained(path)
    return path


def tiny_llama(path: Path, *, vocab_size: int = 640, hidden_size: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """A Llama causal model, untied, Llama 3 template; as in the real one, the tokenizer *and* the template prepend bos. Returns `path`."""
    from tokenizers import processors
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers import PreTrainedTokenizerFast as Fast

    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
    backend = _byte_level(vocab_size, LLAMA3_SPLIT, specials)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{specials[0]} $A", pair=f"{specials[0]} $A {specials[0]} $B", special_tokens=[(specials[0], backend.token_to_id(specials[0]))]
    )
    tokenizer = Fast(
        tokenizer_object=backend, bos_token=specials[0], eos_token="<|eot_id|>", pad_token="<|pad|>",
        model_max_length=512, chat_template=LLAMA3, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=hidden_size * 2, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=False, dtype="float32", **ids,
    )  # fmt: skip
    _save(LlamaForCausalLM, config, tokenizer, path, seed)
    GenerationConfig(do_sample=False, **ids).save_pretrained(path)
    return path


def common_characters() -> list[str]:
    """The 3,755 most common Chinese characters (GB 2312, level 1) and the full-width punctuation."""
    level1 = (bytes([high, low]).decode("gb2312", "ignore") for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF))
    return [c for c in [*level1, *"，。！？；：（）“”《》、—…"] if c]


def tiny_bert(path: Path, *, vocab_size: int = 900, hidden_size: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """A BertForMaskedLM whose WordPiece vocabulary splits Chinese into characters, as bert-base-chinese does; returns `path`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(sentences(), trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False))
    path.mkdir(parents=True, exist_ok=True)
    words = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    (path / "vocab.txt").write_text("".join(f"{word}\n" for word in dict.fromkeys([*words, *common_characters()])), encoding="utf-8")
    tokenizer = BertTokenizerFast.from_pretrained(str(path), do_lower_case=True, model_max_length=512)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=hidden_size * 2, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    return _save(BertForMaskedLM, config, tokenizer, path, seed)
