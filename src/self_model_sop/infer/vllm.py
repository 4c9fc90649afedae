"""`sop infer vllm`: serve a trained model on a GPU through vLLM; the artifact is checked before a minute of loading is spent.

vLLM's versions clash with the core's, so it is reached by its command (an environment of its own) or by the compose service; nothing of it is imported here.
Flags, LoRA ranks and what an adapter may hold are those of vLLM 0.33 (`vllm/config/lora.py`, `vllm/lora/peft_helper.py`, `vllm/engine/arg_utils.py`).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import console, errors
from ..config import option, project_root
from ..errors import DATA, ENVIRONMENT, SopError
from ..stage import Verb, guarded, load_for, parse_arguments
from ..yaml_source import display
from .serve import KEY, api_key, is_loopback

VERSION = "0.33.0"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
QUANTISED = ("gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8", "auto-round")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # of PEFT; others change the base's weights
_COMPOSE = Path("docker/docker-compose.yml")


@dataclass(frozen=True, kw_only=True)
class Config:
    """`config/infer_config/vllm.yaml`."""

    model: Path | None = option(None, "model folder (safetensors), or an adapter folder whose base is at hand", path="input", flag="--model")
    adapter: Path | None = option(None, "LoRA adapter folder to serve beside the model", path="input", flag="--adapter")
    engine: Literal["package", "compose"] = option("package", "package: the command `vllm` of this machine; compose: the service of docker/docker-compose.yml", flag="--engine")
    executable: str = option("vllm", "the command, where it is not on PATH: vllm lives in an environment of its own")
    run: bool = option(False, "start it and wait for a real answer; without: check, and print the command", flag="--run")
    host: str = option("127.0.0.1", "address to listen on (package); compose publishes on 127.0.0.1 only", flag="--host")
    port: int = option(8000, "port", flag="--port")
    name: str | None = option(None, "name of the model in the API; none: that of the folder", flag="--name")
    max_model_len: int | None = option(None, "longest prompt with its answer, tokens; none: what the model was made for")
    gpu_memory_utilization: float = option(0.9, "share of the GPU's memory that vLLM takes")
    tensor_parallel_size: int = option(1, "GPUs that share the model")
    max_num_seqs: int = option(128, "requests computed at the same time; more wait")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", "of weights and computation; auto: the checkpoint's")
    wait_seconds: float = option(900.0, "how long loading may take before the first answer")
    arguments: tuple[str, ...] = option((), "further arguments for `vllm serve`, as they are")

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536 or not 0 < self.gpu_memory_utilization <= 1 or min(self.tensor_parallel_size, self.max_num_seqs) < 1 or self.wait_seconds <= 0:
            raise ValueError("needs 0 < port < 65536, 0 < gpu_memory_utilization <= 1, tensor_parallel_size >= 1, max_num_seqs >= 1, wait_seconds > 0")


# --- what is served -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A model that vLLM can serve: its folder, an adapter, the API's names, and what was found."""

    model: Path
    adapter: Path | None
    name: str
    rank: int | None
    variables: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def asked(self) -> str:
        """The name that clients use."""
        return f"{self.name}-adapter" if self.adapter else self.name


def check(config: Config) -> Checked:
    """Everything that can be known without a GPU.

    Raises:
        SopError: where vLLM would refuse, or would answer otherwise than the trained model.
    """
    assert config.model is not None
    model, adapter = config.model, config.adapter
    if (model / "adapter_config.json").is_file():
        if adapter:
            raise SopError("both --model and --adapter are adapters", where=display(model), fix="--model takes the base")
        model, adapter = _base(model), model
    name = config.name or model.resolve().name
    settings = _read(model / "config.json")
    rows = (settings.get("text_config") or settings).get("vocab_size")
    notes = [f"model: {', '.join(settings.get('architectures') or ['unknown architecture'])}, {rows} embedding rows", *_weights(model), *_quantisation(model, settings)]
    rank = None
    if adapter:
        rank, found = _adapter(adapter)
        notes.append(found)
    tokenizer_folder = adapter if adapter and (adapter / "tokenizer.json").is_file() else model
    _fits(tokenizer_folder, rows, adapter)
    return Checked(model, adapter, name, rank, _variables(model), tuple(notes))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "give the folder of `sop train merge`, of `sop infer gptq`, or of a training"
        raise SopError(f"no {path.name} in this folder", where=display(path.parent), fix=fix) from None
    except ValueError as error:
        raise SopError(f"this file is not JSON: {error}", where=display(path), fix="make the artifact again", code=DATA) from error
    if not isinstance(found, dict):
        raise SopError("this file holds no object", where=display(path), fix="make the artifact again", code=DATA)
    return found


def _base(adapter: Path) -> Path:
    from ..train.model import base_of

    base = Path(base_of(adapter))
    if not base.is_dir():
        raise SopError(f"the adapter's base is not here: {base}", where=display(adapter), fix="--model BASE --adapter ADAPTER")
    return base


