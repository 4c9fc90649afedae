"""`sop`: finds commands, suggests, and loads nothing heavy before work begins."""

from __future__ import annotations

import math
import resource
import subprocess
import sys

import pytest

from self_model_sop import __version__, cli
from self_model_sop.errors import OK, USAGE
from self_model_sop.stages import STAGES

HEAVY = ("torch", "transformers", "datasets", "tokenizers", "pyarrow", "numpy", "pydantic", "peft", "trl", "matplotlib", "sentencepiece", "rich", "huggingface_hub")


def python(code: str, *options: str) -> str:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == OK
    out = capsys.readouterr().out
    assert all(f"  {' '.join(e.command)} " in out and e.help in out for e in STAGES)
    assert cli.main([]) == OK
    assert cli.main(["--version"]) == OK
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["data", "proces"], "did you mean 'sop data process'?"), (["rn", "x.yaml"], "did you mean 'sop run'?"), (["tokeniser", "select"], "did you mean 'sop tokenizer select'?"),
        (["zzz"], "see sop --help"), (["data", "zzz"], "see sop --help"), (["--hlep"], "see sop --help"),
    ],
)  # fmt: skip
def test_a_wrong_word_gets_a_suggestion(words: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == USAGE
    err = capsys.readouterr().err
    assert err.startswith("error: no command") and suggestion in err


def test_a_group_alone_shows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tokenizer"]) == USAGE
    assert "sop tokenizer select" in capsys.readouterr().err


def test_underscores_and_dashes_are_the_same() -> None:
    assert cli.find(["tokenizer", "mlm_loss", "x"]) == cli.find(["tokenizer", "mlm-loss", "x"])


@pytest.mark.parametrize("entry", [None, *STAGES], ids=lambda e: e.name if e else "sop")
def test_help_of_every_command_loads_nothing_heavy(entry: object) -> None:
    words = [*getattr(entry, "command", ()), "--help"]
    call = f"try:\n    main({words!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    out = python(f"import sys\nfrom self_model_sop.cli import main\n{call}print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])")
    assert out.splitlines()[-1] == "LOADED []", out[-500:]
    assert "usage: sop" in out


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["train", "sft", "--help"], ["data", "process", "--help"]], ids=" ".join)
def test_help_is_as_fast_as_python_itself(words: list[str]) -> None:
    """At most 0.15 s over a bare interpreter: the least of alternating runs of each, in processor time, so that what else the machine does counts least."""

    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    help_text = f"from self_model_sop.cli import main\ntry: main({words!r})\nexcept SystemExit: pass"
    python(help_text)  # writes the byte code
    ours, bare = math.inf, math.inf
    for _ in range(30):
        ours, bare = min(ours, seconds(help_text)), min(bare, seconds("pass"))
        if ours - bare <= 0.15:
            return
    pytest.fail(f"the help takes {ours:.3f} s, a bare interpreter {bare:.3f} s")
