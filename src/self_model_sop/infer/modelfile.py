"""An Ollama `Modelfile` whose TEMPLATE writes the same prompts as the one rendering.

Ollama does not run the Jinja template inside a GGUF file; it wants one in Go's template language (`text/template`). What a chat template writes between two texts depends,
for every template that ships here, only on the roles on both sides. So those pieces are read off the one rendering, and the TEMPLATE is a table of them. A template
that does more is found out by comparing whole conversations; the TEMPLATE is left out then, and the Modelfile says so.

Ollama joins neighbouring messages of one role and hands the template `.Messages` (`template/template.go` of Ollama).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact import write_atomic
from ..errors import SopError
from ..train.sandbox import TemplateError

START, END = "", "end"
ROLES = ("system", "user", "assistant")
_LARGEST_CONTEXT = 8192
Table = Mapping[tuple[str, str], str]  # (role before, role after) -> what stands between their texts


@dataclass(frozen=True)
class GoTemplate:
    """A TEMPLATE as a table, and what it cannot do."""

    table: Table
    trims: bool = False  # the chat template cuts white space off the ends of texts; Go's template language cannot

    def compose(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What it writes, without a Go interpreter."""
        before, text = START, ""
        for message in messages:
            text += self.table[before, message["role"]] + message["content"]
            before = message["role"]
        return text + self.table[before, END]

    def source(self) -> str:
        """Go's template language. All text is in string constants; white space between actions is for people and trimmed."""
        lines = ['{{- $before := "" }}', "{{- range .Messages }}"]
        for i, role in enumerate(ROLES):
            lines.append(f'{{{{- {"else if" if i else "if"} eq .Role "{role}" }}}}')
            lines += [*_choice({a: text for (a, b), text in self.table.items() if b == role}), "{{- .Content }}"]
        lines += ["{{- end }}", "{{- $before = .Role }}", "{{- end }}", *_choice({a: text for (a, b), text in self.table.items() if b == END})]
        return "\n".join([*lines, '{{- "" -}}', ""])


def _choice(pieces: Mapping[str, str]) -> Iterator[str]:
    """Lines that write the piece for the role before; one line where it makes no difference."""
    if len(set(pieces.values())) == 1:
        yield f"{{{{- {_quoted(next(iter(pieces.values())))} }}}}"
        return
    for i, (before, text) in enumerate(pieces.items()):
        yield f'{{{{- {"else if" if i else "if"} eq $before "{before}" }}}}{{{{ {_quoted(text)} }}}}'
    if pieces:
        yield "{{- end }}"


def _quoted(text: str) -> str:
    """A Go string constant (the escapes of JSON are among those of Go); braces are escaped, since Ollama's parser need not see them."""
    return json.dumps(text, ensure_ascii=False).replace("{", "\\x7b").replace("}", "\\x7d")


# --- from the one rendering -----------------------------------------------------------------------------------------------------------------

_U, _A, _S = ({"role": role, "content": ""} for role in ("user", "assistant", "system"))
_NEEDED = ((_U,), (_U, _A, _U))
_MAYBE = ((_S, _U), (_S, _U, _A, _U), (_U, _A), (_U, _A, _S, _U))  # where a template refuses one, or writes it otherwise, it stays out


def go_template(renderer: Any, *, bos: str = "") -> GoTemplate | None:
    """The table of a template; None where one is not enough.

    Args:
        renderer: the one rendering.
        bos: the first token's text where the runtime adds that token itself.
    """
    table: dict[tuple[str, str], str] = {}
    for roles in (*_NEEDED, *_MAYBE):
        messages = [{**message, "content": f"\u2e28{i}\u2e29"} for i, message in enumerate(roles)]
        befores, afters = [START, *(m["role"] for m in messages)], [*(m["role"] for m in messages), END]
        try:
            found = dict(zip(zip(befores, afters, strict=True), _pieces(_written(renderer, messages, bos), messages), strict=True))
        except (TemplateError, ValueError):
            found = None
        if found is not None and all(table.get(pair, text) == text for pair, text in found.items()):
            table |= found
        elif roles in _NEEDED:
            return None
    plain, edged = (GoTemplate(table, trims) for trims in (False, True))
    if not _agrees(plain, renderer, bos, _PROBES):
        return None
    return plain if _agrees(plain, renderer, bos, _EDGES) else edged


def _written(renderer: Any, messages: Sequence[Mapping[str, str]], bos: str) -> str:
    return str.__str__(renderer.prompt_text(messages)).removeprefix(bos)


