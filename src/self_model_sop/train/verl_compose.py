"""Run by verl's own Python, never imported: composes verl's configuration from its own files, lays a recipe over it, and checks the result.

Reads {"tree": nested keys, "validate": bool} as JSON from stdin; writes {"version", "yaml", "problems": [[key, what]], "validated": "yes" or why not} to stdout.
It imports hydra and omegaconf; verl itself (and with it torch and ray) only to validate.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

PLAIN = (bool, int, float, str)


def flat(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(key as a tuple, value) of every leaf; a list is a leaf."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def misfit(value: Any, default: Any) -> str:
    """What is wrong with a value's type, judged by the value that verl's files give the key; "" where it fits, or verl's own is null."""
    if default is None or value is None or not isinstance(default, PLAIN) or (isinstance(value, list) and isinstance(default, str)):
        return ""  # several files, or several names of layers, where verl's default is one
    if isinstance(default, bool) != isinstance(value, bool):
        return f"expected {'true or false' if isinstance(default, bool) else type(default).__name__}, got {value!r}"
    if isinstance(default, (int, float)) and not isinstance(value, (int, float)):
        return f"expected a number, got {value!r}"
    if isinstance(default, int) and isinstance(value, float) and not value.is_integer():
        return f"expected a whole number, got {value!r}"
    if isinstance(default, str) and not isinstance(value, str) and not _number(default):
        return f"expected a text, got {value!r}"
    return ""


def _number(text: str) -> bool:
    """verl's YAML writes 1e-6, which YAML 1.1 reads as text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def compose(tree: Mapping[str, Any]) -> tuple[Any, list[list[str]]]:
    """(the composed configuration with the recipe in it, problems)."""
    hydra, OmegaConf = import_module("hydra"), import_module("omegaconf").OmegaConf
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("verl")
    folder = Path(spec.origin).parent / "trainer" / "config"
    with hydra.initialize_config_dir(config_dir=str(folder), version_base=None):
        config = hydra.compose(config_name="ppo_trainer")
    problems: list[list[str]] = []
    for key, value in flat(tree):
        dotted, node = ".".join(key), config
        for i, part in enumerate(key):
            if OmegaConf.is_dict(node) and not node.keys() and i:  # a free map, such as override_config
                OmegaConf.update(config, dotted, value, force_add=True)
                break
            if not OmegaConf.is_dict(node) or part not in node.keys():  # noqa: SIM118 - `in node` is false for a value that is still missing
                near = difflib.get_close_matches(part, [str(k) for k in node] if OmegaConf.is_dict(node) else [], 1)
                problems.append([dotted, f"verl has no key {'.'.join(key[: i + 1])}" + (f"; did you mean {near[0]!r}?" if near else "")])
                break
            last = i == len(key) - 1
            if last:
                default = None if OmegaConf.is_missing(node, part) else node[part]
                wrong = misfit(value, float(default) if isinstance(default, str) and _number(default) else default)
                if wrong:
                    problems.append([dotted, wrong])
                    break
                OmegaConf.update(config, dotted, value, merge=False)
            else:
                node = node[part]
    if not problems:
        problems = [[str(key), "verl asks for a value"] for key in sorted(OmegaConf.missing_keys(config)) if not key.startswith("reward.reward_model")]
    if not problems:
        try:
            OmegaConf.to_container(config, resolve=True)
        except Exception as error:
            problems.append(["", f"does not resolve: {error}"])
    return config, problems


def validate(config: Any) -> tuple[str, str]:
    """("yes", "") where verl's own check passed; (why it did not run, "") or ("no", what it says)."""
    try:
        needs, check = import_module("verl.trainer.ppo.utils"), import_module("verl.utils.config").validate_config
    except Exception as error:
        return f"not run: {type(error).__name__}: {error}", ""
    told = "yes"
    if config.actor_rollout_ref.model.lora_rank and importlib.util.find_spec("vllm") is None:
        config = import_module("copy").deepcopy(config)
        config.actor_rollout_ref.model.lora_rank = 0
        told = "yes, but for the rank of LoRA, for which it asks vLLM, which is not installed"
    try:
        check(config=config, use_reference_policy=needs.need_reference_policy(config), use_critic=needs.need_critic(config))
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, (ImportError, OSError)):  # a package that is not there, or a hub that does not answer: nothing is said about the configuration
            return f"not run: {type(cause).__name__}: {str(cause).splitlines()[0]}", ""
        return "no", f"{type(error).__name__}: {error}"
    return told, ""


def main() -> None:
    """JSON in, JSON out; whatever verl prints goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr
    asked = json.load(sys.stdin)
    config, problems = compose(asked["tree"])
    validated = "not asked"
    if not problems and asked["validate"]:
        validated, what = validate(config)
        problems += [["", what]] if what else []
    json.dump({"version": version("verl"), "yaml": import_module("omegaconf").OmegaConf.to_yaml(config), "problems": problems, "validated": validated}, out)


if __name__ == "__main__":
    main()
