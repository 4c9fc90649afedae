"""F62: a malicious chat template does nothing but fail, in time."""

from __future__ import annotations

import resource
import threading
import time
from pathlib import Path

import pytest

from chat_tokenizers import QWEN, tiny
from self_model_sop.errors import USAGE, SopError
from self_model_sop.train import sandbox
from self_model_sop.train.template import TemplateError, renderer_for

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ATTACKS = {
    "classes of a string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a jinja function": "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "globals of a class": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "globals of our function": "{{ raise_exception.__globals__ }}",
    "the undefined object": "{{ nothing.__init__.__globals__['__builtins__'].open('CANARY', 'w') }}",
    "attr filter": "{{ messages | attr('__class__') | attr('__base__') }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages[0].content) }}",
    "changing the data": "{% set x = messages.append({'role': 'user', 'content': 'x'}) %}{{ messages | length }}",
    "a file": "{% include 'CANARY' %}",
}
HOGS = {
    "a loop in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "macros that call themselves twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a huge string": "{{ ('a' * 9999999999) | length }}",
    "a string doubled and doubled": "{% set ns = namespace(x='a' * 1000) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a huge width": "{{ '%999999999d' % 1 }}",
    "a huge format": "{{ '{:999999999}'.format(1) }}",
    "a huge number": "{{ 9 ** 99999999 }}",
    "a huge centre": "{{ 'x' | center(9999999999) }}",
    "a huge fill": "{{ 'x'.zfill(9999999999) }}",
    "a huge range": "{{ range(999999999) | list | length }}",
    "a huge indent": "{{ 'x\\ny' | indent(999999999) }}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_reach_nothing(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    body = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    try:
        text = renderer_for(tiny(QWEN, "<|im_start|>" + ATTACKS[name].replace("CANARY", str(canary)) + body)).text(TALK)
    except SopError:
        text = "refused"
    # what the sandbox hides is undefined, and the undefined is written as nothing
    assert text in ("refused", renderer_for(tiny(QWEN, "<|im_start|>" + body)).text(TALK))
    assert not canary.exists()
    assert TALK == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("name", HOGS)
def test_hogs_are_stopped(name: str) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(TemplateError) as error:
        sandbox.try_out(HOGS[name], [{"messages": []}], {}, seconds=1)
    assert error.value.code == USAGE
    assert time.monotonic() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB: it happened elsewhere


TRAP = (
    "{% for m in messages %}{% if 'boom' in m.content %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}"
)


def test_a_trap_that_waits_for_a_word_is_stopped_in_any_thread() -> None:
    """A template that passes the trial and hangs on certain rows."""
    found: list[BaseException] = []

    def run() -> None:
        try:
            sandbox.render(TRAP, {"messages": [{"content": "boom"}]}, seconds=0.5)
        except TemplateError as error:
            found.append(error)

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert [str(e.what) for e in found] == ["the template did not finish in 0.5 s"] * 2
    assert sandbox.render(TRAP, {"messages": [{"content": "fine"}]}, seconds=0.5) == "fine<|im_end|>"  # and the next one goes on


def test_honest_templates_pass_the_trial() -> None:
    assert sandbox.try_out("{{ messages[0].content }}", [{"messages": [{"content": "好"}]}], {}) == [{"text": "好"}]
    assert sandbox.try_out("{{ raise_exception('no') }}", [{"messages": []}], {})[0]["error"].endswith("no")
