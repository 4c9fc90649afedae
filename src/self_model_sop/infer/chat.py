"""`sop infer chat`: talk to a trained model in the terminal, through the one rendering."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .. import console, errors
from ..config import option
from ..errors import SopError
from ..eval.generate import Answer, Decoding, generate
from ..eval.models import Device, context_length, open_model
from ..hub import HubConfig, configure
from ..stage import Verb, guarded, load_for, parse_arguments
from ..yaml_source import display

HELP = """/reset            start again (the system message stays)
/system TEXT      set the system message and start again; without TEXT: show it
/save FILE        write the conversation as one JSON line of messages (a row for fine-tuning)
/exit             leave (or Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """`config/infer_config/chat.yaml`."""

    model: str | None = option(None, "model folder, adapter folder or hub id", path="model", flag="--model")
    adapter: str | None = option(None, "adapter folder to put on the model", path="model", flag="--adapter")
    against: str | None = option(None, "a second model (or adapter) folder or hub id that answers every turn too, side by side", path="model", flag="--against")
    system: str | None = option(None, "system message", flag="--system")
    prompt: str | None = option(None, "answer this one question, print the answer and end", flag="--prompt")
    template_path: Path | None = option(None, "chat template for models without one of their own", path="input")
    decoding: Decoding = option(factory=Decoding)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "dtype of the weights; auto: the checkpoint's on a GPU, float32 on a CPU")
    device: Device = option("auto", "auto: a GPU where there is one", flag="--device")
    huggingface: HubConfig = option(factory=HubConfig)


@dataclass
class Conversation:
    """A conversation with one model. The keys and values of what was already read stay cached from turn to turn."""

    model: Any
    tokenizer: Any
    renderer: Any
    decoding: Decoding
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    _cache: Any = None
    _cached: list[int] = field(default_factory=list)  # the ids whose keys and values `_cache` holds

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages, self._cache, self._cached = [], None, []

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """Answer a user's turn; both turns are kept.

        Raises:
            SopError: where the turn alone is longer than the model's context.
        """
        self.messages.append({"role": "user", "content": text})
        written: list[str] = []

        def collect(piece: str) -> None:
            written.append(piece)
            if on_text:
                on_text(piece)

        try:
            answer = self._answer(collect)
        except KeyboardInterrupt:  # the half answer stays, as what the user has seen
            self._cache, self._cached = None, []
            answer = Answer("".join(written), 0, False)
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer

    def _answer(self, on_text: Callable[[str], None]) -> Answer:
        prompt = self._prompt()
        cache = self._reuse(prompt)
        answer = generate(self.model, self.tokenizer, prompt, self.renderer.stop_ids, self.decoding, on_text=on_text, cache=cache)
        self._cached = [*prompt, *answer.ids][: cache.get_seq_length()]
        return answer

    def _prompt(self) -> list[int]:
        """Ids of the conversation; the oldest turns are left out where it no longer fits with room for an answer."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        limit, dropped = context_length(self.model), 0
        while True:
            ids: list[int] = self.renderer.prompt([*head, *self.messages[dropped:]])
            if limit is None or len(ids) + min(self.decoding.max_new_tokens, limit // 2) <= limit:
                break
            if dropped + 2 >= len(self.messages):
                raise SopError(f"{len(ids)} tokens do not fit into the model's context of {limit} with room for an answer", fix="ask something shorter, or /reset")
            dropped += 2
        if dropped:
            console.warn(f"the first {dropped // 2} turn(s) no longer fit into the model's context and are left out")
        return ids

    def _reuse(self, prompt: Sequence[int]) -> Any:
        """The cache cut back to what `prompt` begins with; a fresh one where nothing is shared or it cannot be cut."""
        from transformers import DynamicCache

        shared = 0
        while shared < min(len(self._cached), len(prompt) - 1) and self._cached[shared] == prompt[shared]:
            shared += 1
        surplus = len(self._cached) - shared
        if self._cache is not None and shared:
            try:
                if surplus:
                    self._cache.crop(-surplus)
                return self._cache
            except (RuntimeError, ValueError, NotImplementedError):
                pass  # sliding-window and recurrent caches cannot be cut
        self._cache, self._cached = DynamicCache(config=self.model.config.get_text_config()), []
        return self._cache


    def rows(self) -> list[dict[str, Any]]:
        """What /save writes."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [{"messages": [*head, *self.messages]}]


