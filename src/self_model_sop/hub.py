"""The only file that talks to Hugging Face, a mirror, or ModelScope."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from . import console
from .config import option
from .errors import DATA, NETWORK, USAGE, SopError, missing_extra

T = TypeVar("T")
MAX_RETRIES = 5
PATIENCE = 60.0  # seconds after which no further retry begins; the client has retries of its own below ours
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_LOCAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
_MIRROR = "try again later, set another huggingface.endpoint (for example https://hf-mirror.com) in config/model_config/config.yaml, or use --local_files_only"
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")
_MODEL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """`huggingface:` of config/model_config/config.yaml."""

    endpoint: str | None = option(None, "hub or mirror, for example https://hf-mirror.com; none: the client's default", cosmetic=True)
    source: Literal["hf", "modelscope"] = option("hf", "which hub names resolve at")
    offline: bool = option(False, "use the local cache only; no network", flag="--local_files_only", cosmetic=True)
    cache_dir: Path | None = option(None, "cache folder; none: the client's default", path="output")
    revision: str | None = option(None, "branch, tag or commit to fetch; none: main, and the commit is written to the manifest", flag="--revision")
    trust_remote_code: bool = option(False, "allow code from the repository; needs a pinned commit as revision")

    def __post_init__(self) -> None:
        if self.trust_remote_code and not (self.revision and len(self.revision) == 40):
            raise ValueError("trust_remote_code needs `revision` pinned to a 40-digit commit")

    @property
    def cache(self) -> str | None:
        """The client's cache of repositories below `cache_dir`."""
        return str(self.cache_dir / "hub") if self.cache_dir else None


def configure(config: Any) -> None:
    """Set the endpoint and the offline switch; must run before any hub library is imported."""
    hub = config if isinstance(config, HubConfig) else getattr(config, "huggingface", None)
    if hub is None:
        return
    wanted = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "1" if hub.offline else None, "HF_HOME": str(hub.cache_dir) if hub.cache_dir else None}
    for name, value in wanted.items():
        if value and os.environ.get(name) != value:
            if "huggingface_hub" in sys.modules:
                raise RuntimeError(f"{name} must be set before huggingface_hub is imported")
            os.environ[name] = value


# --- errors and patience --------------------------------------------------------------------------------------------------------------------


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of the client, which often wraps it in another one."""
    return next((code for e in _chain(error) if isinstance(code := getattr(getattr(e, "response", None), "status_code", None), int)), None)


def _kinds(error: BaseException) -> set[str]:
    return {cls.__name__ for e in _chain(error) for cls in type(e).__mro__}


def _is_network(error: BaseException) -> bool:
    """True for errors of the hub client and its HTTP library; False for those of the disk and of our own code."""
    if isinstance(error, OSError):
        return error.errno not in _LOCAL_ERRNOS
    return any(cls.__module__.startswith(("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "modelscope")) for cls in type(error).__mro__)


def _is_transient(error: BaseException) -> bool:
    status = _status(error)
    return status in _TRANSIENT if status is not None else not {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "HFValidationError"} & _kinds(error)


def explain(error: BaseException, name: str, hub: HubConfig) -> SopError:
    """Translate an error of the client: 401, gated, 403, 404, 429, 5xx, offline and no connection are told apart."""
    status, kinds, where = _status(error), _kinds(error), hub.endpoint or os.environ.get("HF_ENDPOINT") or "the hub"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    cases: tuple[tuple[bool, str, str, int], ...] = (
        ("GatedRepoError" in kinds, f"gated ({status}): its terms must be accepted first", "accept them on the repository's page, then set HF_TOKEN", NETWORK),
        ("RevisionNotFoundError" in kinds, f"no such revision: {hub.revision or 'main'}", "check --revision (branch, tag or commit)", USAGE),
        (status == 401, "401: it does not exist, or it is private and no valid token is set", "check the spelling; for a private repository set HF_TOKEN", NETWORK),
        (status == 403, "403: this token may not read it", "give the token in HF_TOKEN read access to this repository", NETWORK),
        (status == 404, f"404: no such repository or file at {where}", "check the spelling (owner/name); a local path must exist", USAGE),
        (status == 429, f"429: {where} limits the rate of requests", f"wait a few minutes, set HF_TOKEN for a higher limit, or {_MIRROR}", NETWORK),
        (status is not None and status >= 500, f"{status}: {where} has trouble; gave up after {MAX_RETRIES} retries", _MIRROR, NETWORK),
        ("HFValidationError" in kinds, f"not a repository name: {reason}", "use owner/name, or a local path that exists", USAGE),
        (_is_offline(kinds), "not in the local cache, and the network is switched off", "run once without --local_files_only (huggingface.offline: false)", NETWORK),
    )
    for holds, what, fix, code in cases:
        if holds:
            return SopError(what, where=name, fix=fix, code=code)
    return SopError(f"cannot be fetched from {where}: {reason}", where=name, fix=_MIRROR, code=NETWORK)


def _is_offline(kinds: set[str]) -> bool:
    """The client refused to use the network, as opposed to having failed to."""
    if "OfflineModeIsEnabled" in kinds:  # which is a ConnectionError itself
        return True
    return "LocalEntryNotFoundError" in kinds and not {"ConnectError", "ConnectionError", "TimeoutException", "HfHubHTTPError"} & kinds


def patiently(work: Callable[[], T], name: str, hub: HubConfig) -> T:
    """Do `work`, retrying what may pass (time-outs, resets, 408, 429, 5xx) at most five times with exponential back-off and jitter.

    Raises:
        SopError: what `explain` makes of the last error.
    """
    start, wait = time.monotonic(), 1.0
    for attempt in range(MAX_RETRIES + 1):
        try:
            return work()
        except Exception as error:
            if isinstance(error, SopError) or not _is_network(error):
                raise
            if not _is_transient(error) or attempt == MAX_RETRIES or time.monotonic() - start > PATIENCE:
                raise explain(error, name, hub) from error
            pause = random.uniform(0.5, 1.0) * wait
            console.note(f"{name}: {(str(error).strip() or type(error).__name__).splitlines()[0]}; retry {attempt + 1} of {MAX_RETRIES} in {pause:.1f} s")
            time.sleep(pause)
            wait = min(wait * 2, 16.0)
    raise AssertionError("unreachable")


# --- models -----------------------------------------------------------------------------------------------------------------------------------


def commit_of(folder: Path) -> str | None:
    """The commit of a folder inside the client's cache (`.../snapshots/<commit>`), else None."""
    return folder.name if folder.parent.name == "snapshots" and len(folder.name) == 40 else None


