"""`sop doctor`: what is there, what is missing, how to get it; offline unless asked."""

from __future__ import annotations

import http.server
import socket
import threading
from pathlib import Path

import pytest

from self_model_sop.errors import ENVIRONMENT, OK
from self_model_sop.ops import doctor


def test_the_core_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == OK
    out = capsys.readouterr().out
    assert all(word in out for word in ("python", "memory", "disk here", "accelerator", "core packages", "transformers", "extra qlora"))


def test_opens_no_connection_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert doctor.main(["--for", "gguf"]) in (OK, ENVIRONMENT)


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert doctor.main(["--for", "ollama"]) == ENVIRONMENT
    out = capsys.readouterr().out
    assert "for ollama: ollama: install Ollama" in out
    found = [f for f in doctor.packages() if f.what.startswith("extra") and f.state != "ok"]
    assert all(f.fix.startswith(f"pip install 'self-model-sop[{f.what.split()[1]}]'") for f in found)


def test_every_extra_is_known() -> None:
    import tomllib

    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras)


def test_the_hub_is_asked_where_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config/model_config").mkdir(parents=True)
    address = f"http://127.0.0.1:{server.server_port}"
    (tmp_path / "config/model_config/config.yaml").write_text(f"huggingface: {{endpoint: '{address}'}}\n")
    assert doctor.main(["--online"]) == OK
    assert f"{address} answers 200" in capsys.readouterr().out
    server.shutdown()
    server.server_close()
    assert doctor.main(["--online"]) == ENVIRONMENT
    assert "a mirror" in capsys.readouterr().out
