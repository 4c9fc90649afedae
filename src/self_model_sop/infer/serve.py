"""`sop infer serve`: an OpenAI-compatible API on any machine, through llama.cpp's own server.

A GGUF file is served by the native server of llama.cpp (package xllamacpp: prebuilt, continuous batching), behind the door of `front.py`. Before the first request is
answered, the prompts that the native server writes are compared with those of the one rendering; where they differ, nothing is served.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from .. import console, errors
from ..config import option
from ..errors import DATA, ENVIRONMENT, SopError, missing_extra
from ..eval.generate import Decoding
from ..stage import Verb, guarded, load_for, parse_arguments
from ..yaml_source import display

KEY = "SOP_API_KEY"
_KEY_LENGTH = 16
# Under one of these a template writes the prompt of training. Where a file names no first token, llama.cpp takes one of its own for `bos_token`.
_VARIABLES: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"thinking": False}, {"bos_token": ""})
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_CONTROL = 3  # token type of control tokens in a GGUF file


@dataclass(frozen=True, kw_only=True)
class Config:
    """`config/infer_config/serve.yaml`."""

    model: Path | None = option(None, "GGUF file, or the folder of `sop infer gguf`", path="input", flag="--model")
    host: str = option("127.0.0.1", "address to listen on; one that other machines reach needs a key in the environment", flag="--host")
    port: int = option(8000, "port to listen on; 0: any free one", flag="--port")
    name: str | None = option(None, "name of the model in the API; none: that of the file", flag="--name")
    context: int = option(2048, "tokens of a prompt and its answer together (at most what the model was made for)", flag="--context")
    parallel: int = option(8, "requests that are computed at the same time; each holds `context` tokens of memory", flag="--parallel")
    max_requests: int = option(256, "requests under way at once, waiting ones included; more are answered with 429")
    max_body_bytes: int = option(1_048_576, "largest request; more is answered with 413")
    client_seconds: float = option(60.0, "a client that sends or reads nothing for so long is dropped")
    cache_mib: int = option(256, "memory for the keys and values of earlier prompts, MiB; 0: none")
    threads: int = option(0, "threads of the computation; 0: one for each core")
    gpu_layers: int = option(0, "layers on a GPU, where the package xllamacpp was built for one")
    allow_control_tokens: bool = option(False, "let messages hold the text of control tokens, which the server reads as control tokens")
    decoding: Decoding = option(factory=Decoding)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536 or min(self.context, self.parallel, self.max_requests, self.max_body_bytes) < 1 or self.client_seconds <= 0:
            raise ValueError("needs 0 <= port < 65536; context, parallel, max_requests, max_body_bytes >= 1; client_seconds > 0")


# --- what is served -----------------------------------------------------------------------------------------------------------------------


def find_gguf(path: Path) -> Path:
    """The GGUF file that a path means: itself, or the only one in a folder (of a split file, its first part).

    Raises:
        SopError: where there is none (with the command that makes one), or several.
    """
    if path.is_file():
        return path
    found = [p for p in sorted(path.glob("*.gguf")) if not _LATER_PART.search(p.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise SopError(f"{len(found)} GGUF files are here: {', '.join(p.name for p in found[:4])}", where=display(path), fix="give one of them")
    if (path / "adapter_config.json").is_file():
        fix = "merge it first (sop train merge), then `sop infer gguf`; on a GPU, `sop infer vllm` serves adapters"
    elif (path / "config.json").is_file():
        fix = f"sop infer gguf --model_path {display(path)} --output_path OUT, then serve OUT; on a GPU, `sop infer vllm` serves the folder itself"
    else:
        fix = "give a .gguf file, or the folder of `sop infer gguf`"
    raise SopError("no GGUF file here, and that is what the server on a CPU reads", where=display(path), fix=fix)


@dataclass(frozen=True)
class Served:
    """What the GGUF file says of itself."""

    path: Path
    renderer: Any
    control: tuple[str, ...]
    context: int | None
    bos: str = ""  # the first token's text, where llama.cpp puts that token before every prompt by itself


def read_gguf(path: Path) -> Served:
    """Template, control tokens and context of a GGUF file.

    Raises:
        SopError: where it is no GGUF file, or has no chat template.
    """
    import gguf

    from ..train.template import renderer_for

    try:
        fields = gguf.GGUFReader(path).fields
        architecture = str(fields["general.architecture"].contents())
        tokens, types = (fields[f"tokenizer.ggml.{what}"].contents() for what in ("tokens", "token_type"))
        context = fields.get(f"{architecture}.context_length")
        adds = fields.get("tokenizer.ggml.add_bos_token")
        adds_bos = bool(adds.contents()) if adds else fields["tokenizer.ggml.model"].contents() == "llama"
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise SopError(f"this is no GGUF file of a language model: {error}", where=display(path), fix="make it again with `sop infer gguf`", code=DATA) from error
    control = tuple(token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL)
    tokenizer = _tokenizer(path)
    bos = tokenizer.bos_token if adds_bos and tokenizer.bos_token else ""
    return Served(path, renderer_for(tokenizer), control, int(context.contents()) if context else None, bos)


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise SopError(f"transformers cannot read the tokenizer of this file: {error}", where=display(path), fix="make it again with `sop infer gguf`", code=DATA) from error


# --- the native server --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Native:
    """llama.cpp's server in this process, on a loopback port of its own; `server` keeps it alive."""

    server: Any
    address: str
    key: str

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """An answer of the server.

        Raises:
            SopError: where it refuses.
        """
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data=json.dumps(body).encode(), headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                found: dict[str, Any] = json.loads(answer.read())
            return found
        except urllib.error.HTTPError as error:
            raise SopError(f"the server answers {error.code}: {error.read()[:300].decode(errors='replace')}", where=path, code=DATA) from error

    def prompt(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The text of a prompt."""
        return str(self.post("/apply-template", {"messages": list(messages), "chat_template_kwargs": dict(variables)})["prompt"])


def start(config: Config, served: Served, name: str) -> Native:
    """Load the model into llama.cpp's server.

    Raises:
        SopError: where the package is missing, or the file cannot be loaded.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise missing_extra("xllamacpp", "serve") from error
    key = secrets.token_urlsafe(32)
    context = min(config.context, served.context or config.context)
    threads = config.threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(served.path), {name}
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [key]
    params.n_ctx, params.n_parallel, params.kv_unified, params.ctx_shift = context * config.parallel, config.parallel, False, False
    params.n_threads_http = config.max_requests + 8  # each waiting request holds a thread; the rest answer /health
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers, params.cache_ram_mib, params.n_predict = config.gpu_layers, config.cache_mib, config.decoding.max_new_tokens
    params.ui, params.endpoint_slots, params.use_jinja, params.prefill_assistant, params.verbosity = False, False, True, False, 0
    sampling, wanted = params.sampling, config.decoding
    sampling.temp, sampling.top_p, sampling.top_k, sampling.min_p = wanted.temperature, wanted.top_p, wanted.top_k, 0.0
    sampling.penalty_repeat, sampling.seed = wanted.repetition_penalty, wanted.seed
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError, OSError) as error:
        fix = "a smaller context or parallel, or make the file again"
        raise SopError(f"llama.cpp cannot load this model: {error}", where=display(served.path), fix=fix, code=ENVIRONMENT) from error
    return Native(server, server.listening_address, key)