def resolve_model(name: str | Path, hub: HubConfig, *, weights: bool = True) -> Path:
    """The local folder of a model: the folder itself, or a snapshot of its configuration, tokenizer and safetensors files, pinned to one commit.

    Pickled weights (`.bin`, `.pt`) are never downloaded; Python files only with `trust_remote_code`.

    Args:
        name: local folder or hub id.
        hub: where and which revision.
        weights: False leaves the weights out (for a tokenizer alone).

    Raises:
        SopError: where nothing is found, where only pickled weights are there, or where the network fails.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise SopError("this is a file; a model is a folder with config.json and *.safetensors", where=str(name))
    return _modelscope_model(str(name), hub, weights) if hub.source == "modelscope" else _hf_model(str(name), hub, weights)


def _patterns(hub: HubConfig, weights: bool) -> list[str]:
    return [*_MODEL_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if hub.trust_remote_code else [])]


def _hf_model(name: str, hub: HubConfig, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    options: dict[str, Any] = {"cache_dir": hub.cache, "allow_patterns": _patterns(hub, weights), "ignore_patterns": ["*/*", "consolidated*"]}
    if hub.offline:
        return Path(patiently(lambda: snapshot_download(name, revision=hub.revision, local_files_only=True, **options), name, hub))
    api = HfApi(endpoint=hub.endpoint)
    info = patiently(lambda: api.model_info(name, revision=hub.revision), name, hub)
    if weights:
        refuse_pickled([s.rfilename for s in info.siblings or []], name)
    return Path(patiently(lambda: snapshot_download(name, revision=info.sha, endpoint=hub.endpoint, **options), name, hub))


def _modelscope_model(name: str, hub: HubConfig, weights: bool) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise missing_extra("modelscope", "modelscope") from None
    options = {"revision": hub.revision, "cache_dir": hub.cache, "allow_patterns": _patterns(hub, weights), "local_files_only": hub.offline}
    return Path(patiently(lambda: snapshot_download(name, **{k: v for k, v in options.items() if v is not None}), name, hub))


def refuse_pickled(names: list[str], where: str) -> None:
    """Refuse a model whose weights exist only in a format that can run code when it is loaded."""
    top = [n for n in names if "/" not in n]
    pickled = sorted(n for n in top if n.endswith(_PICKLED) and n != "training_args.bin")
    if pickled and not any(n.endswith(".safetensors") for n in top):
        fix = "convert to safetensors on a machine you trust (load with torch, then model.save_pretrained(folder)), or choose a revision that has *.safetensors"
        raise SopError(f"its weights are pickled ({', '.join(pickled[:3])}), which can run code when loaded; refused", where=where, fix=fix, code=DATA)


# --- datasets ---------------------------------------------------------------------------------------------------------------------------------

_BLOCK = 1 << 20
_TIMEOUT = 30.0


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `digest` is what the hub says its contents are: sha256 for large files, the git blob id for the others."""

    path: str
    size: int
    digest: str | None = None


