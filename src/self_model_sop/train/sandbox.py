"""Chat templates are programs from strangers: rendered in Jinja's immutable sandbox, with limits on time, loops and sizes.

The environment is the one that transformers builds (same options, filters and globals), except that its output is tracked (`train/tracked.py`).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import errors
from ..errors import SopError
from . import tracked

TIME_LIMIT = 10.0  # seconds for one rendering; a long dialogue takes milliseconds
SIZE_LIMIT = 50_000_000  # characters of one value or of the output
_MEMORY_LIMIT = 2**31  # bytes of address space that the process that tries a template out may add to what it started with
_HUGE_WIDTH = re.compile(r"\d{7,}")


class TemplateError(SopError):
    """The template cannot render this conversation, or is not allowed to do what it tries."""

    def __init__(self, what: str, *, fix: str | None = None, code: int = errors.DATA) -> None:
        super().__init__(what, where="chat template", fix=fix, code=code)


class _TimeUp(BaseException):
    """Raised inside a rendering that takes too long; not an Exception, so that no filter of a template swallows it."""


def render(source: str, variables: Mapping[str, Any], *, seconds: float = TIME_LIMIT) -> str:
    """Render a Jinja chat template with tracked variables; answers a `Tracked` string where any data reached the output.

    Raises:
        TemplateError: syntax, a refusal by the template (`raise_exception`), a forbidden operation, too long, too large.
    """
    import jinja2

    try:
        with _limit(seconds):
            text: str = _compile(source).render(**variables)
        return text
    except _TimeUp:
        raise TemplateError(f"the template did not finish in {seconds:g} s", fix="use another template (template_path)", code=errors.USAGE) from None
    except jinja2.exceptions.SecurityError as error:
        raise TemplateError(f"the template tries something forbidden: {error}", fix="do not use this template", code=errors.USAGE) from error
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise TemplateError(f"the template has a syntax error in line {error.lineno}: {error.message}", fix="correct the template", code=errors.USAGE) from error
    except (jinja2.exceptions.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise TemplateError(f"the template refuses this conversation: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise TemplateError(f"the template needs too much: {type(error).__name__}", fix="do not use this template", code=errors.USAGE) from error


def try_out(source: str, probes: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, seconds: float = TIME_LIMIT) -> list[dict[str, str]]:
    """Render probes in a process of their own, with limits on processor time and memory: a template proves itself there before it runs here.

    Answers {"text"} or {"error"} for each probe.

    Raises:
        TemplateError: where the process had to be stopped, or the template is faulty or forbidden in itself.
    """
    task = json.dumps({"source": source, "probes": list(probes), "variables": dict(variables), "seconds": seconds})
    return [dict(result) for result in _try_out(task, seconds)]


@lru_cache(maxsize=16)
def _try_out(task: str, seconds: float) -> tuple[Mapping[str, str], ...]:
    command = [sys.executable, "-c", f"from {__name__} import _child; _child()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])}
    try:
        done = subprocess.run(command, input=task, capture_output=True, text=True, encoding="utf-8", timeout=2 * seconds + 20, env=environment, check=False)
    except subprocess.TimeoutExpired:
        raise TemplateError("the template does not end", fix="do not use this template", code=errors.USAGE) from None
    if done.returncode != 0:
        stopped = done.returncode < 0 or "MemoryError" in done.stderr
        what = "the template takes too much time or memory" if stopped else f"the template cannot be tried: {done.stderr.strip()[-300:]}"
        raise TemplateError(what, fix="do not use this template", code=errors.USAGE)
    results = json.loads(done.stdout)
    for result in results:
        if result.get("code") == errors.USAGE:
            raise TemplateError(result["error"], fix="do not use this template", code=errors.USAGE)
    return tuple(results)


def _address_space() -> int:
    """Bytes of address space of this process, where the system tells; a `sitecustomize` that imports a CUDA build of torch takes 3 GiB."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _child() -> None:
    """The other process: reads a task from stdin, limits itself, renders, writes the results to stdout."""
    import resource

    task = json.load(sys.stdin)
    limit = _address_space() + _MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    cpu = int(task["seconds"]) + 10
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    results: list[dict[str, Any]] = []
    for probe in task["probes"]:
        values = {"documents": None, "tools": None, "add_generation_prompt": False, **task["variables"], **probe}
        try:
            results.append({"text": str.__str__(render(task["source"], values, seconds=task["seconds"]))})
        except TemplateError as error:
            results.append({"error": error.what, "code": error.code})
            if error.code == errors.USAGE:
                break
    json.dump(results, sys.stdout)


