"""What a run leaves about itself: metrics.jsonl while it runs, loss.png and report.html at its end."""

from __future__ import annotations

import html
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from ..console import human_seconds, note
from . import machine, ranks

METRICS = "metrics.jsonl"


class Record:
    """Counts tokens and time across phases and resumed runs, and writes one line per logged step.

    A line: phase, step, loss (nats per supervised token), learning_rate, grad_norm, tokens (so far), tokens_per_s (since the last line), supervised (share),
    memory_mib (largest so far), distance (of a phase that distils, from its teacher's states),
    mfu (on GPUs whose peak is known: the share of it that the model's own arithmetic takes), seconds.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self.phase = ""
        self.tokens = self.supervised = self.rows = 0  # of all processes
        self._own = [0, 0, 0]  # of this one, since the last gathering
        self._before = 0.0  # seconds of training up to the last stop of the clock, earlier processes included
        self._clock: float | None = None
        self._last = (0, 0, 0.0)  # tokens, supervised, seconds at the last line
        self._said = 0.0
        self._steps = (0, 0)
        self._loss: float | None = None
        self.peak_tokens_per_s: float | None = None  # what the GPUs would do at their peak; None: not known

    # --- counting -------------------------------------------------------------------------------------------------------------------------

    def begin(self, phase: str, marker: dict[str, Any] | None) -> None:
        """Start a phase; with a checkpoint's marker, take up its totals and drop the lines written after it."""
        self.phase = phase
        rows = self.lines()
        if marker:
            self.restore(marker)
            rows = [r for r in rows if r["phase"] != phase or r["step"] <= marker["step"]]
        else:
            rows = [r for r in rows if r["phase"] != phase]
        self._last = (self.tokens, self.supervised, self.seconds)
        if ranks.is_main():
            self.path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")

    def restore(self, marker: dict[str, Any]) -> None:
        """Take up the totals that a checkpoint's marker carries."""
        self.tokens, self.supervised, self.rows = (int(marker[k]) for k in ("tokens", "supervised", "rows"))
        self._before = float(marker["seconds"])

    def count(self, tokens: int, supervised: int, examples: int) -> None:
        """Take one micro-batch of this process; padding is no token."""
        self._own = [a + b for a, b in zip(self._own, (tokens, supervised, examples), strict=True)]

    def gather(self) -> None:
        """Add what every process counted to the totals (collective)."""
        tokens, supervised, rows = ranks.sums(self._own)
        self.tokens, self.supervised, self.rows, self._own = self.tokens + tokens, self.supervised + supervised, self.rows + rows, [0, 0, 0]

    @property
    def seconds(self) -> float:
        """Training time so far, earlier processes included; loading and measuring do not count."""
        return self._before + (time.perf_counter() - self._clock if self._clock is not None else 0.0)

    def totals(self) -> dict[str, Any]:
        """What a checkpoint's marker carries on."""
        return {"tokens": self.tokens, "supervised": self.supervised, "rows": self.rows, "seconds": round(self.seconds, 3)}

    # --- writing --------------------------------------------------------------------------------------------------------------------------

    def log(self, step: int, logs: dict[str, float]) -> None:
        """One line for what the trainer logs at `step`."""
        if "train_runtime" in logs:
            return
        line: dict[str, Any] = {"phase": self.phase, "step": step, **{k: _number(v) for k, v in logs.items() if k not in ("epoch", "num_tokens")}}
        if "loss" in logs:
            tokens, supervised, seconds = self._last
            now = self.seconds
            seen = self.tokens - tokens
            line |= {"tokens": self.tokens, "tokens_per_s": round(seen / max(now - seconds, 1e-9), 1), "supervised": round((self.supervised - supervised) / max(seen, 1), 4)}
            line["memory_mib"] = machine.peak_mib()
            if self.peak_tokens_per_s:
                line["mfu"] = round(line["tokens_per_s"] / self.peak_tokens_per_s, 4)
            self._last = (self.tokens, self.supervised, now)
            self._loss = logs["loss"]
        line["seconds"] = round(self.seconds, 2)
        if ranks.is_main():
            with self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Every complete line so far (a torn last one is left out)."""
        if not self.path.exists():
            return []
        out = []
        for text in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                out.append(json.loads(text))
            except ValueError:
                continue
        return out

    # --- what a person sees while it runs ---------------------------------------------------------------------------------------------------

    def start(self, step: int, steps: int) -> None:
        """The first step of this process is about to run."""
        self._clock = time.perf_counter()
        self._first, self._steps = (step, time.perf_counter()), (step, steps)
        self._said = time.perf_counter()

    def step(self, step: int) -> None:
        """A progress line: on a terminal at every step, else every half minute."""
        steps = self._steps[1]
        first, began = self._first
        left = (time.perf_counter() - began) / max(step - first, 1) * (steps - step)
        text = f"{self.phase}: step {step}/{steps}" + (f"  loss {self._loss:.3f}" if self._loss is not None else "") + f"  {human_seconds(left)} left"
        if not ranks.is_main():
            return
        if sys.stderr.isatty():
            sys.stderr.write("\r" + text.ljust(100) + ("\n" if step == steps else ""))
        elif time.perf_counter() - self._said > 30:
            self._said = time.perf_counter()
            note(text)

    def end(self, step: int, steps: int) -> None:
        """The phase is over."""
        self.gather()
        self._before, self._clock = self.seconds, None
        note(f"{self.phase}: {step} of {steps} steps, {self.tokens:,} tokens so far, {human_seconds(self.seconds)}")


def _number(value: Any) -> Any:
    """Nine digits are what fp32 holds, and JSON knows no NaN."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else str(value)


