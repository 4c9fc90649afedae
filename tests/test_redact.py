"""Secrets are recognised, and ordinary text is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from self_model_sop.redact import MASK, environment_variable_for, looks_secret, redact, redact_tree

HF = "hf_" + "Ab1" * 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("api_key", "abcdef123456"), ("wandb.api_key", "0" * 40), ("hf_token", "whatever"), ("a.password", "hunter22"), ("secret_key", "x" * 12), ("anything", HF),
        ("name", "sk-" + "a" * 24), ("x", "ghp_" + "a" * 30), ("x", "AKIA" + "A" * 16), ("x", "-----BEGIN RSA PRIVATE KEY-----"), ("huggingface.token", "abcdefgh"),
        ("list.0", "text with " + HF + " inside"), ("API-KEY", "abcdef123"), ("x", "令牌" + HF + "已过期"),
    ],
)  # fmt: skip
def test_secrets(key: str, value: str) -> None:
    assert looks_secret(key, value)
    assert redact_tree({key: value}) != {key: value}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pad_token", "<|endoftext|>"), ("selection.new_tokens", "1500"), ("base_tokenizer", "bert-base-chinese"), ("model", "sk-learn"), ("tokens", "abcdefgh"),
        ("api_key", ""), ("token", None), ("max_tokens", 5), ("api_key", None), ("revision", "0123456789abcdef0123456789abcdef01234567"), ("file", "hf_cache/models"),
    ],
)  # fmt: skip
def test_no_secrets(key: str, value: object) -> None:
    assert not looks_secret(key, value)
    assert redact_tree({key: value}) == {key: value}


def test_an_assignment_with_a_full_width_colon_is_masked() -> None:
    assert redact("password：hunter22") == "password：" + MASK


def test_the_environment_s_secrets_are_masked_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-value-without-a-shape")
    assert redact("login with a-value-without-a-shape failed") == f"login with {MASK} failed"
    assert redact_tree({"deep": [{"text": "a-value-without-a-shape"}], "n": 3}) == {"deep": [{"text": MASK}], "n": 3}


@pytest.mark.parametrize(
    "text", ["api_key=abcdef123", "api_key: abcdef123", '"password": "abcdef123"', "HF_TOKEN=abcdef123", "access_token='abcdef123'", "?auth_token=abcdef123&x=1"]
)
def test_assignments_are_masked(text: str) -> None:
    assert "abcdef123" not in redact(text) and MASK in redact(text)


@pytest.mark.parametrize("text", ["tokens per character 1.83", "the token <|im_end|> ends", "password reset", "--new_tokens 1500", "3.1 tokens: 12"])
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("key", "value", "variable"),
    [("wandb.api_key", "x", "WANDB_API_KEY"), ("swanlab.api_key", "x", "SWANLAB_API_KEY"), ("x", HF, "HF_TOKEN"), ("modelscope.token", "x", "MODELSCOPE_API_TOKEN")],
)
def test_the_variable_to_use(key: str, value: str, variable: str) -> None:
    assert environment_variable_for(key, value) == variable


@given(st.text())
def test_redact_is_idempotent(text: str) -> None:
    assert redact(redact(text)) == redact(text)