def _weights(model: Path) -> list[str]:
    found = sorted(model.glob("*.safetensors"))
    if not found:
        raise SopError("no safetensors weights in this folder", where=display(model), fix="pickled weights are not served; save the model as safetensors", code=DATA)
    return [f"weights: {len(found)} safetensors file(s), {sum(p.stat().st_size for p in found) / 1e9:.2f} GB"]


def _quantisation(model: Path, settings: Mapping[str, Any]) -> list[str]:
    found = settings.get("quantization_config")
    if not found:
        return []
    method = found.get("quant_method")
    if method not in QUANTISED:
        fix = f"methods: {', '.join(QUANTISED)}"
        raise SopError(f"vLLM {VERSION} does not load quantisation {method!r}", where=display(model / "config.json"), fix=fix, code=DATA)
    return [f"quantised: {method}" + (f", {found['bits']} bits, groups of {found.get('group_size')}" if "bits" in found else "")]


def _adapter(folder: Path) -> tuple[int, str]:
    """(the flag's rank, what was found)."""
    settings = _read(folder / "adapter_config.json")
    where = display(folder / "adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        raise SopError("no adapter_model.safetensors in this folder", where=display(folder), fix="adapters must be safetensors", code=DATA)
    merge = f"sop train merge --adapter {display(folder)}, then serve the merged model"
    new_rows = settings.get("trainable_token_indices")
    if new_rows:
        count = sum(map(len, new_rows.values())) if isinstance(new_rows, dict) else len(new_rows)
        raise SopError(f"the adapter trained {count} rows of new tokens, which vLLM would leave out", where=where, fix=merge, code=DATA)
    init = settings.get("init_lora_weights", True)
    there = {name: settings.get(name) for name in ("modules_to_save", "use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens")}
    there |= {"bias": settings.get("bias", "none") != "none", "init_lora_weights": isinstance(init, str) and init.lower() not in _PLAIN_INITS}
    unsupported = [name for name, value in there.items() if value]
    if unsupported:
        raise SopError(f"vLLM {VERSION} does not serve adapters with {', '.join(unsupported)}", where=where, fix=merge, code=DATA)
    needed = max([int(settings.get("r", 0)), *(settings.get("rank_pattern") or {}).values()])
    rank = next((r for r in RANKS if r >= needed), None)
    if rank is None or needed < 1:
        raise SopError(f"the adapter has rank {needed}; vLLM {VERSION} serves 1 to {RANKS[-1]}", where=where, fix=merge, code=DATA)
    return rank, f"adapter: rank {needed} (--max-lora-rank {rank})"


def _fits(folder: Path, rows: int | None, adapter: Path | None) -> None:
    """The tokenizer has a template, and no id beyond the embedding."""
    state = _read(folder / "tokenizer.json")
    vocabulary = state.get("model", {}).get("vocab", {})
    ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]), *(t["id"] for t in state.get("added_tokens", ()))]
    if rows is not None and ids and max(ids) >= rows:
        what = f"the tokenizer needs {max(ids) + 1} embedding rows, the model has {rows}"
        fix = "the adapter belongs to an expanded base: --model that one" if adapter else "grow the model with `sop tokenizer resize`, or use its own tokenizer"
        raise SopError(what, where=display(folder), fix=fix, code=DATA)
    if not (folder / "chat_template.jinja").is_file() and not _read(folder / "tokenizer_config.json").get("chat_template"):
        raise SopError("no chat template beside the tokenizer", where=display(folder), fix="train with a template (template_path), which saves it", code=DATA)


def _variables(model: Path) -> Mapping[str, Any]:
    """Template variables under which the template writes the prompt of training."""
    from ..train.model import load_tokenizer
    from ..train.template import renderer_for
    from .serve import check_rendering

    renderer = renderer_for(load_tokenizer(model))
    return check_rendering(renderer, lambda messages, given: str.__str__(renderer.text(messages, add_generation_prompt=True, **given)))


# --- the command --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """What is started: words, and the environment that it needs beside the current one (secrets excepted)."""

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """As one would type it."""
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.environment.items()), shlex.join(self.words)])


def arguments(config: Config, found: Checked, *, adapter: str) -> list[str]:
    """Flags of `vllm serve` beyond model, host, port and name. `adapter`: its path as vLLM sees it."""
    words = ["--gpu-memory-utilization", f"{config.gpu_memory_utilization:g}", "--max-num-seqs", str(config.max_num_seqs), "--dtype", config.dtype]
    if config.tensor_parallel_size > 1:
        words += ["--tensor-parallel-size", str(config.tensor_parallel_size)]
    if config.max_model_len:
        words += ["--max-model-len", str(config.max_model_len)]
    if found.variables:
        words += ["--default-chat-template-kwargs", json.dumps(dict(found.variables))]
    if found.adapter:
        words += ["--enable-lora", "--max-lora-rank", str(found.rank), "--lora-modules", f"{found.asked}={adapter}"]
    return [*words, *config.arguments]