@dataclass(frozen=True)
class Repository:
    """A dataset at one commit. `folder` is set where its files are already local (ModelScope, or a cache that holds no listing)."""

    name: str
    commit: str | None
    files: tuple[RemoteFile, ...]
    folder: Path | None = None


def dataset(name: str, hub: HubConfig, subdir: str | None = None) -> Repository:
    """List a dataset's files at the commit that `hub.revision` means now; offline, out of the cache.

    Raises:
        SopError: where it does not exist, may not be read, or cannot be reached.
    """
    if hub.source == "modelscope":
        return _modelscope_dataset(name, hub, subdir)
    if hub.offline or _is_true(os.environ.get("HF_HUB_OFFLINE")):
        return _cached_dataset(name, hub)
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=hub.endpoint)
    info = patiently(lambda: api.dataset_info(name, revision=hub.revision), name, hub)
    tree = patiently(lambda: list(api.list_repo_tree(name, recursive=True, revision=info.sha, repo_type="dataset")), name, hub)
    files = tuple(RemoteFile(f.path, f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in tree if isinstance(f, RepoFile))
    _remember(name, hub, info.sha, files)
    return Repository(name, info.sha, files)


def head_commit(name: str, hub: HubConfig) -> str | None:
    """The commit that the revision means upstream now; None where that cannot be told within seconds."""
    if hub.source != "hf" or hub.offline or _is_true(os.environ.get("HF_HUB_OFFLINE")):
        return None
    from huggingface_hub import HfApi

    try:
        sha = HfApi(endpoint=hub.endpoint).dataset_info(name, revision=hub.revision, timeout=3).sha
    except Exception as error:
        if _is_network(error):
            return None
        raise
    return str(sha) if sha else None


def open_remote(repository: Repository, file: RemoteFile, hub: HubConfig) -> io.RawIOBase:
    """The file as a seekable stream that fetches only the blocks that are read; out of the cache where it is there."""
    if repository.folder:
        return (repository.folder / file.path).open("rb", buffering=0)
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repository.name, file.path, cache_dir=hub.cache, revision=repository.commit, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached).open("rb", buffering=0)
    url = hf_hub_url(repository.name, file.path, repo_type="dataset", revision=repository.commit, endpoint=hub.endpoint)
    return _Ranges(url, file.size, f"{repository.name}/{file.path}", hub)


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
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {"repo_type": "dataset", "revision": repository.commit, "cache_dir": hub.cache, "local_files_only": hub.offline}
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


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")


def _cache_of(name: str, hub: HubConfig) -> Path:
    from huggingface_hub import constants

    return Path(hub.cache or constants.HF_HUB_CACHE) / "--".join(["datasets", *name.split("/")])


def _remember(name: str, hub: HubConfig, commit: str, files: tuple[RemoteFile, ...]) -> None:
    """Keep the listing beside the cached files, so that an offline run knows what is missing."""
    folder = _cache_of(name, hub) / "listings"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{commit}.json").write_text(json.dumps([[f.path, f.size, f.digest] for f in files]), encoding="utf-8")
        (folder / _ref(hub)).write_text(commit, encoding="utf-8")
    except OSError as error:
        console.warn(f"the listing of {name} cannot be kept for offline use: {error.strerror}")


def _ref(hub: HubConfig) -> str:
    return (hub.revision or "main").replace("/", "--") + ".ref"


def _cached_dataset(name: str, hub: HubConfig) -> Repository:
    root, revision = _cache_of(name, hub), hub.revision or "main"
    ref = next((p for p in (root / "listings" / _ref(hub), root / "refs" / revision) if p.is_file()), None)
    commit = ref.read_text(encoding="utf-8").strip() if ref else revision
    listing, snapshot = root / "listings" / f"{commit}.json", root / "snapshots" / commit
    if listing.is_file():
        return Repository(name, commit, tuple(RemoteFile(*entry) for entry in json.loads(listing.read_text(encoding="utf-8"))))
    if snapshot.is_dir():
        return Repository(name, commit, _local_files(snapshot), snapshot)
    fix = "run once without --local_files_only (huggingface.offline: false), or give a local file or folder"
    raise SopError("not in the local cache, and the network is switched off", where=name, fix=fix, code=NETWORK)


def _local_files(folder: Path) -> tuple[RemoteFile, ...]:
    return tuple(RemoteFile(p.relative_to(folder).as_posix(), p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file())


def _modelscope_dataset(name: str, hub: HubConfig, subdir: str | None) -> Repository:
    try:
        from modelscope import dataset_snapshot_download
    except ImportError:
        raise missing_extra("modelscope", "modelscope") from None
    options = {"revision": hub.revision, "cache_dir": hub.cache, "local_files_only": hub.offline, "allow_patterns": [f"{subdir}/*"] if subdir else None}
    folder = Path(patiently(lambda: dataset_snapshot_download(name, **{k: v for k, v in options.items() if v is not None}), name, hub))
    return Repository(name, None, _local_files(folder), folder)