def _pieces(text: str, messages: Sequence[Mapping[str, str]]) -> list[str]:
    """What stands around the messages' texts, each of which must be there once and in order."""
    pieces = []
    for message in messages:
        before, found, text = text.partition(message["content"])
        if not found or message["content"] in text:
            raise ValueError(message["content"])
        pieces.append(before)
    return [*pieces, text]


def _say(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, *({"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts))]


_PROBES = (
    _say("你好，who are you?"),
    _say("你好", "我是助手。\n\n1. x", "再见"),
    _say("1", "2", "3", "4", "5", system="你是医生。"),
    _say('{"a": "{{ .System }}"}', "<b> & \\n '\"", "`'\""),
    _say("第一行\n\n第二行", "```py\nx = {}\n```", "好", system="s\ns"),
)
_EDGES = (_say("  a \n"), _say("a", "\n b  ", "c ", system=" s\n"))


def _agrees(template: GoTemplate, renderer: Any, bos: str, probes: Sequence[list[dict[str, str]]]) -> bool:
    for messages in probes:
        try:
            expected = _written(renderer, messages, bos)
        except TemplateError:
            continue  # a family without system messages
        try:
            if template.compose(messages) != expected:
                return False
        except KeyError:
            return False
    return True


# --- the file -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Modelfile:
    """What `ollama create` reads."""

    file: str
    template: GoTemplate | None
    stop: Sequence[str]
    parameters: Mapping[str, float | int] = field(default_factory=dict)
    system: str | None = None

    def __str__(self) -> str:
        """The text of the file."""
        lines = [f"# ollama create NAME -f {_comment(Path(self.file).stem)}.Modelfile (in this folder)", f"FROM ./{self.file}"]
        if self.template is None:
            lines.append("# No TEMPLATE: the chat template does more than a table of roles can say, so none is proven equal. llama.cpp runs the one inside the GGUF file.")
        else:
            if self.template.trims:
                lines.append("# The chat template cuts white space off the ends of each text and this TEMPLATE cannot: send texts without it.")
            lines.append(f'TEMPLATE """{self.template.source()}"""')
        if self.system is not None:
            if '"""' in self.system:
                raise SopError('a system message for Ollama cannot hold """', where="system", fix="write it otherwise")
            lines.append(f'SYSTEM """{self.system}"""')
        lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in self.stop]
        return "\n".join([*lines, *(f"PARAMETER {name} {value:g}" for name, value in self.parameters.items())]) + "\n"


def _comment(text: str) -> str:
    return " ".join(text.split())


def write(path: Path, gguf: Path, renderer: Any, *, system: str | None = None, parameters: Mapping[str, float | int] | None = None) -> Modelfile:
    """Write the Modelfile of a GGUF file.

    Args:
        path: where; Ollama reads `FROM` relative to it.
        gguf: the file (of a split one, the first part); says whether the runtime adds the first token, and the context.
        renderer: the one rendering of the model.
        system: a system message for conversations without one.
        parameters: Ollama's parameters; none: temperature 0.7, top_p 0.9, repeat_penalty 1.05, as `sop infer chat`.

    Returns:
        what was written; `template` is None where no TEMPLATE can be proven equal.
    """
    adds_bos, context = _facts(gguf)
    tokenizer = renderer.tokenizer
    template = go_template(renderer, bos=tokenizer.bos_token if adds_bos and tokenizer.bos_token else "")
    stop = [tokenizer.convert_ids_to_tokens(i) for i in renderer.stop_ids]
    chosen: dict[str, float | int] = dict(parameters if parameters is not None else {"temperature": 0.7, "top_p": 0.9, "repeat_penalty": 1.05})
    if context:
        chosen.setdefault("num_ctx", min(context, _LARGEST_CONTEXT))
    made = Modelfile(file=gguf.name, template=template, stop=stop, parameters=chosen, system=system)
    write_atomic(path, str(made))
    return made


def _facts(path: Path) -> tuple[bool, int | None]:
    """(whether the runtime puts the first token before a prompt, the model's context); llama.cpp's default for a file that does not say is by tokenizer."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    adds = fields.get("tokenizer.ggml.add_bos_token")
    context = fields.get(f"{fields['general.architecture'].contents()}.context_length")
    return bool(adds.contents()) if adds else fields["tokenizer.ggml.model"].contents() == "llama", int(context.contents()) if context else None
