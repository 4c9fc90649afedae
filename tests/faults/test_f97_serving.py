"""F97: the server exposed by accident; huge prompts; bad JSON; clients that disconnect or dawdle; 64 of them at once."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from self_model_sop.infer import serve
from tiny_gguf import KEY, tiny_gguf

pytest.importorskip("xllamacpp", reason="the extra `serve` is not installed")
pytest.importorskip("aiohttp")
openai = pytest.importorskip("openai")

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "你好"}]
CLIENTS = 64


def post(address: str, path: str, body: Any, key: str | None = KEY) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data=data, headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def test_the_openai_client_works(served: str) -> None:
    api = client(served)
    assert [m.id for m in api.models.list()] == ["tiny"]
    whole = api.chat.completions.create(model="tiny", messages=HI, max_tokens=8, temperature=0)
    assert whole.usage.completion_tokens == 8 and whole.choices[0].finish_reason == "length"
    pieces = list(api.chat.completions.create(model="tiny", messages=HI, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    assert pieces[-1].usage.completion_tokens == 8
    text = api.completions.create(model="tiny", prompt=["The patient", "高血压"], max_tokens=4, temperature=0)
    assert len(text.choices) == 2
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served}/v1", api_key="wrong", max_retries=0).models.list()


def test_64_streams_at_once_are_those_of_their_clients(served: str) -> None:
    """Each client asks for a letter of its own, by a bias that no rounding of the model can outweigh, so a piece in a foreign stream would show."""
    letters = [chr(33 + i) for i in range(CLIENTS)]  # the first tokens of a byte-level vocabulary

    async def everyone() -> list[tuple[str, int]]:
        async def one(i: int) -> tuple[str, int]:
            text, ids = "", set()
            asked = {"messages": [{"role": "user", "content": f"{i} 号{'病人' * (i % 7)}"}], "logit_bias": {str(i): 100}, "max_tokens": 8 + i % 9, "temperature": i % 2}
            async for piece in await api.chat.completions.create(model="tiny", stream=True, **asked):
                ids.add(piece.id)
                text += piece.choices[0].delta.content or ""
            return text, len(ids)

        async with openai.AsyncOpenAI(base_url=f"{served}/v1", api_key=KEY, max_retries=0, timeout=120) as api:
            return await asyncio.gather(*map(one, range(CLIENTS)))

    assert asyncio.run(everyone()) == [(letter * (8 + i % 9), 1) for i, letter in enumerate(letters)]


@pytest.mark.parametrize("path", ["/v1/models", CHAT, COMPLETE])
@pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1], KEY + "x", "schlüssel"])
def test_without_the_key_nothing_is_answered(served: str, path: str, key: str | None) -> None:
    method = "GET" if path == "/v1/models" else "POST"
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(served + path, data=b"{}" if method == "POST" else None, headers=headers, method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 401


def test_health_needs_no_key_and_nothing_else_is_there(served: str) -> None:
    with urllib.request.urlopen(f"{served}/health", timeout=60) as answer:
        assert json.loads(answer.read())["status"] == "ok"
    for path in ("/slots", "/props", "/metrics", "/lora-adapters", "/tools", "/", "/v1/../slots", "//slots"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(served + path, headers={"Authorization": f"Bearer {KEY}"}), timeout=60)
        assert caught.value.code == 404, path


def says(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **more}


def hi(**more: Any) -> dict[str, Any]:
    return {"messages": HI, **more}


BAD: dict[str, tuple[str, Any]] = {
    "torn JSON": (CHAT, b'{"messages": ['),
    "no JSON": (CHAT, b"\xff\xfe\x00"),
    "empty": (CHAT, b""),
    "a list": (CHAT, [1]),
    "nothing": (CHAT, {}),
    "deep": (CHAT, b'{"messages": ' + b"[" * 100_000),
    "surrogate": (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
    "NaN": (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}'),
    "no messages": (CHAT, {"messages": []}),
    "a text": (CHAT, {"messages": ["hi"]}),
    "no role": (CHAT, {"messages": [{"content": "hi"}]}),
    "another role": (CHAT, {"messages": [{"role": "root", "content": "hi"}]}),
    "a number": (CHAT, says(5)),
    "an image": (CHAT, says([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])),
    "oversized prompt": (CHAT, says("血压" * 2000)),
    "negative length": (CHAT, hi(max_tokens=-5)),
    "many choices": (CHAT, hi(n=1000)),
    "hot": (CHAT, hi(temperature="hot")),
    "tools": (CHAT, hi(tools=5)),
    "logprobs": (CHAT, hi(logprobs=True, top_logprobs=10**9)),
    "a parameter of the native server": (CHAT, hi(add_generation_prompt=False)),
    "another slot": (CHAT, hi(id_slot=1)),
    "a grammar": (CHAT, hi(grammar="root ::= (")),
    "a control token": (CHAT, says("a<|im_end|>b")),
    "one in a part": (CHAT, says([{"type": "text", "text": "<|im_start|>"}])),
    "one in a tool": (CHAT, hi(tools=[{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}])),
    "no prompt": (COMPLETE, {}),
    "ids beyond": (COMPLETE, {"prompt": [10**9]}),
    "mixed": (COMPLETE, {"prompt": [1, None]}),
    "many prompts": (COMPLETE, {"prompt": ["a"] * 50}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_the_clients_fault(served: str, name: str) -> None:
    status, answer = post(served, *BAD[name])
    assert status == 400 and answer["error"]["message"], answer


def test_a_body_beyond_the_limit_is_not_read(served: str) -> None:
    assert post(served, CHAT, {"messages": [{"role": "user", "content": "x" * 2_000_000}]})[0] == 413


def test_clients_that_leave_or_never_read_do_no_harm(served: str) -> None:
    host, port = served.removeprefix("http://").split(":")
    body = json.dumps({"messages": HI, "max_tokens": 200, "stream": True, "temperature": 1}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with ExitStack() as silent:
        for i in range(24):
            connection = socket.create_connection((host, int(port)), timeout=60)
            connection.sendall(head + body if i % 3 else head + body[:10])
            if i % 3 == 2:
                silent.enter_context(connection)  # asks, stays, and never reads
                continue
            with connection:  # leaves: before it has asked, or once the answer has begun
                assert not i % 3 or b"200 OK" in connection.recv(200)
        started = time.monotonic()
        assert post(served, CHAT, hi(max_tokens=2))[0] == 200
        assert time.monotonic() - started < 30


# --- the door and the key ------------------------------------------------------------------------------------------------------------------


def door(**limits: Any) -> Any:
    from self_model_sop.infer.front import Door, Limits

    return Door(key=KEY, behind="http://127.0.0.1:9", behind_key="-", limits=Limits(**{"body_bytes": 1000, "requests": 4, "choices": 4, "seconds": 60.0, **limits}))


def ask(door: Any, data: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    from aiohttp.test_utils import TestClient, TestServer

    async def once() -> tuple[int, dict[str, Any], dict[str, str]]:
        async with TestClient(TestServer(door.app())) as to, to.post(CHAT, data=data, headers={"Authorization": f"Bearer {KEY}"}) as answer:
            return answer.status, await answer.json(), dict(answer.headers)

    return asyncio.run(once())


def test_more_requests_than_the_limit_are_told_to_wait() -> None:
    full = door()
    full.at_once = 4
    status, answer, headers = ask(full, json.dumps({"messages": HI}))
    assert status == 429 and headers["Retry-After"] == "1" and "4 requests" in answer["error"]["message"]


def test_a_client_that_sends_slowly_is_dropped() -> None:
    async def slowly() -> Any:
        yield b'{"messages"'
        await asyncio.sleep(5)
        yield b": []}"

    started = time.monotonic()
    slow = door(seconds=0.3)
    assert ask(slow, slowly())[0] == 408 and time.monotonic() - started < 4
    assert slow.at_once == 0


def test_a_dead_model_is_said_to_be_dead() -> None:
    status, answer, _ = ask(door(), json.dumps({"messages": HI}))
    assert status == 503 and answer["error"]["type"] == "server_error"

    async def health() -> int:
        from aiohttp.test_utils import TestClient, TestServer

        async with TestClient(TestServer(door().app())) as to, to.get("/health") as answer:
            return int(answer.status)

    assert asyncio.run(health()) == 503


def test_the_key_is_in_no_text_of_the_door() -> None:
    assert KEY not in repr(door())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "somewhere.example"])
def test_another_address_without_a_key_is_refused(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOP_API_KEY", raising=False)
    assert serve.main(["--model", str(tiny_gguf(tmp_path / "m.gguf")), "--host", host]) == 2
    assert "can be reached by other machines" in capsys.readouterr().err


def test_a_fresh_key_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOP_API_KEY", raising=False)
    with pytest.raises(serve.SopError, match="never written to a log"):
        serve.api_key("127.0.0.1")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    first, second = serve.api_key("127.0.0.1"), serve.api_key("127.0.0.1")
    assert first[1] and len(first[0]) >= 24 and first != second
    monkeypatch.setenv("SOP_API_KEY", "short")
    with pytest.raises(serve.SopError, match="too weak"):
        serve.api_key("127.0.0.1")


def test_a_taken_port_is_found_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(serve.SopError, match="cannot listen"):
        serve.listen("127.0.0.1", taken.getsockname()[1])
