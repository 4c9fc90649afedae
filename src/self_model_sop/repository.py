"""The files of one hub repository: what there is, at which commit, and their bytes, whole or by ranges. Together with hub.py all that talks to a hub."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import console
from .errors import NETWORK, SopError, missing_extra
from .hub import HubConfig, is_network, patiently

Kind = Literal["dataset", "model"]
_BLOCK = 1 << 20
_TIMEOUT = 30.0
_MANY = 50_000


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `digest` is what the hub says its contents are: sha256 for large files, the git blob id for the others."""

    path: str
    size: int
    digest: str | None = None


@dataclass(frozen=True)
class Repository:
    """A dataset or model at one commit. `folder` is set where its files are already local (ModelScope, or a cache that holds no listing)."""

    kind: Kind
    name: str
    commit: str | None
    files: tuple[RemoteFile, ...]
    folder: Path | None = None


def listing(kind: Kind, name: str, hub: HubConfig, subdir: str | None = None) -> Repository:
    """The repository's files at the commit that `hub.revision` means now; without network, out of the cache.

    Raises:
        SopError: where it does not exist, may not be read, or cannot be reached.
    """
    if hub.source == "modelscope":
        return _modelscope(kind, name, hub, subdir)
    if hub.no_network:
        return _cached(kind, name, hub)
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=hub.endpoint)
    info = patiently(lambda: api.repo_info(name, repo_type=kind, revision=hub.revision, files_metadata=True, timeout=_TIMEOUT), name, hub)
    siblings = info.siblings or []
    if len(siblings) < _MANY and all(s.size is not None for s in siblings):
        files = tuple(RemoteFile(s.rfilename, s.size, s.lfs.sha256 if s.lfs else s.blob_id) for s in siblings)
    else:  # the client does not trust the short listing of very large repositories; this one comes in pages
        tree = patiently(lambda: list(api.list_repo_tree(name, recursive=True, revision=info.sha, repo_type=kind)), name, hub)
        files = tuple(RemoteFile(f.path, f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in tree if isinstance(f, RepoFile))
    _remember(kind, name, hub, info.sha, files)
    return Repository(kind, name, info.sha, files)


def head_commit(name: str, hub: HubConfig) -> str | None:
    """The commit that the revision means upstream now; None where that cannot be told within seconds."""
    if hub.source != "hf" or hub.no_network:
        return None
    from huggingface_hub import HfApi

    try:
        sha = HfApi(endpoint=hub.endpoint).dataset_info(name, revision=hub.revision, timeout=3).sha
    except Exception as error:
        if is_network(error):
            return None
        raise
    return str(sha) if sha else None


def open_remote(repository: Repository, file: RemoteFile, hub: HubConfig) -> io.RawIOBase:
    """The file as a seekable stream that fetches only the blocks that are read; out of the cache where it is there."""
    if repository.folder:
        return (repository.folder / file.path).open("rb", buffering=0)
    from huggingface_hub import hf_hub_url

    cached = _in_cache(repository, file, hub)
    if cached:
        return cached.open("rb", buffering=0)
    url = hf_hub_url(repository.name, file.path, repo_type=repository.kind, revision=repository.commit, endpoint=hub.endpoint)
    return _Ranges(url, file.size, f"{repository.name}/{file.path}", hub)


def _in_cache(repository: Repository, file: RemoteFile, hub: HubConfig) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository.name, file.path, cache_dir=hub.cache, revision=repository.commit, repo_type=repository.kind)
    return Path(found) if isinstance(found, str) else None