def check_rendering(renderer: Any, render: Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str], *, bos: str = "") -> dict[str, Any]:
    """The template variables under which the server writes the same prompts as the one rendering.

    Args:
        renderer: the one rendering, with the file's template.
        render: (messages, variables) -> the server's prompt text.
        bos: the first token's text where the server adds that token itself, and may leave it out of the text.

    Raises:
        SopError: where it writes other prompts, with the first difference (exit code 3).
    """
    from ..train.sandbox import TemplateError

    expected = []
    for messages in _conversations():
        try:
            expected.append((messages, str.__str__(renderer.prompt_text(messages))))
        except TemplateError:
            continue  # a family without system messages refuses them in both places
    unlike = ""
    for variables in _VARIABLES:
        pairs = ((text, render(messages, variables)) for messages, text in expected)
        wrong = next(((text, got) for text, got in pairs if got not in (text, text.removeprefix(bos))), None)
        if wrong is None:
            return variables
        unlike = unlike or f"\n  training: {wrong[0]!r}\n  server:   {wrong[1]!r}"
    raise SopError(f"the server writes other prompts than the model was trained on{unlike}", fix="nothing was served; make the GGUF file again, or report this template", code=DATA)


def _conversations() -> list[list[dict[str, str]]]:
    from .probes import shipped

    edge = [
        [{"role": "user", "content": "  a \n"}],
        [{"role": "user", "content": "{{ 1 }} <b> \\n"}, {"role": "assistant", "content": "\n b  "}, {"role": "user", "content": "再见"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
    ]
    return [*(list(c) for c in shipped(12, 0).conversations), *edge]


# --- the command --------------------------------------------------------------------------------------------------------------------------


def api_key(host: str) -> tuple[str, bool]:
    """(key, whether it was made here): from the environment, or, for this machine alone and a person at a terminal, a fresh one.

    Raises:
        SopError: where none is set and one must be.
    """
    given = os.environ.get(KEY, "")
    if given:
        if len(given) < _KEY_LENGTH or not given.isascii() or not given.isprintable() or " " in given:
            raise SopError(f"the key is too weak or not sendable: at least {_KEY_LENGTH} printable ASCII characters without spaces", where=KEY, fix=_fresh())
        return given, False
    if not is_loopback(host):
        raise SopError(f"{host} can be reached by other machines, and no key is set", where="host", fix=_fresh())
    if not sys.stderr.isatty():
        raise SopError("no key is set, and a fresh one is only shown on a terminal, never written to a log", where=KEY, fix=_fresh())
    return secrets.token_urlsafe(24), True


def _fresh() -> str:
    return f'export {KEY}=$(python -c "import secrets; print(secrets.token_urlsafe(24))")'


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket: a taken port is found before the model is loaded.

    Raises:
        SopError: where it cannot be bound.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise SopError(f"cannot listen on {host}:{port}: {error}", where="port", fix="choose another --port (0: any free one)") from error
    return bound


def serve(config: Config) -> None:
    """Check, load, compare the prompts, and answer until a signal ends it.

    Raises:
        SopError: where anything stands in the way; nothing is served then.
    """
    try:
        from . import front
    except ImportError as error:
        raise missing_extra("aiohttp", "serve") from error

    assert config.model is not None
    # llama.cpp's threads wait at barriers by spinning, which on a machine with other work costs many times what it saves; read when the library is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    path = find_gguf(config.model)
    key, made = api_key(config.host)
    with listen(config.host, config.port) as bound:
        served = read_gguf(path)
        name = config.name or path.stem
        native = start(config, served, name)
        variables = check_rendering(served.renderer, native.prompt, bos=served.bos)
        limits = front.Limits(body_bytes=config.max_body_bytes, requests=config.max_requests, choices=config.parallel, seconds=config.client_seconds)
        control = () if config.allow_control_tokens else served.control
        door = front.Door(key=key, behind=native.address, behind_key=native.key, limits=limits, control=control, variables=variables)
        host, port = bound.getsockname()[:2]

        def ready() -> None:
            console.say(f"{name}: http://{f'[{host}]' if ':' in host else host}:{port}/v1 (prompts equal to those of training; Ctrl-C ends it)")
            if made:
                print(f"API key, shown once: {key}", file=sys.stderr, flush=True)

        front.run(door, bound, ready)


VERB = Verb(
    name="infer.serve", config=Config,
    preflight=lambda config: [] if config.model else [("model", "no model to serve", "--model FILE.gguf, for example the output of `sop infer gguf`")],
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sop infer serve`."""

    def work() -> int:
        args, settings = parse_arguments(VERB, list(sys.argv[1:] if argv is None else argv))
        serve(load_for(VERB, args.config, settings).config)
        return errors.OK

    return guarded(work)