def command(config: Config, found: Checked) -> Command:
    """The command that serves it."""
    if config.engine == "compose":
        settings = {"SOP_MODEL_DIR": str(found.model.resolve()), "SOP_MODEL_NAME": found.name, "SOP_PORT": str(config.port), "VLLM_VERSION": f"v{VERSION}"}
        if found.adapter:
            settings["SOP_ADAPTER_DIR"] = str(found.adapter.resolve())
        settings["SOP_VLLM_ARGS"] = shlex.join(arguments(config, found, adapter="/adapter"))
        return Command(["docker", "compose", "-f", str(project_root() / _COMPOSE), "--profile", "serve", "up", "vllm"], settings)
    words = [config.executable, "serve", str(found.model), "--host", config.host, "--port", str(config.port), "--served-model-name", found.name]
    return Command([*words, *arguments(config, found, adapter=str(found.adapter))], {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"})


def start(config: Config, found: Checked) -> int:
    """Run it in the foreground: wait for a real answer, say so, and stay until it ends; returns its exit code.

    Raises:
        SopError: where it is not installed, ends early, or does not answer in time.
    """
    line = command(config, found)
    if shutil.which(line.words[0]) is None:
        fix = f"uv venv .venv-vllm && uv pip install --python .venv-vllm vllm=={VERSION}, then executable=.venv-vllm/bin/vllm (a GPU is needed)"
        raise SopError(f"the command {line.words[0]!r} is not here", fix="install Docker with its compose plugin" if config.engine == "compose" else fix, code=ENVIRONMENT)
    key, made = api_key(config.host)
    process = subprocess.Popen(line.words, env={**os.environ, **line.environment, "VLLM_API_KEY": key, KEY: key})
    try:
        address = f"http://{config.host if is_loopback(config.host) and config.engine == 'package' else '127.0.0.1'}:{config.port}"
        answer = wait_for_answer(address, key, found.asked, config.wait_seconds, lambda: process.poll() is None)
        console.say(f"{found.asked}: {address}/v1 answers ({answer!r}); Ctrl-C ends it")
        if made:
            print(f"API key, shown once: {key}", file=sys.stderr, flush=True)
        return process.wait()
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for_answer(address: str, key: str, name: str, seconds: float, alive: Callable[[], bool]) -> str:
    """Ask for a few tokens until they come; a server that only says that it is healthy does not count.

    Args:
        alive: whether the server still runs.

    Raises:
        SopError: where it ends, refuses, or the time is up.
    """
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "你好"}], "max_tokens": 4, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    deadline, last = time.monotonic() + seconds, "nothing listens yet"
    while alive():
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/chat/completions", data=body, headers=headers), timeout=min(60, seconds)) as answer:
                found = json.loads(answer.read())
            if found["usage"]["completion_tokens"] > 0:
                return str(found["choices"][0]["message"]["content"])
            last = "an empty answer"
        except urllib.error.HTTPError as error:
            last = f"{error.code}: {error.read()[:200].decode(errors='replace')}"
            if error.code in (400, 401, 403, 404):
                raise SopError(f"the server refuses to answer: {last}", where=address, fix="is another server on this port?", code=DATA) from error
        except (OSError, ValueError, KeyError, LookupError) as error:
            last = str(error)
        if time.monotonic() > deadline:
            raise SopError(f"no answer after {seconds:g} s ({last})", where=address, fix="raise wait_seconds, or see the server's messages above", code=ENVIRONMENT)
        time.sleep(min(1.0, seconds / 10))
    raise SopError("the server ended before it answered", where=address, fix="its messages above say why", code=ENVIRONMENT)


VERB = Verb(
    name="infer.vllm", config=Config,
    preflight=lambda config: [] if config.model else [("model", "no model to serve", "--model FOLDER, for example the output of `sop train merge`")],
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sop infer vllm`."""

    def work() -> int:
        args, settings = parse_arguments(VERB, list(sys.argv[1:] if argv is None else argv))
        config = load_for(VERB, args.config, settings).config
        if not is_loopback(config.host):
            if not os.environ.get(KEY):
                raise SopError(f"{config.host} can be reached by other machines, and no key is set", where="host", fix=f"set {KEY} in the environment")
            console.warn("vLLM's key guards /v1 only; put a proxy that passes nothing else before an address that others reach")
        found = check(config)
        for note in found.notes:
            console.say(note)
        console.say(str(command(config, found)))
        if not config.run:
            console.note(f"nothing was started; --run starts it (key: {KEY} in the environment, passed on as VLLM_API_KEY)")
            return errors.OK
        return start(config, found)

    return guarded(work)
