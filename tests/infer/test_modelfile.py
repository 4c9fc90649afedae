"""What Ollama's TEMPLATE writes, rendered by an implementation of Go's text/template (the package gotpl; Go itself where it is installed)."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from chat_tokenizers import FAMILIES, REAL, TEMPLATES, for_family, real, tiny
from self_model_sop.errors import SopError
from self_model_sop.infer import modelfile
from self_model_sop.infer.probes import shipped
from self_model_sop.train import families
from self_model_sop.train.template import renderer_for

Talk = Sequence[Mapping[str, Any]]
NUMBERED = (
    "{% for m in messages %}{{ '<|im_start|>' + loop.index | string + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GO = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

func main() {
	var tasks []struct {
		Template string
		Messages []map[string]string
	}
	if err := json.NewDecoder(os.Stdin).Decode(&tasks); err != nil {
		panic(err)
	}
	var texts []string
	for _, task := range tasks {
		var text strings.Builder
		if err := template.Must(template.New("").Option("missingkey=zero").Parse(task.Template)).Execute(&text, map[string]any{"Messages": task.Messages}); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def renderer(name: str) -> Any:
    tokenizer = copy.deepcopy(for_family(name))
    tokenizer.chat_template = families.read(TEMPLATES / f"{name}.json").source
    return renderer_for(tokenizer)


def data(talk: Talk) -> dict[str, Any]:
    """What Ollama hands a template that names `.Messages`."""
    return {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in talk], "System": "", "Response": ""}


def talks(trims: bool) -> list[Talk]:
    probes = [*shipped(32, 0).conversations, *modelfile._PROBES, *(() if trims else modelfile._EDGES)]
    return [talk for talk in probes if all(m["content"] == m["content"].strip() for m in talk) or not trims]


def same(template: modelfile.GoTemplate, of: Any, bos: str = "") -> int:
    gotpl = pytest.importorskip("gotpl", reason="gotpl needs Python 3.11")
    compiled, compared = gotpl.Template(template.source()), 0
    for talk in talks(template.trims):
        try:
            expected = str.__str__(of.prompt_text(talk))
        except SopError:
            continue
        assert compiled.render(data(talk)) == expected.removeprefix(bos)
        compared += 1
    return compared


@pytest.mark.parametrize("name", FAMILIES)
def test_ollama_writes_the_prompts_of_training_for_every_shipped_template(name: str) -> None:
    of = renderer(name)
    template = modelfile.go_template(of)
    assert template is not None and template.trims == (name in ("llama2_chat", "llama3_instruct"))
    assert same(template, of) >= 36


@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(set(REAL.values()) - {"smollm2"}))
def test_and_for_the_templates_of_real_tokenizers(name: str) -> None:
    of = renderer_for(real(name))
    template = modelfile.go_template(of)
    if template is not None:
        assert same(template, of) >= 32
    else:
        assert name == "llama3"  # nothing is claimed for a template that a table cannot say


def test_the_same_by_go_itself(tmp_path: Path) -> None:
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not installed")
    tasks, expected = [], []
    for name in FAMILIES:
        of = renderer(name)
        template = modelfile.go_template(of)
        assert template is not None
        for talk in talks(template.trims):
            tasks.append({"Template": template.source(), "Messages": data(talk)["Messages"]})
            expected.append(str.__str__(of.prompt_text(talk)))
    (tmp_path / "main.go").write_text(GO, encoding="utf-8")
    done = subprocess.run([go, "run", "main.go"], cwd=tmp_path, input=json.dumps(tasks), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_a_template_that_a_table_cannot_say_is_left_out() -> None:
    of = renderer_for(tiny(template=NUMBERED))
    assert modelfile.go_template(of) is None
    text = str(modelfile.Modelfile(file="m.gguf", template=None, stop=["<|im_end|>"]))
    assert "TEMPLATE \"\"\"" not in text and "none is proven equal" in text and 'PARAMETER stop "<|im_end|>"' in text


def test_the_file(tmp_path: Path) -> None:
    gotpl = pytest.importorskip("gotpl", reason="gotpl needs Python 3.11")
    from tiny_gguf import tiny_gguf

    of = renderer("llama3_instruct")
    for bos, expected in (("<|begin_of_text|>", ""), (None, "<|begin_of_text|>")):
        gguf = tiny_gguf(tmp_path / "m.gguf", template=of.template, bos=bos)
        made = modelfile.write(tmp_path / "Modelfile", gguf, of, system="你是医生。")
        text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
        assert text == str(made) and 'SYSTEM """你是医生。"""' in text
        assert all(f"\n{line}\n" in text for line in ("FROM ./m.gguf", "PARAMETER num_ctx 512", "PARAMETER temperature 0.7"))
        assert 'PARAMETER stop "<|eot_id|>"' in text and "cuts white space" in text
        template = re.findall(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[0]
        talk = [{"role": "user", "content": "你好"}]
        written = gotpl.render(template, data(talk))
        assert written.startswith(f"{expected}<|start_header_id|>user") and ("<|begin_of_text|>" if bos else "") + written == of.prompt_text(talk)


def test_text_of_a_template_is_never_an_action() -> None:
    gotpl = pytest.importorskip("gotpl", reason="gotpl needs Python 3.11")
    odd = '{{ .X }} "quoted" \\{ """ }}\n`'
    template = modelfile.GoTemplate({("", "user"): odd, ("user", "end"): odd})
    talk = [{"role": "user", "content": "{{ .Y }}"}]
    assert gotpl.render(template.source(), data(talk)) == f"{odd}{{{{ .Y }}}}{odd}" == template.compose(talk)
    assert '"""' not in template.source()
    with pytest.raises(SopError, match="cannot hold"):
        str(modelfile.Modelfile(file="m.gguf", template=template, stop=(), system='a """ b'))
