"""Tiny tokenizers of every kind that can be extended, trained in a second; and a small Chinese corpus."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from tiny_models import LLAMA3_SPLIT, QWEN2_SPLIT, common_characters, sentences

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
WORDS = [
    "高血压",
    "糖尿病",
    "患者",
    "医生",
    "建议",
    "应当",
    "定期",
    "测量",
    "血压",
    "血糖",
    "感冒",
    "病毒",
    "引起",
    "多喝水",
    "注意",
    "休息",
    "服药",
    "心脏病",
    "冠心病",
    "中风",
    "运动",
    "饮食",
    "清淡",
    "睡眠",
    "充足",
    "复查",
    "检查",
    "结果",
    "正常",
]
MARKS = "，。；：！？"


def chinese(number: int, seed: int = 0) -> list[str]:
    """Made-up sentences out of a small vocabulary, the same for the same seed."""
    draw = random.Random(seed)
    return ["".join(draw.choice(WORDS) + (draw.choice(MARKS) if draw.random() < 0.3 else "") for _ in range(draw.randint(4, 16))) + "。" for _ in range(number)]


def byte_bpe(path: Path, *, split: str = QWEN2_SPLIT, ignore_merges: bool = False) -> Path:
    """Byte-level BPE whose special tokens stand behind the vocabulary and outside of the model, as in Qwen; returns `path`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC() if split is QWEN2_SPLIT else None
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(sentences(), trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=SPECIALS[1:2] + SPECIALS[3:],
        chat_template=CHATML, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.save_pretrained(path)
    if ignore_merges:
        data = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        data["model"]["ignore_merges"] = True
        (path / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path


def gpt2_bpe(path: Path) -> Path:
    """SmolLM2's arrangement: special tokens first and inside the vocabulary, digits alone, GPT-2's split; returns `path`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(sentences(), trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML).save_pretrained(path)
    return path


def sentencepiece(path: Path, kind: str) -> Path:
    """A SentencePiece `bpe` (as Llama 2: byte fallback) or `unigram` (as T5: unknown tokens) base with its `.model`; returns `path`."""
    import sentencepiece as sp
    from transformers import AutoTokenizer

    lines = [line for text in sentences() for line in text.split("\n")] + chinese(20, seed=9)
    out = io.BytesIO()
    options: dict[str, Any] = {"byte_fallback": True, "vocab_size": 480} if kind == "bpe" else {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 220}
    sp.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type=kind,
        character_coverage=0.99,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
        **options,
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / ("tokenizer.model" if kind == "bpe" else "spiece.model")).write_bytes(out.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer"} if kind == "bpe" else {"tokenizer_class": "T5Tokenizer", "extra_ids": 2}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    AutoTokenizer.from_pretrained(str(path)).save_pretrained(path)
    return path


def bert(path: Path) -> Path:
    """A bare `vocab.txt`, as bert-base-chinese is often passed on; returns `path`."""
    path.mkdir(parents=True, exist_ok=True)
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,!?():=-")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters[:36]), "the", "patient", "water", "##ing", *common_characters()]
    (path / "vocab.txt").write_text("".join(f"{w}\n" for w in dict.fromkeys(words)), encoding="utf-8")
    return path


MAKERS = {
    "qwen": byte_bpe,
    "llama3": lambda path: byte_bpe(path, split=LLAMA3_SPLIT, ignore_merges=True),
    "smollm2": gpt2_bpe,
    "llama2": lambda path: sentencepiece(path, "bpe"),
    "t5": lambda path: sentencepiece(path, "unigram"),
    "bert": bert,
}


def make(name: str, folder: Path) -> Path:
    """The base tokenizer `name` below `folder`, made once."""
    path = folder / name
    return path if path.exists() else MAKERS[name](path)


def write_corpus(folder: Path, number: int = 300) -> Path:
    """Processed data: a pretraining set with a validation file, an alpaca and a dialogue set; returns `folder`."""
    for name, rows in {
        "pretrain/train.jsonl": [{"text": t, "_source": "a:1"} for t in chinese(number)],
        "pretrain/validation.jsonl": [{"text": t} for t in chinese(20, seed=1)],
        "finetune/train.jsonl": [{"instruction": a, "input": "", "output": b} for a, b in zip(chinese(40, seed=2), chinese(40, seed=3), strict=True)],
        "reward/train.jsonl": [{"prompt": a, "chosen": a + "好", "rejected": a + "坏"} for a in chinese(10, seed=4)],
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return folder
