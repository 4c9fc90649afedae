"""Where models and datasets come from: settings, what the errors of a hub mean, and models as local folders. Files of a repository: repository.py."""

from __future__ import annotations

import errno
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, TypeVar

from . import console
from .config import option
from .errors import DATA, NETWORK, USAGE, SopError

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
    trust_remote_code: bool = option(False, "stays false: no command runs code out of a repository")

    def __post_init__(self) -> None:
        if self.trust_remote_code:
            raise ValueError("trust_remote_code: no command runs code out of a repository; leave it out, and take a model of a type that transformers knows")

    @property
    def no_network(self) -> bool:
        """True where the settings or the environment forbid it."""
        return self.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")

    @property
    def cache(self) -> str | None:
        """The client's cache of repositories below `cache_dir`."""
        return str(self.cache_dir / "hub") if self.cache_dir else None


def configure(config: Any) -> None:
    """Set the endpoint and the offline switch; must run before any hub library is imported."""
    hub = config if isinstance(config, HubConfig) else getattr(config, "huggingface", None)
    if hub is None:
        return
    endpoint = "HF_ENDPOINT" if hub.source == "hf" else "MODELSCOPE_ENDPOINT"
    wanted = {endpoint: hub.endpoint, "HF_HUB_OFFLINE": "1" if hub.offline else None, "HF_HOME": str(hub.cache_dir) if hub.cache_dir else None}
    for name, value in wanted.items():
        if value and os.environ.get(name) != value:
            if "huggingface_hub" in sys.modules and name.startswith("HF_"):
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


def _asked_to_wait(error: BaseException) -> float:
    """Seconds that the server asked for (Retry-After), at most two minutes."""
    values = [getattr(getattr(e, "response", None), "headers", {}).get("Retry-After", "") for e in _chain(error)]
    return min(max((float(v) for v in values if v.isdigit()), default=0.0), 120.0)


def _kinds(error: BaseException) -> set[str]:
    return {cls.__name__ for e in _chain(error) for cls in type(e).__mro__}


def is_network(error: BaseException) -> bool:
    """True for errors of the hub client and its HTTP library; False for those of the disk and of our own code."""
    if isinstance(error, OSError):
        return error.errno not in _LOCAL_ERRNOS
    return any(cls.__module__.startswith(("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "modelscope")) for cls in type(error).__mro__)


def _is_transient(error: BaseException) -> bool:
    status = _status(error)
    return status in _TRANSIENT if status is not None else not {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "HFValidationError"} & _kinds(error)


def explain(error: BaseException, name: str, hub: HubConfig) -> SopError:
    """Translate an error of the client: 401, gated, 403, 404, 429, 5xx, offline and no connection are told apart."""
    status, kinds = _status(error), _kinds(error)
    modelscope = hub.source == "modelscope"
    where = hub.endpoint or os.environ.get("MODELSCOPE_ENDPOINT" if modelscope else "HF_ENDPOINT") or ("ModelScope" if modelscope else "the hub")
    token = "MODELSCOPE_API_TOKEN" if modelscope else "HF_TOKEN"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    cases: tuple[tuple[bool, str, str, int], ...] = (
        ("GatedRepoError" in kinds, f"gated ({status}): its terms must be accepted first", f"accept them on the repository's page, then set {token}", NETWORK),
        ("RevisionNotFoundError" in kinds, f"no such revision: {hub.revision or 'main'}", "check --revision (branch, tag or commit)", USAGE),
        (status == 401, "401: it does not exist, or it is private and no valid token is set", f"check the spelling; for a private repository set {token}", NETWORK),
        (status == 403, "403: this token may not read it", f"give the token in {token} read access to this repository", NETWORK),
        (status == 404, f"404: no such repository or file at {where}", "check the spelling (owner/name); a local path must exist", USAGE),
        (status == 429, f"429: {where} limits the rate of requests", f"wait a few minutes, set {token} for a higher limit, or {_MIRROR}", NETWORK),
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
            if isinstance(error, SopError) or not is_network(error):
                raise
            if not _is_transient(error) or attempt == MAX_RETRIES or time.monotonic() - start > PATIENCE:
                raise explain(error, name, hub) from error
            pause = max(random.uniform(0.5, 1.0) * wait, _asked_to_wait(error))
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

    Pickled weights (`.bin`, `.pt`) are never downloaded; neither are Python files.

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
    from .repository import download, listing

    repository = listing("model", str(name), hub)
    if weights:
        refuse_pickled([f.path for f in repository.files], str(name))
    patterns = [*_MODEL_FILES, *(["*.safetensors"] if weights else [])]
    wanted = [f for f in repository.files if "/" not in f.path and not f.path.startswith("consolidated") and any(fnmatch(f.path, p) for p in patterns)]
    if not wanted:
        raise SopError("no model files here", where=str(name), fix="check the name; a dataset is fetched with sop data fetch", code=DATA)
    paths = [download(repository, f, hub) for f in wanted]
    return paths[0].parent


def refuse_pickled(names: list[str], where: str) -> None:
    """Refuse a model whose weights exist only in a format that can run code when it is loaded."""
    top = [n for n in names if "/" not in n]
    pickled = sorted(n for n in top if n.endswith(_PICKLED) and n != "training_args.bin")
    if pickled and not any(n.endswith(".safetensors") for n in top):
        fix = "convert to safetensors on a machine you trust (load with torch, then model.save_pretrained(folder)), or choose a revision that has *.safetensors"
        raise SopError(f"its weights are pickled ({', '.join(pickled[:3])}), which can run code when loaded; refused", where=where, fix=fix, code=DATA)
