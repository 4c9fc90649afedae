"""The door of `sop infer serve`: what every request passes before the native server behind it sees it.

The native server answers more than the documented endpoints (other clients' slots, its own settings), takes bodies of any size, queues without end, and compares keys
byte by byte. So it listens on loopback under a key that only this process knows, and this door lets through: known endpoints, the right key (compared in
constant time), bodies of a bounded size that ask for what the API documents (a parameter of the native server could write another prompt), and a bounded number of
requests at once. Streams pass through unchanged; a client that leaves, or does not read for `seconds`, takes its request with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

OPEN = ("/health",)  # answers without a key, as load balancers expect
READ = ("/v1/models",)
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
ROLES = ("system", "user", "assistant", "tool")
_COMMON = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "stream", "stream_options", "seed", "presence_penalty", "frequency_penalty",
    "repeat_penalty", "logit_bias", "logprobs",
}  # fmt: skip
COMPLETION_PARAMETERS = frozenset(_COMMON | {"prompt"})
CHAT_PARAMETERS = frozenset(
    _COMMON | {"messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs"}
)
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier"})  # for the service that they name, not for the model
MOST_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client, and all of them together, may ask for."""

    body_bytes: int
    requests: int
    choices: int  # prompts of one completion request
    seconds: float


@dataclass(kw_only=True)
class Door:
    """One door before one native server.

    Args:
        key: what clients must send as `Authorization: Bearer KEY`.
        behind: address of the native server.
        behind_key: its key.
        control: texts of control tokens that no message may hold; the native server would read them as control tokens.
        variables: template variables under which the native server writes the prompt of training.
    """

    key: str = field(repr=False)
    behind: str
    behind_key: str = field(repr=False)
    limits: Limits
    control: Sequence[str] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    at_once: int = 0

    def app(self) -> web.Application:
        """The application; it holds one client session for its lifetime."""
        app = web.Application(client_max_size=self.limits.body_bytes, middlewares=[_errors_as_json])
        app.cleanup_ctx.append(self._session)
        for path in OPEN:
            app.router.add_get(path, self._pass)
        for path in READ:
            app.router.add_get(path, self._keyed(self._pass))
        app.router.add_post(CHAT, self._keyed(self._ask))
        app.router.add_post(COMPLETE, self._keyed(self._ask))
        return app

    async def _session(self, app: web.Application) -> AsyncIterator[None]:
        # a connection for each request: the native server closes idle ones just when the next request is sent on them
        connector = TCPConnector(force_close=True, limit=0)
        headers = {"Authorization": f"Bearer {self.behind_key}"}
        async with ClientSession(self.behind, headers=headers, timeout=ClientTimeout(total=None), connector=connector) as self.session:
            yield

    def _keyed(self, handler: Callable[[web.Request], Any]) -> Callable[[web.Request], Any]:
        async def checked(request: web.Request) -> web.StreamResponse:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(errors="surrogateescape"), self.key.encode()):
                return problem(401, "missing or wrong API key: send it as `Authorization: Bearer KEY`", "authentication_error")
            response: web.StreamResponse = await handler(request)
            return response

        return checked

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        async with self.session.get(request.path) as answer:
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        if self.at_once >= self.limits.requests:
            return problem(429, f"{self.limits.requests} requests are under way, which is the limit; try again later", "rate_limit_error", {"Retry-After": "1"})
        self.at_once += 1
        try:
            try:
                body = await asyncio.wait_for(request.read(), self.limits.seconds)
            except asyncio.TimeoutError:
                return problem(408, f"the request did not arrive within {self.limits.seconds:g} s")
            asked = self._checked(body, request.path)
            return asked if isinstance(asked, web.Response) else await self._answer(request, asked)
        finally:
            self.at_once -= 1

    def _checked(self, body: bytes, path: str) -> dict[str, Any] | web.Response:
        """The request as the native server gets it, or why it is refused."""
        try:
            asked = json.loads(body)
            if not isinstance(asked, dict):
                raise Refused("the body must be a JSON object")
            checked = _chat(asked, self.control) if path == CHAT else _completion(asked, self.limits.choices)
        except Refused as error:
            return problem(400, str(error))
        except (ValueError, RecursionError) as error:
            return problem(400, f"the body is not JSON: {type(error).__name__}")
        if path == CHAT and self.variables:
            checked["chat_template_kwargs"] = {**self.variables, **checked.get("chat_template_kwargs", {})}
        return checked

    async def _answer(self, request: web.Request, asked: Mapping[str, Any]) -> web.StreamResponse:
        try:
            async with self.session.post(request.path, json=asked) as answer:
                if answer.content_type != "text/event-stream":
                    body = await answer.read()
                    return web.Response(status=answer.status, body=body, content_type=answer.content_type)
                stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
                await asyncio.wait_for(stream.prepare(request), self.limits.seconds)
                async for piece in answer.content.iter_any():
                    await asyncio.wait_for(stream.write(piece), self.limits.seconds)
                await asyncio.wait_for(stream.write_eof(), self.limits.seconds)
                return stream
        except asyncio.TimeoutError:  # the client does not read
            if request.transport is not None:
                request.transport.abort()
            raise asyncio.CancelledError from None


