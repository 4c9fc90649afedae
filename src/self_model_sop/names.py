"""Names that come from outside (hub ids, splits, files of a repository) made safe as file names; none can lead out of its folder."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path, PurePosixPath

from .errors import SopError

MAX_BYTES = 150
_FORBIDDEN = set('/\\:*?"<>|')
_RESERVED = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.I)  # device names on Windows, also with a suffix


def safe_name(text: str) -> str:
    """One file name for any text: separators, control and invisible characters become `_`; long names end in a hash.

    Letters of every script, spaces and punctuation stay, so that ordinary names are unchanged.
    """
    name = "".join("_" if _unsafe(c) else c for c in text).strip()
    name = re.sub(r"^[.\-~]+", "_", name)
    name = re.sub(r"[. ]+$", "_", name)
    if not name or _RESERVED.match(name):
        name = f"_{name}"
    if len(name.encode()) > MAX_BYTES:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        name = name.encode()[: MAX_BYTES - 13].decode(errors="ignore") + "-" + digest
    return name


def _unsafe(char: str) -> bool:
    """Also what only looks like a separator after normalisation (fullwidth solidus), and what is invisible (U+202E, U+200B)."""
    return not char.isprintable() or any(c in _FORBIDDEN for c in unicodedata.normalize("NFKC", char)) or (char != "." and unicodedata.normalize("NFKC", char).strip(".") == "")


def safe_relative(text: str, key: str) -> PurePosixPath:
    """A folder inside a repository (`a/b`), refused where it is absolute, leads upwards, or is not made of safe names.

    Raises:
        SopError: with the key it came from.
    """
    parts = [p for p in text.split("/") if p]
    if text.startswith(("/", "~")) or not parts or any(p in (".", "..") or safe_name(p) != p for p in parts):
        raise SopError(f"{text!r} is no folder inside the dataset", where=key, fix="use a plain relative folder, for example pretrain")
    return PurePosixPath(*parts)


def inside(root: Path, path: Path) -> Path:
    """`path`, once it is certain that it lies below `root` (symbolic links followed)."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise SopError("this would be written outside of the output folder; refused", where=str(path), fix="choose another name or output folder")
    return path
