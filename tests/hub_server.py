"""A hub on loopback that speaks enough of the Hugging Face HTTP API for the real client, and misbehaves on command.

    with HubServer() as server:
        server.add("dataset", "owner/name", {"train.jsonl": b"..."})
        server.misbehave("GET", r"/resolve/", status=503, times=2)
        subprocess.run([...], env=server.environment(tmp_path))

Files of a large kind (safetensors, Parquet) are "LFS": named by sha256 and served through a redirect, as on the real hub.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin", ".gz", ".zst", ".pt")
Files = Mapping[str, bytes]


@dataclass
class Fault:
    """What the server does instead of answering, for the next `times` requests that match."""

    method: str
    path: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    reset_after: int | None = None  # send so many bytes of the body, then reset the connection
    short_by: int = 0  # claim the whole length, send so many bytes fewer, close
    stall: float = 0.0  # seconds before anything is sent
    flip: bool = False  # send other bytes than the real ones


@dataclass
class Repository:
    """A repository: `commits` maps a commit to its files, `refs` a branch or tag to a commit."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Files, ref: str = "main") -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for name in sorted(files):
            digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
        sha = digest.hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that go away, and our own resets


class HubServer:
    """The server; a context manager. `url` is its endpoint, `requests` what it was asked, `sent` how many body bytes it sent."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.makers: dict[tuple[str, str], Callable[[], Files]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.sent = 0
        self.lock = threading.RLock()

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: str, name: str, files: Files, **options: Any) -> str:
        """Put a repository (`dataset` or `model`), or a new commit on its main branch; returns the commit."""
        with self.lock:
            repository = self.repositories.setdefault((kind, name), Repository())
            for key, value in options.items():
                setattr(repository, key, value)
            return repository.commit(files)

    def add_lazily(self, kind: str, name: str, maker: Callable[[], Files]) -> None:
        """A repository whose files are made when it is first asked for."""
        self.makers[kind, name] = maker

    def find(self, kind: str, name: str) -> Repository | None:
        with self.lock:
            if (kind, name) in self.makers and (kind, name) not in self.repositories:
                self.add(kind, name, self.makers[kind, name]())
            return self.repositories.get((kind, name))

    def misbehave(self, method: str, path: str, **what: Any) -> Fault:
        """Script a fault for requests of `method` whose path matches the regular expression."""
        fault = Fault(method, path, **what)
        with self.lock:
            self.faults.append(fault)
        return fault

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def reset(self) -> None:
        """Forget faults, requests and every repository that is not made lazily."""
        with self.lock:
            self.faults.clear()
            self.requests.clear()
            self.sent = 0
            for key in [k for k in self.repositories if k not in self.makers]:
                del self.repositories[key]

    def environment(self, home: Path, **extra: str) -> dict[str, str]:
        """The environment of a subprocess whose hub is this server and whose caches are below `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "MODELSCOPE"))}
        return {
            **kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "TOKENIZERS_PARALLELISM": "false", **extra,
        }  # fmt: skip


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    """Rows as JSONL bytes."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def digest_of(path: str, data: bytes) -> str:
    """What the hub names a file by: sha256 for large ones, else the git blob id."""
    if is_large(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer("POST")

    def answer(self, method: str) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append(f"{method} {path}" + (f" {self.headers['Range']}" if self.headers.get("Range") else ""))
        self.fault = self.hub.fault_for(method, path)
        if self.fault and self.fault.stall:
            threading.Event().wait(self.fault.stall)
        if self.fault and self.fault.status:
            self.reply(self.fault.status, b"the server misbehaves", self.fault.headers)
            return
        api = re.fullmatch(r"/api/(models|datasets)/((?:[^/]+/)?[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        # an owner-less name followed by a verb must not be read as owner/name
        if api and api[2].split("/")[-1] in ("revision", "tree", "paths-info"):
            api = re.fullmatch(r"/api/(models|datasets)/([^/]+)/(revision|tree|paths-info)/([^/]+)(?:/(.*))?", path)
        file = re.fullmatch(r"/(datasets/)?((?:[^/]+/)?[^/]+)/resolve/([^/]+)/(.+)", path)
        blob = re.fullmatch(r"/cdn/(datasets/)?((?:[^/]+/)?[^/]+)/at/([^/]+)/(.+)", path)
        scope = re.fullmatch(r"/api/v1/(models|datasets)/([^/]+/[^/]+)/repo(?:/(?:tree|files))?", path)
        if scope:
            self.modelscope(scope[1][:-1], scope[2])
        elif api:
            self.api(api[1][:-1], api[2], api[3], api[4], api[5])
        elif blob:
            self.file("dataset" if blob[1] else "model", blob[2], blob[3], blob[4], redirect=False)
        elif file:
            self.file("dataset" if file[1] else "model", file[2], file[3], file[4], redirect=True)
        else:
            self.reply(404, b"no such route")

    def open(self, kind: str, name: str, revision: str | None) -> tuple[str, Files] | None:
        """The commit and its files; answers with the right error where it may not be read."""
        repository = self.hub.find(kind, name)
        authorised = (self.headers.get("Authorization") or "").startswith("Bearer hf_good")
        if repository is None or (repository.private and not authorised):
            self.reply(404 if authorised else 401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        if repository.gated and not authorised:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this repository is restricted"})
            return None
        commit = repository.refs.get(revision or "main", revision or "")
        if commit not in repository.commits:
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
            return None
        return commit, repository.commits[commit]

    def api(self, kind: str, name: str, verb: str | None, revision: str | None, below: str | None) -> None:
        opened = self.open(kind, name, revision)
        if opened is None:
            return
        commit, files = opened
        if verb == "tree":
            inner = [p for p in sorted(files) if not below or p.startswith(f"{below}/")]
            if below and not inner:
                self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            self.page([self.entry(p, files[p]) for p in inner])
        elif verb == "paths-info":
            wanted = parse_qs(self.body.decode()).get("paths") or json.loads(self.body or b"{}").get("paths", [])
            self.json([self.entry(p, files[p]) for p in wanted if p in files])
        else:
            siblings = [{"rfilename": p, **(self.blob(p, files[p]) if "blobs" in self.query else {})} for p in sorted(files)]
            self.json({"_id": "0", "id": name, "sha": commit, "private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    @staticmethod
    def blob(path: str, data: bytes) -> dict[str, Any]:
        entry = _Handler.entry(path, data)
        lfs = {"lfs": {"sha256": entry["lfs"]["oid"], "size": len(data), "pointerSize": 134}} if "lfs" in entry else {}
        return {"size": len(data), "blobId": entry["oid"], **lfs}

    def page(self, entries: list[dict[str, Any]], size: int = 3) -> None:
        """Small pages, so that the client has to follow the Link header."""
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + size < len(entries):
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={start + size}>; rel="next"'
        self.json(entries[start : start + size], headers)

    @staticmethod
    def entry(path: str, data: bytes) -> dict[str, Any]:
        digest = digest_of(path, data)
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": digest}
        if is_large(path):
            entry |= {"oid": hashlib.sha1(digest.encode(), usedforsecurity=False).hexdigest(), "lfs": {"oid": digest, "size": len(data), "pointerSize": 134}}
        return entry

    def file(self, kind: str, name: str, revision: str, path: str, *, redirect: bool) -> None:
        opened = self.open(kind, name, revision)
        if opened is None:
            return
        commit, files = opened
        if path not in files:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit})
            return
        data = files[path]
        headers = {"ETag": f'"{digest_of(path, data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_large(path) and redirect:
            linked = {"X-Linked-Etag": f'"{digest_of(path, data)}"', "X-Linked-Size": str(len(data))}
            prefix = "datasets/" if kind == "dataset" else ""
            self.reply(302, b"", {**headers, **linked, "Location": f"{self.hub.url}/cdn/{prefix}{name}/at/{commit}/{path}"})
            return
        if self.fault and self.fault.flip:
            data = bytes(b ^ 1 for b in data)
        status = 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            if first >= len(data):
                self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        self.reply(status, data, headers)

    def modelscope(self, kind: str, name: str) -> None:
        """ModelScope's own API: a listing with sha256 sums, and files by query."""
        repository = self.hub.find(kind, name)
        if repository is None:
            self.json({"Code": 10010205001, "Message": "not found", "Success": False}, status=404)
            return
        files = repository.commits[repository.refs["main"]]
        wanted = self.query.get("FilePath")
        if wanted and wanted[0] in files:
            self.reply(200, files[wanted[0]])
        elif wanted:
            self.reply(404, b"")
        else:
            below = (self.query.get("Root") or [""])[0].strip("/")
            inner = [p for p in sorted(files) if not below or p.startswith(f"{below}/")] if self.query.get("PageNumber", ["1"])[0] == "1" else []
            entries = [{"Path": p, "Name": p.split("/")[-1], "Type": "blob", "Size": len(files[p]), "Sha256": hashlib.sha256(files[p]).hexdigest()} for p in inner]
            self.json({"Code": 200, "Success": True, "Data": {"Files": entries}})

    def json(self, value: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        data = json.dumps(value).encode()
        extra = {"Content-Type": "application/json", **(headers or {})}
        if "gzip" in (self.headers.get("Accept-Encoding") or ""):
            data, extra["Content-Encoding"] = gzip.compress(data, 1), "gzip"
        self.reply(status, data, extra)

    def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        fault = self.fault if self.command == "GET" else None
        cut = fault is not None and (fault.reset_after is not None or fault.short_by > 0)
        if cut:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.reset_after is not None:
            data = data[: fault.reset_after]
        elif fault and fault.short_by:
            data = data[: -fault.short_by]
        self.hub.sent += len(data)
        self.wfile.write(data)
        if cut:
            self.close_connection = True