@dataclass
class SideBySide:
    """The same turns to several models, one answer after the other. Each has its own template, its own answers and its own cache."""

    conversations: dict[str, Conversation]

    @property
    def system(self) -> str | None:
        return next(iter(self.conversations.values())).system

    @system.setter
    def system(self, text: str | None) -> None:
        for conversation in self.conversations.values():
            conversation.system = text

    @property
    def messages(self) -> list[dict[str, str]]:
        """All turns of all models."""
        return [message for conversation in self.conversations.values() for message in conversation.messages]

    def reset(self) -> None:
        """Forget everything but the system message."""
        for conversation in self.conversations.values():
            conversation.reset()

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> dict[str, Answer]:
        """Let each model answer, under its name; one that cannot says why, and the others go on."""
        write, answers = on_text or (lambda piece: None), {}
        for i, (name, conversation) in enumerate(self.conversations.items()):
            write(("\n\n" if i else "") + f"[{name}]\n")
            try:
                answers[name] = conversation.ask(text, on_text)
            except SopError as error:
                console.note(f"error: {name}: {error}")
        return answers

    def rows(self) -> list[dict[str, Any]]:
        """What /save writes: a row of each model, with its name."""
        return [{"model": name, **row} for name, conversation in self.conversations.items() for row in conversation.rows()]


Talk: TypeAlias = "Conversation | SideBySide"


def open_talk(config: Config) -> Talk:
    """The conversation with the model, or with both.

    Raises:
        SopError: where a model or its template is missing.
    """
    first = open_conversation(config)
    if config.against is None:
        return first
    sources = [config.adapter or str(config.model), config.against]
    second = open_conversation(dataclasses.replace(config, model=config.against, adapter=None))
    short = [Path(source).name for source in sources]
    names = [display(Path(source)) for source in sources] if short[0] == short[1] else short
    return SideBySide(dict(zip(names if names[0] != names[1] else [f"{names[0]} 1", f"{names[1]} 2"], (first, second), strict=True)))


def open_conversation(config: Config) -> Conversation:
    """Load the model and its template.

    Raises:
        SopError: where one of them is missing.
    """
    import torch

    from ..train.template import renderer_for

    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    dtype = "float32" if config.dtype == "auto" and not on_gpu else config.dtype
    model, tokenizer = open_model(config.adapter or str(config.model), base=config.model if config.adapter else None, dtype=dtype, device=config.device)
    return Conversation(model, tokenizer, renderer_for(tokenizer, config.template_path), config.decoding, config.system)


# --- the terminal -------------------------------------------------------------------------------------------------------------------------


def _stream(text: str) -> None:
    print(text, end="", flush=True)


def talk(conversation: Talk, lines: Callable[[], str]) -> None:
    """Read turns and commands from `lines` until /exit or the end of the input."""
    while True:
        try:
            line = lines().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.note("")
            return
        if line in ("/exit", "/quit"):
            return
        if line.startswith("/"):
            _command(conversation, line)
        elif line:
            try:
                conversation.ask(line, _stream)
                print(flush=True)
            except SopError as error:
                console.note(f"error: {error}")


def _command(conversation: Talk, line: str) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        conversation.reset()
        console.note("a new conversation")
    elif name == "/system" and rest:
        conversation.system = rest
        conversation.reset()
        console.note("a new conversation with this system message")
    elif name == "/system":
        console.note(conversation.system or "no system message of its own (the template may write one)")
    elif name == "/save" and rest:
        save(conversation, Path(rest).expanduser())
    elif name == "/help":
        console.note(HELP)
    else:
        console.note(f"no command {line!r}\n{HELP}")


def save(conversation: Talk, path: Path) -> None:
    """Append the conversation as one JSON line `{"messages": [...]}`, one for each model."""
    try:
        with path.open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in conversation.rows())
    except OSError as error:
        console.note(f"cannot write {path}: {error.strerror}")
        return
    console.note(f"{len(conversation.messages)} messages added to {path}")


VERB = Verb(
    name="infer.chat", config=Config,
    preflight=lambda config: [] if config.model or config.adapter else [("model", "no model to talk to", "--model FOLDER, for example the output of `sop train merge`")],
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sop infer chat`."""

    def work() -> int:
        args, settings = parse_arguments(VERB, list(sys.argv[1:] if argv is None else argv))
        config = load_for(VERB, args.config, settings).config
        configure(config)
        conversation = open_talk(config)
        if config.prompt is not None:
            conversation.ask(config.prompt, _stream)
            print(flush=True)
            return errors.OK
        for name, one in conversation.conversations.items() if isinstance(conversation, SideBySide) else [(config.adapter or config.model, conversation)]:
            console.note(f"{name}: {one.renderer.name}")
        console.note("/help shows the commands")
        interactive = sys.stdin.isatty()
        talk(conversation, lambda: input("> " if interactive else ""))
        return errors.OK

    return guarded(work)
