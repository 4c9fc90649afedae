"""Tokenised data that runs share: the same data, tokenizer, template and limits are tokenised once, whatever else a run changes.

A set is a folder named by the hash of everything that decides it. It is written beside its place and renamed, so a kill leaves no half of one; two runs that want
the same set take turns; every byte of it is checked before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifact
from ..config import project_root
from ..console import note, warn
from ..errors import LOCKED, SopError
from . import checkpoint, ranks

if TYPE_CHECKING:
    from .settings import TrainConfig

VARIABLE = "SOP_TOKEN_CACHE"
_LIBRARIES = ("tokenizers", "transformers", "jinja2")


@dataclass(frozen=True)
class Cache:
    """Sets below `root`; those used longest ago go once all together exceed `gib` GiB."""

    root: Path
    gib: float = 20.0

    def folder(self, key: Mapping[str, Any], write: Callable[[Path], object]) -> tuple[Path, bool]:
        """(Where the set of `key` lies, whether it was there); `write` fills an empty folder where it was not. Collective: rank 0 writes, the others wait for it."""
        found = ranks.share(self._here(key, write) if ranks.is_main() else None)
        assert found is not None
        return found

    def _here(self, key: Mapping[str, Any], write: Callable[[Path], object]) -> tuple[Path, bool]:
        place = self.root / artifact.sha256_json(key)[:32]
        with _turn(self._lock(place)):
            if place.is_dir() and not (wrong := checkpoint.problems(place)):
                os.utime(place / checkpoint.MARKER)  # when it was used last
                return place, True
            if place.is_dir():
                warn(f"the tokenised data in {place} is damaged ({'; '.join(wrong[:3])}); it is made anew")
                shutil.rmtree(place)
            part = self._part(place)
            shutil.rmtree(part, ignore_errors=True)  # of a killed run
            part.mkdir()
            try:
                write(part)
                checkpoint.mark_complete(part, key=dict(key))
                part.rename(place)
                artifact.sync_folder(self.root)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        self._bound(place)
        return place, False

    def _lock(self, place: Path) -> artifact.Target:
        return artifact.Target(self.root, place.name)

    def _part(self, place: Path) -> Path:
        return self._lock(place).hidden("part")

    def _bound(self, newest: Path) -> None:
        """Remove what killed runs left half written, and the sets used longest ago beyond the limit; what another run is busy with stays."""
        for part in self.root.glob(".*.part"):
            self._remove(part, part.name.split(".")[1])
        used = [p for p in self.root.iterdir() if not p.name.startswith(".") and (p / checkpoint.MARKER).is_file()]
        used.sort(key=lambda p: (p / checkpoint.MARKER).stat().st_mtime)
        sizes = {p: sum(f.stat().st_size for f in p.iterdir()) for p in used}
        while sum(sizes.values()) > self.gib * (1 << 30) and (oldest := next((p for p in sizes if p != newest), None)):
            self._remove(oldest, oldest.name)
            del sizes[oldest]

    def _remove(self, folder: Path, name: str) -> None:
        with contextlib.suppress(SopError), artifact.lock(artifact.Target(self.root, name)):
            shutil.rmtree(folder, ignore_errors=True)


def of(config: TrainConfig) -> Cache:
    """The cache of a run: `token_cache`, else the folder that the environment names, else `.cache/tokens` of the project."""
    return Cache(config.token_cache or Path(os.environ.get(VARIABLE) or project_root() / ".cache" / "tokens"), config.token_cache_gib)


@contextlib.contextmanager
def _turn(target: artifact.Target) -> Iterator[None]:
    """The lock of a set; where another run holds it, wait (the kernel frees it when that run ends or dies)."""
    said = False
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(artifact.lock(target))
            except SopError as error:
                if error.code != LOCKED:
                    raise
                if not said:
                    note(f"{error.what.replace('writing here', 'tokenising the same data')}; waiting for it")
                said = True
            else:
                yield
                return
        time.sleep(0.2)


# --- what decides a set -----------------------------------------------------------------------------------------------------------------------


def key(files: Sequence[Path], tokenizer: Any, **settings: Any) -> dict[str, Any]:
    """Everything that decides what becomes of `files`: names and contents, the tokenizer, `settings`, this code and the libraries' versions."""
    return {
        "files": [[path.name, artifact.hash_input(path)["sha256"]] for path in files], "tokenizer": tokenizer_hash(tokenizer), "settings": settings, "code": _code(),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }  # fmt: skip


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over all that decides the ids of a text: vocabulary, merges, added tokens, normaliser and their kin, and the special tokens that templates write."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("padding", "truncation"):  # set by the last call, and by none of ours
        state.pop(passing, None)
    return artifact.sha256_json({"backend": state, "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()}})


def _code() -> str:
    """sha256 over the code that reads, renders and encodes: a set made by another version is another set."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(here.glob("*.py")), *sorted((here.parent / "data").glob("*.py"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
