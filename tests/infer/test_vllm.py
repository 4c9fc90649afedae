"""What `sop infer vllm` finds out before anything is started, the command that it prints, and the files for containers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from self_model_sop.errors import DATA, ENVIRONMENT, OK, USAGE, SopError
from self_model_sop.infer import vllm
from tiny_gguf import KEY
from tiny_models import tiny_qwen

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker" / "docker-compose.yml"
QWEN3 = ROOT / "self_model" / "template" / "qwen3_chatml.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("vllm") / "tiny")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters as PEFT saves them: `plain` (rank 4), `rows` (trained rows of new tokens), `dora`."""
    from peft import LoraConfig, get_peft_model

    from self_model_sop.train.model import load_model

    folder = tmp_path_factory.mktemp("adapters")
    more: dict[str, dict[str, Any]] = {"plain": {}, "rows": {"trainable_token_indices": {"embed_tokens": [5, 6]}}, "dora": {"use_dora": True}}
    for name, settings in more.items():
        base = load_model(model)
        base.name_or_path = str(model)
        get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)).save_pretrained(folder / name)
    return folder


def copy(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a folder with keys of config.json (or adapter_config.json) changed."""
    shutil.copytree(folder, to)
    path = to / ("adapter_config.json" if (to / "adapter_config.json").is_file() else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return to


def words(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return shlex.split(capsys.readouterr().out.strip().split("\n")[-1])


def test_the_command_for_a_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vllm.main(["--model", str(model), "max_model_len=256", "arguments=[--enforce-eager]"]) == OK
    line = words(capsys)
    assert line[line.index("serve") :][:8] == ["serve", str(model), "--host", "127.0.0.1", "--port", "8000", "--served-model-name", "tiny"]
    assert line[-1] == "--enforce-eager" and line[line.index("--max-model-len") + 1] == "256" and "--enable-lora" not in line
    assert not any("key" in word.lower() for word in line)


def test_an_adapter_is_served_beside_its_base(model: Path, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--model", str(model), "--adapter", str(adapters / "plain")], ["--model", str(adapters / "plain")]):
        assert vllm.main(argv) == OK
        line = words(capsys)
        assert line[line.index("serve") + 1] == str(model)
        assert line[line.index("--enable-lora") :] == ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tiny-adapter={adapters / 'plain'}"]


def test_the_compose_service_gets_the_same_flags(model: Path, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vllm.main(["--model", str(model), "--adapter", str(adapters / "plain"), "--engine", "compose", "--port", "9000"]) == OK
    line = words(capsys)
    given = dict(word.split("=", 1) for word in line[: line.index("docker")])
    assert given["SOP_MODEL_DIR"] == str(model) and given["SOP_ADAPTER_DIR"] == str(adapters / "plain") and given["SOP_PORT"] == "9000"
    assert "--lora-modules tiny-adapter=/adapter" in given["SOP_VLLM_ARGS"]
    used = set(_variables(COMPOSE.read_text(encoding="utf-8")))
    assert set(given) <= used and "SOP_API_KEY" in used and "SOP_API_KEY" not in given


def test_a_template_with_a_switch_gets_the_one_of_training(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from self_model_sop.train.families import read

    folder = copy(model, tmp_path / "qwen3")
    (folder / "chat_template.jinja").write_text(read(QWEN3).source, encoding="utf-8")
    assert vllm.main(["--model", str(folder)]) == OK
    line = words(capsys)
    assert json.loads(line[line.index("--default-chat-template-kwargs") + 1]) == {"enable_thinking": False}


def test_what_vllm_would_refuse_or_change_is_found_first(model: Path, adapters: Path, tmp_path: Path) -> None:
    def refusal(match: str, config: vllm.Config, code: int = DATA) -> SopError:
        with pytest.raises(SopError, match=match) as caught:
            vllm.check(config)
        assert caught.value.code == code
        return caught.value

    error = refusal("trained 2 rows of new tokens", vllm.Config(model=model, adapter=adapters / "rows"))
    assert error.fix and "sop train merge" in error.fix
    refusal("use_dora", vllm.Config(model=model, adapter=adapters / "dora"))
    refusal("rank 600", vllm.Config(model=model, adapter=copy(adapters / "plain", tmp_path / "high", r=600)))
    refusal("rank 0", vllm.Config(model=model, adapter=copy(adapters / "plain", tmp_path / "none", r=0)))
    refusal("quantisation 'exl3'", vllm.Config(model=copy(model, tmp_path / "exl3", quantization_config={"quant_method": "exl3"})))
    refusal("embedding rows", vllm.Config(model=copy(model, tmp_path / "small", vocab_size=100)))
    bare = copy(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    refusal("no chat template", vllm.Config(model=bare))
    (bare / "model.safetensors").unlink()
    refusal("no safetensors weights", vllm.Config(model=bare))
    (bare / "config.json").unlink()
    refusal("no config.json", vllm.Config(model=bare), USAGE)
    expanded = copy(adapters / "plain", tmp_path / "expanded")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, expanded / name)
    state = json.loads((expanded / "tokenizer.json").read_text())
    state["added_tokens"].append({"id": 5000, "content": "糖尿病", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False})
    (expanded / "tokenizer.json").write_text(json.dumps(state))
    error = refusal("needs 5001 embedding rows", vllm.Config(model=model, adapter=expanded))
    assert error.fix and "expanded base" in error.fix


def test_quantised_models_are_named(model: Path, tmp_path: Path) -> None:
    found = vllm.check(vllm.Config(model=copy(model, tmp_path / "gptq", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})))
    assert "quantised: gptq, 4 bits, groups of 128" in found.notes


def test_without_vllm_the_way_to_it_is_told(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOP_API_KEY", "a-key-for-the-tests-only")
    assert vllm.main(["--model", str(model), "--run", "executable=no-such-vllm"]) == ENVIRONMENT
    assert f"vllm=={vllm.VERSION}" in capsys.readouterr().err
    monkeypatch.delenv("SOP_API_KEY")
    assert vllm.main(["--model", str(model), "--host", "0.0.0.0"]) == USAGE
    assert vllm.main([]) == USAGE


def test_a_server_that_ends_is_not_waited_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOP_API_KEY", "a-key-for-the-tests-only")
    config = vllm.Config(model=model, executable=shutil.which("false") or "false", port=1)
    with pytest.raises(SopError, match="ended before it answered"):
        vllm.start(config, vllm.check(config))


def test_the_wait_wants_a_real_answer(served: str) -> None:
    assert vllm.wait_for_answer(served, KEY, "tiny", 60, lambda: True)
    with pytest.raises(SopError, match="refuses to answer: 401"):
        vllm.wait_for_answer(served, "another-key", "tiny", 60, lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(SopError, match=r"no answer after 0\.2 s"):
        vllm.wait_for_answer(nowhere, KEY, "tiny", 0.2, lambda: True)


@pytest.mark.gpu
def test_vllm_answers_on_a_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("vllm") is None:
        pytest.skip("the command vllm is not here")
    monkeypatch.setenv("SOP_API_KEY", "a-key-for-the-tests-only")
    config = vllm.Config(model=model, max_model_len=256, arguments=("--enforce-eager",), gpu_memory_utilization=0.3, port=8765)
    line = vllm.command(config, vllm.check(config))
    process = subprocess.Popen(line.words, env={**os.environ, **line.environment, "VLLM_API_KEY": "a-key-for-the-tests-only"})
    try:
        assert vllm.wait_for_answer("http://127.0.0.1:8765", "a-key-for-the-tests-only", "tiny", 600, lambda: process.poll() is None)
    finally:
        process.terminate()
        process.wait(timeout=60)


# --- scripts and containers -----------------------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def _variables(text: str) -> list[str]:
    return re.findall(r"\$\{(\w+)", text)


def test_the_compose_file_fits_the_specification() -> None:
    done = subprocess.run([tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_containers_publish_on_this_machine_only_and_hold_no_secret() -> None:
    services = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    assert set(services) == {"dev", "train", "vllm"}
    for name, service in services.items():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["healthcheck"]["test"] and service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"], name
        assert service.get("privileged") is None and service["security_opt"] == ["no-new-privileges:true"]
    assert services["vllm"]["image"].endswith(f":-v{vllm.VERSION}}}")
    compile(services["vllm"]["healthcheck"]["test"][-1], "healthcheck", "exec")


def test_the_health_check_of_the_container_asks_for_a_real_answer(served: str) -> None:
    script = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]["vllm"]["healthcheck"]["test"][-1]
    script = script.replace("http://127.0.0.1:8000", served)
    for key, code in ((KEY, 0), ("another-key", 1)):
        done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "SOP_MODEL_NAME": "tiny", "VLLM_API_KEY": key}, capture_output=True, check=False)
        assert done.returncode == code, done.stderr


def test_the_image_is_clean() -> None:
    done = subprocess.run([tool("hadolint"), str(ROOT / "docker" / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_copies_what_is_there_and_runs_without_privileges() -> None:
    lines = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").split("\n")
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    assert [line for line in lines if line.startswith("USER")] == ["USER ${USER_ID}"]


def test_the_script_is_clean_and_tells_its_use() -> None:
    script = ROOT / "inference" / "vllm" / "run_vllm.sh"
    done = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    alone = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert alone.returncode == 2 and "run_vllm.sh FOLDER" in alone.stderr
    keyless = subprocess.run(["bash", str(script), "x"], capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "SOP_API_KEY"}, check=False)
    assert keyless.returncode == 2 and "SOP_API_KEY is not set" in keyless.stderr
