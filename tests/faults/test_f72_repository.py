"""F72: no key of a service in the repository, in no commit of it. The tests' own made-up secrets are left out, and proven to be found."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEYS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b|\bglpat-[\w-]{20,}|\bms-[0-9a-f]{8}-[0-9a-f-]{27}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|\bxox[abpr]-[\w-]{10,}|(?i:wandb|swanlab)_?(?i:api)?_?(?i:key)\W{1,4}[0-9A-Za-z]{20,}"
)


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        pytest.skip("no git history here")
    return done.stdout


def added(log: str) -> list[str]:
    """The lines that commits added."""
    return [line for line in log.split("\n") if line.startswith("+") and not line.startswith("+++")]


def test_no_commit_holds_a_key() -> None:
    lines = added(git("log", "-p", "--all", "--no-color", "--unified=0", "--", ".", ":!tests"))
    assert lines and not [line[:40] for line in lines if KEYS.search(line)]


@pytest.mark.parametrize("key", ["hf_" + "a1" * 17, "sk-" + "b2" * 12, "ghp_" + "c3" * 18, "AKIA" + "A1" * 8, "WANDB_API_KEY=" + "d4" * 20, "-----BEGIN RSA PRIVATE KEY-----"])
def test_a_key_would_be_found(key: str) -> None:
    assert KEYS.search(f"+token: {key}")
