"""Secrets: recognised in YAML, kept out of every log, manifest, report and card."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

_SECRET_KEY = re.compile(r"(^|[_.-])(api[_-]?key|secret([_-]?key)?|password|passwd|access[_-]?key|token|credentials?)$", re.I)
_PLAIN_TOKEN_KEY = re.compile(r"^(pad|eos|bos|unk|mask|sep|cls|image|additional_special|added|special|stop)_token$", re.I)
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bms-[0-9a-f]{8}-[0-9a-f-]{20,}|\bxox[abp]-[A-Za-z0-9-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----",
    re.A,  # a credential may follow a Chinese character at once, which \b would take for a letter
)
_ASSIGNED = re.compile(
    r"((?:api[_-]?key|secret(?:[_-]?key)?|password|passwd|access[_-]?key|(?:hf|auth|access)[_-]?token)[\"']?\s*[=:：]\s*[\"']?)([^\s\"',;&]{6,})", re.I
)
_SECRET_ENV = re.compile(r"(API_?KEY|TOKEN|SECRET|PASSWORD|PASSWD|ACCESS_KEY|CREDENTIALS?)$")
_ENVIRONMENT_FOR = (("wandb", "WANDB_API_KEY"), ("swanlab", "SWANLAB_API_KEY"), ("modelscope", "MODELSCOPE_API_TOKEN"))

MASK = "***"


def looks_secret(key: str, value: object) -> bool:
    """True if a YAML scalar under `key` (dotted) is a credential that must not live in a file."""
    if not isinstance(value, str) or not value.strip():
        return False
    if _SECRET_VALUE.search(value):
        return True
    leaf = key.rsplit(".", 1)[-1]
    return bool(_SECRET_KEY.search(leaf)) and not _PLAIN_TOKEN_KEY.match(leaf) and len(value) >= 6


def environment_variable_for(key: str, value: str) -> str:
    """The environment variable that should carry the credential instead of YAML."""
    text = f"{key} {value[:3]}".lower()
    return next((variable for word, variable in _ENVIRONMENT_FOR if word in text), "HF_TOKEN" if "hf" in text or "token" in text else "an environment variable")


def _environment_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if _SECRET_ENV.search(name) and len(value) >= 8:
            yield value


def redact(text: str) -> str:
    """Replace every credential in `text`: known shapes, `key=value` pairs, and the values of secret environment variables."""
    for value in _environment_secrets():
        text = text.replace(value, MASK)
    return _ASSIGNED.sub(lambda m: m[1] + MASK, _SECRET_VALUE.sub(MASK, text))


def redact_tree(value: Any, key: str = "") -> Any:
    """`redact` for nested dicts and lists; values under secret-looking keys are masked whole."""
    if isinstance(value, dict):
        return {k: redact_tree(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_tree(v, key) for v in value]
    if isinstance(value, str):
        return MASK if looks_secret(key, value) else redact(value)
    return value
