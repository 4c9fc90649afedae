"""The only file that talks to Hugging Face, a mirror, or ModelScope."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config import option


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
