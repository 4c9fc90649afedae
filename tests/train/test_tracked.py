"""A tracked string is the string, and each of its characters remembers which source it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from self_model_sop.train import sandbox, tracked
from self_model_sop.train.tracked import MIXED, Tracked, leaf_mark, leaf_number, marks_of

A, B = leaf_mark(1), leaf_mark(2)
first = st.text("abc \n", max_size=12)  # text of the first source, letters that no other source has
second = st.text("xyz \n", max_size=12)


def of_a(text: str) -> Tracked:
    return tracked.tracked(text, A * len(text))


def of_b(text: str) -> Tracked:
    return tracked.tracked(text, B * len(text))


def strings(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [s for v in value for s in strings(v)]


def assert_true_origin(value: Any) -> None:
    """Every letter of the first source carries its mark, every letter of the second its own, and capital letters are the template's."""
    for text in strings(value):
        marks = marks_of(text)
        assert len(marks) == len(text)
        for character, mark in zip(str.__iter__(text), marks, strict=True):
            if character in "abc":
                assert mark == A
            elif character in "xyz":
                assert mark == B
            elif character.isupper():
                assert mark == tracked.TEMPLATE


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "radd": lambda a, b: "T" + a + "T" + b,
    "strip": lambda a, b: (a + b).strip(),
    "lstrip": lambda a, b: (b + a).lstrip("a "),
    "rstrip": lambda a, b: (b + a).rstrip("b\n"),
    "slice": lambda a, b: (a + "T" + b)[1:-1],
    "step": lambda a, b: (a + b)[::2],
    "split": lambda a, b: (a + " " + b).split(),
    "split on text": lambda a, b: (a + "ab" + b + "ab" + a).split("ab"),
    "split once": lambda a, b: (a + b + a).split("a", 1),
    "rsplit": lambda a, b: (a + b + a).rsplit("a", 1),
    "rsplit on space": lambda a, b: (a + b + a).rsplit(None, 2),
    "lines": lambda a, b: (a + b).splitlines(),
    "lines kept": lambda a, b: (a + b).splitlines(True),
    "partition": lambda a, b: (a + b).partition("x"),
    "rpartition": lambda a, b: (a + b).rpartition("\n"),
    "replace": lambda a, b: (a + b).replace("a", "T"),
    "replace by data": lambda a, b: ("T" + a).replace("T", b),
    "replace some": lambda a, b: (a + b).replace("b", "TT", 1),
    "remove prefix": lambda a, b: (a + b).removeprefix("a").removesuffix("z"),
    "join": lambda a, b: tracked.join("T", [a, b, a]),
    "join with data": lambda a, b: a.join(["T", b]),
    "letters": lambda a, b: list(a + b),
    "times": lambda a, b: (a + b) * 2,
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(a=first, b=second)
def test_the_text_is_that_of_str_and_the_origin_is_true(name: str, a: str, b: str) -> None:
    operation = OPERATIONS[name]
    expected = tracked.join("T", [a, b, a]) if name == "join" else operation(a, b)
    found = operation(of_a(a), of_b(b))
    assert found == expected
    assert_true_origin(found)


@given(st.integers(1, 0xFFFF))
def test_marks_tell_leaves_apart(number: int) -> None:
    mark = leaf_mark(number)
    assert leaf_number(mark) == number
    assert mark not in (MIXED, tracked.TEMPLATE)
    mark.encode("utf-8")


JINJA = {
    "plus": "{{ 'T' + a + b }}",
    "tilde": "{{ 'T' ~ a ~ 1 ~ b }}",
    "filters": "{{ a | trim }}{{ b | string }}{{ a | default('T') }}",
    "replace": "{{ a | replace('a', 'T') }}",
    "join filter": "{{ [a, 'T', b] | join('T') }}",
    "join method": "{{ 'T'.join([a, b]) }}",
    "macro": "{% macro m(x) %}T{{ x }}T{% endmacro %}{{ m(a) }}{{ m(b) | trim }}",
    "block set": "{% set x %}T{{ a }}{% endset %}{{ x }}{{ b }}",
    "set and split": "{% set p = (a + 'T' + b).split('T') %}{{ p[0] }}|{{ p[-1].strip() }}",
    "namespace": "{% set ns = namespace(x='') %}{% for m in [a, b] %}{% set ns.x = ns.x + m %}{% endfor %}{{ ns.x }}",
    "condition": "{{ a if b else 'T' }}{% if a.startswith('a') %}{{ a[1:] }}{% endif %}",
    "letters": "{% for c in a %}{{ c }}{% endfor %}",
    "filter block": "{% filter trim %}T {{ a }} T{% endfilter %}",
    "generation": "T{% generation %}{{ a }}{% endgeneration %}{{ b }}",
    "call block": "{% macro m() %}T{{ caller() }}{% endmacro %}{% call m() %}{{ a }}{% endcall %}",
}


@pytest.mark.parametrize("name", JINJA)
@given(a=first, b=second)
def test_origin_survives_every_construct_of_templates(name: str, a: str, b: str) -> None:
    plain, found = sandbox.render(JINJA[name], {"a": a, "b": b}), sandbox.render(JINJA[name], {"a": of_a(a), "b": of_b(b)})
    assert found == plain
    assert_true_origin(found)


WHOLE = ["{{ a | tojson }}", "{{ a | upper | indent(2) }}", "{{ 'T%s' % a }}", "{{ 'T{}'.format(a) }}", "{{ a | wordwrap(2) }}", "{{ a.title() }}"]


@pytest.mark.parametrize("source", WHOLE)
def test_what_cannot_be_followed_is_data_as_a_whole(source: str) -> None:
    found = sandbox.render(source, {"a": of_a("cab bac abc")})
    assert isinstance(found, Tracked)
    assert set(found.marks) <= {A}


def test_a_mixture_is_marked_as_one() -> None:
    found = sandbox.render("{{ [a, b] | tojson }}", {"a": of_a("a"), "b": of_b("b")})
    assert set(marks_of(found)) == {MIXED}