# --- the curves -------------------------------------------------------------------------------------------------------------------------------


def losses(lines: list[dict[str, Any]], key: str = "loss") -> list[tuple[float, float]]:
    """(step counted across phases, value) of each line that has `key`."""
    points, offset, phase, last = [], 0, None, 0
    for line in lines:
        if line["phase"] != phase:
            offset, phase = offset + last, line["phase"]
        last = line["step"]
        if isinstance(line.get(key), (int, float)):
            points.append((offset + line["step"], float(line[key])))
    return points


_CHARTS = {
    "reward": "mean reward of sampled answers", "loss": "loss, {unit}", "eval_loss": "evaluation loss",
    "rewards/accuracies": "pairs in which the chosen answer has the larger reward",
    "eval_rewards/accuracies": "the same of held-out pairs", "rewards/margins": "margin of the rewards", "eval_rewards/margins": "margin of held-out pairs",
    "accuracy": "pairs in which the chosen answer has the larger reward", "eval_accuracy": "the same of held-out pairs", "margin": "margin of the rewards",
    "eval_margin": "margin of held-out pairs", "distance": "squared distance from the teacher's states, as a share of their square",
    "learning_rate": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens per second",
    "supervised": "share of learned tokens", "memory_mib": "largest memory so far, MiB", "mfu": "share of the GPUs' peak",
}  # fmt: skip
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:860px;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "th{text-align:left;font-weight:600;padding:.15em 1.5em .15em 0}svg{width:100%;height:auto}h2{font-size:1em;margin:1.6em 0 .2em}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}"
)


def write_curves(folder: Path, title: str, facts: dict[str, Any], unit: str = "nats per supervised token") -> None:
    """`loss.png` and `report.html` from metrics.jsonl, the loss in `unit`; the HTML holds everything in itself and opens without a network."""
    lines = Record(folder).lines()
    _png(folder / "loss.png", lines, title, unit)
    body = "".join(f"<h2>{html.escape(name.format(unit=unit))}</h2>{_svg(losses(lines, key))}" for key, name in _CHARTS.items() if losses(lines, key))
    rows = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    page = f'<!doctype html><html lang="en">{head}<h1>{html.escape(title)}</h1><table>{rows}</table>{body}</html>\n'
    (folder / "report.html").write_text(page, encoding="utf-8")


def _svg(points: list[tuple[float, float]]) -> str:
    width, height, left, bottom = 800, 220, 60, 24
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, y1 = x1 if x1 > x0 else x0 + 1, y1 if y1 > y0 else y0 + (abs(y0) or 1)

    def at(x: float, y: float) -> str:
        return f"{left + (x - x0) / (x1 - x0) * (width - left - 10):.1f},{10 + (y1 - y) / (y1 - y0) * (height - bottom - 10):.1f}"

    line = " ".join(at(x, y) for x, y in points)
    marks = "".join(f'<text x="{left - 6}" y="{10 + (y1 - v) / (y1 - y0) * (height - bottom - 10) + 4:.1f}" text-anchor="end">{v:.3g}</text>' for v in (y0, (y0 + y1) / 2, y1))
    steps = "".join(f'<text x="{left + (v - x0) / (x1 - x0) * (width - left - 10):.1f}" y="{height - 4}" text-anchor="middle">{v:.0f}</text>' for v in (x0, (x0 + x1) / 2, x1))
    dots = "".join(f'<circle cx="{c[0]}" cy="{c[1]}" r="2.5" fill="#2a7ae2"/>' for c in (at(x, y).split(",") for x, y in points)) if len(points) <= 60 else ""
    curve = f'<polyline points="{line}" fill="none" stroke="#2a7ae2" stroke-width="1.8"/>'
    return f'<svg viewBox="0 0 {width} {height}" role="img" font-size="11" fill="currentColor">{curve}{dots}{marks}{steps}</svg>'


def _png(path: Path, lines: list[dict[str, Any]], title: str, unit: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = losses(lines, key)
        if points:
            axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", markersize=3, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.set_title(title)
    if axes.lines:
        axes.legend()
    figure.savefig(path, metadata={"Software": None})
