"""Extended tokenizers for tests, made by appending alone: merges for byte-level BPE, added tokens for WordPiece."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

WORDS = ["高血压", "感冒", "定期测量", "喝水", "糖尿病"]


def extend_bpe(base_folder: Path, words: list[str], out: Path) -> Path:
    """`base_folder`'s tokenizer with merges that build each word, `expansion.json` beside it; returns `out`."""
    from transformers import AutoTokenizer

    base = AutoTokenizer.from_pretrained(str(base_folder))
    data = json.loads((base_folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    for added in data["added_tokens"]:
        vocab.setdefault(added["content"], added["id"])
    first = len(vocab)
    for word in words:
        pieces = [t for s, _ in base.backend_tokenizer.pre_tokenizer.pre_tokenize_str(word) for t in (x.value for x in base.backend_tokenizer.model.tokenize(s))]
        left = pieces[0]
        for right in pieces[1:]:
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append([left, right])
            left += right
    return _write(base_folder, data, out, {"base_vocab_size": len(base), "new_ids": [first, len(vocab)], "method": "continued_bpe", "tokens": len(vocab) - first})


def extend_wordpiece(base_folder: Path, words: list[str], out: Path) -> Path:
    """`base_folder`'s tokenizer with each word as an added token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base_folder))
    first = len(tokenizer)
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(out)
    record = {"base_vocab_size": first, "new_ids": [first, len(tokenizer)], "method": "added_tokens", "tokens": len(tokenizer) - first}
    (out / "expansion.json").write_text(json.dumps(record), encoding="utf-8")
    return out


def grown(base_folder: Path, words: list[str], out: Path) -> Path:
    """A causal model with byte-level BPE, extended by `words` and grown to them: rows that start from their pieces; returns `out`."""
    from self_model_sop.tokenizer import resize
    from self_model_sop.tokenizer.settings import ResizeConfig, TokenizerConfig

    extended = extend_bpe(base_folder, words, out.parent / f"{out.name}-extended")
    config = TokenizerConfig(
        base_tokenizer=str(base_folder), extended_tokenizer=extended, extended_model=out, work_dir=out.parent / f"{out.name}-work", resize=ResizeConfig(init="mean_of_pieces")
    )
    return resize.run(config).path


def _write(base_folder: Path, data: dict[str, Any], out: Path, record: dict[str, Any]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    for path in base_folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", "generation_config.json", "tokenizer.json"):
            shutil.copyfile(path, out / path.name)
    (out / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    (out / "expansion.json").write_text(json.dumps(record), encoding="utf-8")
    return out
