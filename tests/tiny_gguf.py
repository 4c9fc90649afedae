"""A tiny model as a GGUF file, written with the package gguf alone, and `sop infer serve` running on it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_models import tiny_qwen

KEY = "a-key-for-the-tests-only"
_NORMAL, _CONTROL = 1, 3


def tiny_gguf(path: Path, *, template: str | None = None, control: Sequence[str] = (), bos: str | None = None, eos: str | None = None) -> Path:
    """`tiny_qwen` as GGUF f32; its attention is made to matter, so that different prompts get different answers. Returns `path`.

    Args:
        template: a chat template instead of its own.
        control: more control tokens (their rows are those of other tokens).
        bos, eos: tokens instead of its own.
    """
    import gguf
    from safetensors.numpy import load_file

    folder = tiny_qwen(path.parent / f".{path.stem}-source")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary = {**state["model"]["vocab"], **{t["content"]: t["id"] for t in state["added_tokens"]}}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {t["content"] for t in state["added_tokens"]}
    new = [t for t in dict.fromkeys([*control, *filter(None, (bos, eos))]) if t not in vocabulary]
    tokens, special = [*tokens, *new], special | set(new)
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if t in special else _NORMAL for t in tokens])
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in state["model"]["merges"]])
    writer.add_eos_token_id(tokens.index(eos or settings["eos_token"]))
    writer.add_pad_token_id(tokens.index(settings["pad_token"]))
    if bos:
        writer.add_bos_token_id(tokens.index(bos))
    writer.add_add_bos_token(bool(bos))
    writer.add_chat_template(template or (folder / "chat_template.jinja").read_text(encoding="utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name == "model.embed_tokens.weight" and new:
            import numpy as np

            tensor = np.concatenate([tensor, tensor[: len(new)]])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor * 8 if "_proj.weight" in name else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def serving(model: Path, *settings: str) -> Iterator[str]:
    """`sop infer serve` in a process of its own; yields the address, ends it with SIGTERM and wants exit code 0."""
    command = [sys.executable, "-m", "self_model_sop.cli", "infer", "serve", "--model", str(model), "--port", "0", "--context", "256", *settings]
    environment: dict[str, Any] = {**os.environ, "SOP_API_KEY": KEY, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+?:\d+", line)
        assert found, line + process.stderr.read()
        assert KEY not in line and KEY not in Path(f"/proc/{process.pid}/cmdline").read_text() if Path("/proc/self").exists() else True
        yield found[0]
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert KEY not in out + err and "Traceback" not in err, err
    finally:
        process.kill()
        process.wait()