@lru_cache(maxsize=64)
def _compile(source: str) -> Any:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> Any:
    """The tracked sandbox; classes are made here because jinja2 is imported late."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator

    if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < (3, 1, 6):
        raise SopError(f"jinja2 {jinja2.__version__} has known sandbox escapes", fix="pip install -U 'jinja2>=3.1.6'", code=errors.ENVIRONMENT)

    class Generator(CodeGenerator):
        def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:  # noqa: N802  (jinja's name)
            """`a ~ b` through the environment's own concat, which keeps marks."""
            self.write("concat((")
            for child in node.nodes:
                self.write("str(")
                self.visit(child, frame)
                self.write("), ")
            self.write("))")

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` of templates that mark assistant text: rendered as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Callable[[], str]) -> str:
            return caller()

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        code_generator_class = Generator
        concat = staticmethod(_limited_concat)
        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            _check_arguments(obj, args, kwargs)
            result = super().call(context, obj, *args, **kwargs)
            if type(result) is not str:
                return result
            owner = getattr(obj, "__self__", None)
            if isinstance(owner, str) and obj.__name__ == "join":
                return tracked.join(owner, args[0])
            return tracked.tainted(result, owner, args, kwargs) if isinstance(owner, str) else tracked.tainted(result, args, kwargs)

    env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters = {name: _tracked_filter(name, function) for name, function in env.filters.items()}
    env.filters["tojson"] = _to_json
    env.filters["join"] = _join_filter
    env.globals["raise_exception"] = _refuse
    env.globals["strftime_now"] = _now
    return env


def _security(what: str) -> Exception:
    import jinja2.exceptions

    return jinja2.exceptions.SecurityError(what)


def _limited_concat(parts: Any) -> str:
    text = tracked.concat(parts)
    if len(text) > SIZE_LIMIT:
        raise _security(f"more than {SIZE_LIMIT} characters of output")
    return text


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse products and powers that make huge values."""
    if operator == "*":
        sized = [value for value in (left, right) if isinstance(value, (str, list, tuple))]
        times = [value for value in (left, right) if isinstance(value, int)]
        if sized and times and len(sized[0]) * times[0] > SIZE_LIMIT:
            raise _security("a very long value")
        if len(times) == 2 and sum(value.bit_length() for value in times) > 10_000:
            raise _security("a very large number")
    elif operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > 10_000:
        raise _security("a very large number")
    elif operator == "%" and isinstance(left, str) and _HUGE_WIDTH.search(left):
        raise _security("a very wide format")


def _check_arguments(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse calls with huge counts (`x.zfill(10**9)`) or widths (`'{:999999999}'.format(x)`)."""
    if any(isinstance(value, int) and abs(value) > 1_000_000 for value in (*args, *kwargs.values())):
        raise _security("a very large number as an argument")
    owner = getattr(function, "__self__", None)
    if isinstance(owner, str) and function.__name__ in ("format", "format_map") and _HUGE_WIDTH.search(owner):
        raise _security("a very wide format")


def _tracked_filter(name: str, function: Any) -> Any:
    """A filter whose plain result is marked with what went in, and whose numbers are limited."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(function, args[1:] if args and isinstance(args[0], int) else args, kwargs)
        if name == "format" and args and isinstance(args[0], str) and _HUGE_WIDTH.search(args[0]):
            raise _security("a very wide format")
        result = function(*args, **kwargs)
        return tracked.tainted(result, args, kwargs) if type(result) is str else result

    for attribute in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(function, attribute):
            setattr(wrapped, attribute, getattr(function, attribute))
    return wrapped


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """The filter of transformers: no HTML escapes."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return tracked.tainted(text, value)


def _join_filter(value: Any, d: str = "", attribute: Any = None) -> str:
    items = list(value)
    if attribute is not None:
        items = [item[attribute] if isinstance(item, Mapping) else getattr(item, attribute) for item in items]
    return tracked.join(d, [item if isinstance(item, str) else str(item) for item in items])


def _refuse(message: str) -> None:
    import jinja2.exceptions

    raise jinja2.exceptions.TemplateError(str.__str__(message))


def _now(pattern: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(pattern)


# --- the time limit -----------------------------------------------------------------------------------------------------------------------


class _Watchdog:
    """One thread that interrupts renderings past their deadline, in whatever thread they run (signals would reach the main thread only)."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}
        self.thread: threading.Thread | None = None

    def watch(self) -> None:
        while True:
            time.sleep(0.25)
            with self.lock:
                now = time.monotonic()
                for thread, deadline in list(self.deadlines.items()):
                    if now > deadline:
                        del self.deadlines[thread]
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimeUp))

    def start(self) -> None:
        with self.lock:
            if self.thread is None or not self.thread.is_alive():  # dead after a fork
                self.thread = threading.Thread(target=self.watch, name="template-time-limit", daemon=True)
                self.thread.start()


_WATCHDOG = _Watchdog()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WATCHDOG.__init__)  # type: ignore[misc]  # a lock held by the parent would never be released in the child


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    watchdog, me = _WATCHDOG, threading.get_ident()
    if watchdog.thread is None or not watchdog.thread.is_alive():
        watchdog.start()
    watchdog.deadlines[me] = time.monotonic() + seconds
    try:
        yield
    finally:
        with watchdog.lock:  # after this, no late interruption
            watchdog.deadlines.pop(me, None)