@web.middleware
async def _errors_as_json(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    """The server's own refusals (no such path, too large) in the shape of the API."""
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except web.HTTPException as error:
        headers = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
        return problem(error.status, error.text or error.reason, headers=headers)
    except ConnectionResetError:  # the client is gone, perhaps before it had asked
        raise asyncio.CancelledError from None
    except ClientError:
        return problem(503, "the model behind this address does not answer", "server_error")


def problem(status: int, message: str, kind: str = "invalid_request_error", headers: Mapping[str, str] | None = None) -> web.Response:
    """An error in the shape that OpenAI's clients read."""
    return web.json_response({"error": {"message": message, "type": kind, "code": status}}, status=status, headers=dict(headers or {}))


# --- what may be asked --------------------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """Why a request is no good."""


def _known(asked: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    unknown = sorted(set(asked) - known - IGNORED)
    if unknown:
        raise Refused(f"unknown parameter {unknown[0][:80]!r}; known are {', '.join(sorted(known))}")
    if not isinstance(asked.get("top_logprobs", 0) or 0, int) or not 0 <= (asked.get("top_logprobs") or 0) <= MOST_LOGPROBS:
        raise Refused(f"`top_logprobs` must be a number from 0 to {MOST_LOGPROBS}")
    if not isinstance(asked.get("logprobs", 0) or 0, int) or (asked.get("logprobs") or 0) > MOST_LOGPROBS:
        raise Refused(f"`logprobs` must be true, false, or a number up to {MOST_LOGPROBS}")
    return {name: value for name, value in asked.items() if name in known}


def _completion(asked: Mapping[str, Any], choices: int) -> dict[str, Any]:
    prompt = asked.get("prompt")
    if not isinstance(prompt, (str, list)):
        raise Refused("`prompt` must be a text or a list")
    if isinstance(prompt, list) and len(prompt) > choices and not all(isinstance(p, int) for p in prompt):
        raise Refused(f"`prompt` may list {choices} prompts")
    return _known(asked, COMPLETION_PARAMETERS)


def _chat(asked: Mapping[str, Any], control: Sequence[str]) -> dict[str, Any]:
    messages, tools = asked.get("messages"), asked.get("tools") or []
    if not isinstance(messages, list) or not messages:
        raise Refused("`messages` must be a list of at least one message")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused("`tools` must be a list of objects")
    if not isinstance(asked.get("chat_template_kwargs", {}), dict):
        raise Refused("`chat_template_kwargs` must be an object")
    checked = {**_known(asked, CHAT_PARAMETERS), "messages": [_message(message) for message in messages]}
    found = next((c for text in _texts([checked["messages"], tools]) for c in control if c in text), None)
    if found is not None:
        raise Refused(f"a message holds the control token {found!r}; it would be read as one, not as text")
    return checked


def _message(message: Any) -> dict[str, Any]:
    """A message with one text: parts are joined, so that nothing can be hidden across them."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise Refused(f"each message must be an object whose `role` is one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            raise Refused("each part of `content` must be a text; this model reads no images, sound or files")
        return {**message, "content": "\n".join(part["text"] for part in content)}
    if not (isinstance(content, str) or (content is None and message["role"] == "assistant")):
        raise Refused("`content` must be a text, or a list of text parts")
    return message


def _texts(value: Any) -> Iterator[str]:
    """Every text below a value; without recursion, since its depth is the client's choice."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, (dict, list)):
            waiting += [*item, *item.values()] if isinstance(item, dict) else item


def run(door: Door, listening: Any, ready: Callable[[], None]) -> None:
    """Serve on a bound socket until SIGINT or SIGTERM; `ready` is called once requests are answered."""
    app = door.app()

    async def say(_: web.Application) -> None:
        ready()

    app.on_startup.append(say)
    with contextlib.suppress(KeyboardInterrupt):
        web.run_app(app, sock=listening, access_log=None, print=None, handler_cancellation=True, shutdown_timeout=2.0)