class _Ranges(io.RawIOBase):
    """Reads a remote file block by block; a broken transfer is taken up again at the block where it stopped."""

    def __init__(self, url: str, size: int, name: str, hub: HubConfig) -> None:
        self._url, self._size, self._name, self._hub = url, size, name, hub
        self._at = self._start = 0
        self._block = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        if not self._start <= self._at < self._start + len(self._block):
            self._start, self._block = self._at, patiently(self._fetch, self._name, self._hub)
        first = self._at - self._start
        data = self._block[first : first + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _fetch(self) -> bytes:
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        start, end = self._at, min(self._at + _BLOCK, self._size)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        response = http_backoff("GET", self._url, headers=headers, timeout=_TIMEOUT, max_retries=0)  # `patiently` does the retries
        hf_raise_for_status(response)
        data: bytes = response.content if response.status_code == 206 else response.content[start:end]
        if len(data) != end - start:
            raise ConnectionError(f"{len(data)} bytes arrived where {end - start} were asked for (from byte {start} of {self._size})")
        return data


def download(repository: Repository, file: RemoteFile, hub: HubConfig, *, force: bool = False) -> Path:
    """The whole file through the client's cache, its contents checked against what the hub declares.

    Raises:
        SopError: where it cannot be fetched, or where other bytes arrive than declared.
    """
    if repository.folder:
        return repository.folder / file.path
    if not force and (cached := _in_cache(repository, file, hub)):
        return cached
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {"repo_type": repository.kind, "revision": repository.commit, "cache_dir": hub.cache, "local_files_only": hub.no_network}
    name = f"{repository.name}/{file.path}"
    path = Path(patiently(lambda: hf_hub_download(repository.name, file.path, endpoint=hub.endpoint, force_download=force, **options), name, hub))
    if file.digest and _digest(path, file.digest) != file.digest:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        what = f"other bytes arrived than the hub declares ({file.digest[:12]}...); refused"
        raise SopError(what, where=name, fix="the mirror is out of step or the transfer was damaged: try again, or use another huggingface.endpoint", code=NETWORK)
    return path


def _digest(path: Path, like: str) -> str:
    """sha256 of the contents, or the git blob id where `like` is one (40 digits)."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as f:
        while chunk := f.read(_BLOCK):
            digest.update(chunk)
    return digest.hexdigest()


def _cache_of(kind: Kind, name: str, hub: HubConfig) -> Path:
    from huggingface_hub import constants

    return Path(hub.cache or constants.HF_HUB_CACHE) / "--".join([f"{kind}s", *name.split("/")])


def _remember(kind: Kind, name: str, hub: HubConfig, commit: str, files: tuple[RemoteFile, ...]) -> None:
    """Keep the listing beside the cached files, so that an offline run knows what is missing."""
    folder = _cache_of(kind, name, hub) / "listings"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{commit}.json").write_text(json.dumps([[f.path, f.size, f.digest] for f in files]), encoding="utf-8")
        (folder / _ref(hub)).write_text(commit, encoding="utf-8")
    except OSError as error:
        console.warn(f"the listing of {name} cannot be kept for offline use: {error.strerror}")


def _ref(hub: HubConfig) -> str:
    return (hub.revision or "main").replace("/", "--") + ".ref"


def _cached(kind: Kind, name: str, hub: HubConfig) -> Repository:
    root, revision = _cache_of(kind, name, hub), hub.revision or "main"
    ref = next((p for p in (root / "listings" / _ref(hub), root / "refs" / revision) if p.is_file()), None)
    commit = ref.read_text(encoding="utf-8").strip() if ref else revision
    listing, snapshot = root / "listings" / f"{commit}.json", root / "snapshots" / commit
    if listing.is_file():
        return Repository(kind, name, commit, tuple(RemoteFile(*entry) for entry in json.loads(listing.read_text(encoding="utf-8"))))
    if snapshot.is_dir():
        return Repository(kind, name, commit, _local_files(snapshot), snapshot)
    fix = "run once without --local_files_only (huggingface.offline: false), or give a local file or folder"
    raise SopError("not in the local cache, and the network is switched off", where=name, fix=fix, code=NETWORK)


def _local_files(folder: Path) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(p.relative_to(folder).as_posix(), p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file())


def _modelscope(kind: Kind, name: str, hub: HubConfig, subdir: str | None) -> Repository:
    """Through ModelScope's own client, which brings whole folders and tells no commit."""
    try:
        import modelscope
    except ImportError:
        raise missing_extra("modelscope", "modelscope") from None
    ignored = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py"]  # pickled weights and code stay where they are
    wanted = {"revision": hub.revision, "cache_dir": hub.cache, "endpoint": hub.endpoint, "allow_patterns": [f"{subdir}/*"] if subdir else None}
    options = {k: v for k, v in wanted.items() if v is not None}
    bring = modelscope.snapshot_download
    folder = Path(patiently(lambda: bring(repo_id=name, repo_type=kind, local_files_only=hub.no_network, ignore_patterns=ignored, **options), name, hub))
    return Repository(kind, name, None, _local_files(folder), folder)
