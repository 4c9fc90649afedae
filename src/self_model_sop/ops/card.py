"""`sop card PATH`: the model card of an artifact, written from the manifests of everything that it was made of.

A README.md in Hugging Face's form (YAML front matter, then Markdown). Nothing in it is typed by hand and nothing is guessed: what no manifest says is named as unknown.
The same manifests give the same bytes. No path of a machine and no secret gets in; texts of the data do not either.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import console, errors
from ..artifact import Target, content_hash, differences, hash_input, write_atomic
from ..config import project_root
from ..errors import DATA, SopError
from ..redact import redact, redact_tree
from ..stage import guarded
from ..yaml_source import display
from . import runs
from .lineage import Step, lineage

MARK = "<!-- written by `sop card` from the manifests; edit elsewhere -->"
UNKNOWN = "unknown"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_LICENCES = frozenset(  # identifiers of the hub
    {"apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "openrail", "unlicense"}
)
_PATH = re.compile(r"(?:file://)?(?<![\w.:/])(?:~|[A-Za-z]:)?(?:[\\/][^\s\\/\"'`,;:|<>()]+){2,}[\\/]?")
_TASKS = {"causal": "text-generation", "masked": "fill-mask"}


# --- what the card says ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Licence:
    """What says which licence holds."""

    of: str
    licence: str
    source: str
    sha256: str
    size: int


class Card:
    """The text of one card."""

    def __init__(self, path: Path, evaluations: Sequence[Path] = ()) -> None:
        self.steps = lineage(path)
        self.target = self.steps[-1]
        self.evaluations = evaluations
        self.unknown: list[str] = []

    def text(self) -> str:
        """Front matter and sections."""
        story = (self._head, self._use, self._lineage, self._sources, self._processing, self._tokenizer, self._training, self._evaluation, self._parity, self._unknowns)
        sections = [list(section()) for section in story]
        body = "\n\n".join("\n".join(lines).rstrip("\n") for lines in sections if lines)
        return _clean(f"---\n{_yaml(self._front())}---\n{MARK}\n\n{body}\n", self._places())

    def _of(self, *stages: str) -> list[Step]:
        return [s for s in self.steps if s.stage in stages]

    def _base(self) -> Step | None:
        return next(iter(self._of("data.model")), None)

    def _facts(self) -> dict[str, Any]:
        """Kind, architecture and parameters: of the nearest step that states them."""
        facts: dict[str, Any] = {}
        for step in reversed(self.steps):
            for name in ("kind", "architecture", "dtype", "quantize", "bits"):
                if step.stats.get(name) is not None:
                    facts.setdefault(name, step.stats[name])
            parameters = step.stats.get("parameters") or step.stats.get("params")
            if parameters:
                facts.setdefault("parameters", parameters)
        return facts

    def _files(self) -> list[str]:
        return [o["path"] for o in self.target.manifest["outputs"]]

    # --- front matter -----------------------------------------------------------------------------------------------------------------------

    def _front(self) -> dict[str, Any]:
        gguf = any(name.endswith(".gguf") for name in self._files())
        front: dict[str, Any] = {"library_name": "gguf" if gguf else "peft" if "adapter_config.json" in self._files() else "transformers"}
        task = _TASKS.get(str(self._facts().get("kind")))
        if task:
            front["pipeline_tag"] = task
        front["tags"] = ["self-model-sop", *dict.fromkeys(s.stage.replace(".", "-") for s in self.steps if s.stage.startswith(("train.", "tokenizer.extend", "infer.")))]
        base = self._base()
        if base and _is_hub_id(base.stats.get("source")):
            front["base_model"] = base.stats["source"]
        datasets = [s.stats["source"] for s in self._of("data.fetch") if _is_hub_id(s.stats.get("source")) and "/" in s.stats["source"]]
        if datasets:
            front["datasets"] = list(dict.fromkeys(datasets))
        licence = next((found.licence for found in self._licences() if found.of == "base model"), UNKNOWN)
        if licence.lower() in _LICENCES or licence == UNKNOWN:
            front["license"] = licence.lower()
        else:
            front |= {"license": "other", "license_name": licence}
        return front

    # --- sections ---------------------------------------------------------------------------------------------------------------------------

    def _head(self) -> Iterator[str]:
        facts = self._facts()
        yield f"# {_text(self.target.found.target.group or self.target.found.target.folder.name)}"
        yield ""
        size = sum(o["size"] for o in self.target.manifest["outputs"])
        parameters = f"{facts['parameters']:,} parameters" if "parameters" in facts else "parameters unknown"
        weights = [f"weights: {facts[name]}" for name in ("quantize", "bits", "dtype") if name in facts][:1]
        yield "; ".join([str(facts.get("architecture", "architecture unknown")), parameters, *weights, f"{size / 1e6:,.1f} MB"]) + "."
        made = self.target.manifest
        yield f"Made by `{made['stage']}` of self-model-sop {made['code']['package']} on {made['started'][:10]}; contents `{content_hash(made)[:16]}`."

    def _use(self) -> Iterator[str]:
        yield "## Use"
        yield ""
        yield "```sh"
        if any(name.endswith(".gguf") for name in self._files()):
            yield "sop infer serve --model FILE.gguf          # an OpenAI-compatible API on a CPU; ollama create NAME -f Modelfile for Ollama"
        else:
            yield "sop infer chat --model FOLDER              # in the terminal"
            yield "sop infer vllm --model FOLDER              # an OpenAI-compatible API on a GPU"
        yield "```"

    def _lineage(self) -> Iterator[str]:
        yield "## Lineage"
        yield ""
        rows = []
        for step in self.steps:
            made_from = [s.name for s in step.sources] + [p.name for _, p, _ in step.raw]
            day, contents = step.manifest["started"][:10], f"`{content_hash(step.manifest)[:12]}`"
            rows.append((step.name, f"`{step.stage}`", ", ".join(made_from) or step.stats.get("source", "-"), day, contents))
        yield from _table(("artifact", "made by", "from", "date (UTC)", "contents"), rows)
        libraries = self.target.manifest.get("libraries", {})
        if libraries:
            yield ""
            versions = ", ".join(f"{name} {version}" for name, version in sorted(libraries.items()))
            yield f"Libraries of the last step: {versions}; device: {self.target.manifest.get('device', UNKNOWN)}."

    def _licences(self) -> list[Licence]:
        """Of everything that came from outside."""
        from ..report.gather import licence_of

        found = []
        for step in self._of("data.model", "data.fetch"):
            of = "base model" if step.stage == "data.model" else "data"
            commit = step.stats.get("commit")
            source = _name(str(step.stats.get("source", UNKNOWN))) + (f" at {commit}" if commit else "")
            for _, path, entry in step.raw:
                found.append(Licence(of, (licence_of(path) if path.exists() else "") or UNKNOWN, source, entry["sha256"], entry["size"]))
            if not step.raw:
                found.append(Licence(of, str(step.stats.get("licence") or UNKNOWN), source, content_hash(step.manifest), 0))
        for step in self.steps:
            if step.stage not in ("data.model", "data.fetch"):
                for _, path, entry in step.raw:
                    found.append(Licence("other input", (licence_of(path) if path.exists() else "") or UNKNOWN, path.name, entry["sha256"], entry["size"]))
        return list(dict.fromkeys(found))

    def _sources(self) -> Iterator[str]:
        yield "## Sources and licences"
        yield ""
        found = self._licences()
        if not found:
            self.unknown.append("where the base model and the data came from: no manifest of `data.model` or `data.fetch` is at hand")
            yield "No manifest at hand names a source."
            return
        for item in found:
            if item.licence == UNKNOWN:
                self.unknown.append(f"the licence of {_name(item.source)}")
        rows = [(item.of, _name(item.source), item.licence, f"{item.size:,}" if item.size else "-", f"`{item.sha256[:16]}`") for item in found]
        yield from _table(("what", "source", "licence", "bytes", "sha256"), rows)
        yield ""
        yield "Licences are those that the sources state; which terms the model is under is for its publisher to say."

    def _processing(self) -> Iterator[str]:
        rows = []
        for step in self._of("data.process", "data.preference"):
            for name, counts in sorted((step.stats.get("sets") or {}).items()):
                dropped = ", ".join(f"{reason} {n:,}" for reason, n in sorted(counts.get("dropped", {}).items())) or "-"
                unreadable = counts.get("quarantined", 0)
                unreadable = sum(unreadable.values()) if isinstance(unreadable, dict) else unreadable
                numbers = [_number(counts.get(key)) for key in ("total", "kept", "train", "validation")]
                rows.append((name, *numbers[:2], dropped, _number(unreadable), *numbers[2:]))
        if rows:
            yield "## Data processing"
            yield ""
            yield from _table(("set", "rows", "kept", "dropped", "unreadable", "training", "validation"), rows)
            masked = {kind: n for step in self._of("data.process") for kind, n in sorted((step.stats.get("pii") or {}).items())}
            yield ""
            yield "Personal data masked: " + (", ".join(f"{kind} {n:,}" for kind, n in masked.items()) or "none found") + "."

    def _tokenizer(self) -> Iterator[str]:
        extended = next(iter(reversed(self._of("tokenizer.extend"))), None)
        if extended is None:
            return
        s = extended.stats
        resized = next(iter(reversed(self._of("tokenizer.resize"))), None)
        yield "## Tokenizer"
        yield ""
        rows = [("tokens of the base", _number(s.get("base_tokens"))), ("tokens added", _number(s.get("tokens"))), ("method", str(s.get("method", UNKNOWN)))]
        if "tokens_per_char_before" in s and "tokens_per_char_after" in s:
            rows.append(("tokens for a character of held-out text", f"{s['tokens_per_char_before']:.3f} -> {s['tokens_per_char_after']:.3f} ({s.get('reduction', 0):.1%} fewer)"))
        if resized:
            before, after = (_number(resized.stats.get(f"rows_{when}")) for when in ("before", "after"))
            rows.append(("embedding rows", f"{before} -> {after}, new ones: {resized.stats.get('init', UNKNOWN)}"))
        yield from _table(("what", "value"), rows)

    def _training(self) -> Iterator[str]:
        trainings = [s for s in self.steps if s.stage.startswith("train.") and "steps" in s.stats]
        for i, step in enumerate(trainings):
            if not i:
                yield "## Training"
                yield ""
            s = step.stats
            yield f"### {step.name} (`{step.stage}`)"
            yield ""
            batch = s.get("batch") or {}
            rows = [("steps", _number(s.get("steps"))), ("tokens", _number(s.get("tokens"))), ("trainable parameters", _number((s.get("trainable") or {}).get("trainable")))]
            if batch:
                rows.append(("batch", f"{batch.get('per_device')} x {batch.get('accumulation')} x {batch.get('processes')} process(es)"))
            rows += [("precision", str(s.get("precision", UNKNOWN))), ("loss, first -> last", _change(s.get("train_loss_first"), s.get("train_loss_last")))]
            rows += [("held-out loss, before -> after", _change(s.get("eval_loss_before"), s.get("eval_loss_after"))), ("seconds", _number(s.get("train_seconds")))]
            yield from _table(("what", "value"), rows)
            yield ""
            yield "```yaml"
            yield _yaml({k: v for k, v in redact_tree(step.manifest["config"]).items() if v is not None and not k.startswith("huggingface.")}).rstrip("\n")
            yield "```"
            yield ""

    def _evaluation(self) -> Iterator[str]:
        rows = list(dict.fromkeys(self._measured()))
        if not rows:
            self.unknown.append("how good the model is: no evaluation of it is at hand")
            return
        yield "## Evaluation"
        yield ""
        yield from _table(("model", "set", "measure", "value"), rows)

    def _measured(self) -> Iterator[tuple[str, str, str, str]]:
        """Rows of the evaluations that measured it or what it was made of."""
        places = {s.found.target.folder.absolute(): s.name for s in self.steps if s.found.target.group is None}
        for item in self._near():
            assert item.manifest is not None
            names = {}
            for label, entry in item.manifest["inputs"].items():
                path = runs.moved(Path(entry["path"]), item).absolute()
                if label.startswith("model ") and path in places and hash_input(path, entry)["sha256"] == entry["sha256"]:
                    names[label.removeprefix("model ")] = places[path]
            stats = item.manifest["stats"]
            for model, place in sorted(names.items(), key=lambda pair: list(places.values()).index(pair[1])):
                for name, bits in sorted((stats.get("bits") or {}).get(model, {}).items()):
                    yield place, name, "bits per byte", f"{bits['bits_per_byte']:.4f} ({_number(bits.get('bytes'))} bytes)"
                for name, exam in sorted((stats.get("exams") or {}).get(model, {}).items()):
                    yield place, name, "accuracy", f"{exam['accuracy']:.1%} [{exam['low']:.1%}, {exam['high']:.1%}] of {_number(exam.get('total'))}"

    def _near(self) -> list[runs.Found]:
        """Evaluations beside the artifacts of the lineage, in the project's runs/, and below the folders that were named."""
        found = {f.target.manifest.absolute(): f for folder in self.evaluations for f in runs.find(folder) if f.manifest}
        folders = [s.found.target.folder.absolute() for s in self.steps]
        for beside in sorted({*(folder.parent for folder in folders), *(project_root(folder) / "runs" for folder in folders)}):
            for file in sorted(beside.glob("*/manifest.json")):
                manifest = runs.read_ours(file)
                if manifest:
                    found.setdefault(file, runs.Found(Target(file.parent), manifest))
        return sorted((f for f in found.values() if f.manifest and f.manifest["stage"].startswith("eval.")), key=lambda f: str(f.target))

    def _parity(self) -> Iterator[str]:
        rows = []
        for step in self.steps:
            found = step.stats.get("parity")
            if isinstance(found, dict) and "kl" in found:
                bits = found.get("bits_per_byte") or {}
                shown = f"{bits['source']:.4f} -> {bits['export']:.4f}" if {"source", "export"} <= set(bits) else UNKNOWN
                allowed = "published although out of bounds" if found.get("allowed") else "within bounds"
                rows.append((step.name, f"{found['agreement']:.2%} of {_number(found.get('answer_tokens'))}", f"{found['kl']:.1e}", shown, allowed))
        if rows:
            yield "## Parity with what was trained"
            yield ""
            yield from _table(("artifact", "greedy tokens that agree", "KL divergence, nats", "bits per byte, before -> after", "verdict"), rows)
        elif self.target.stage.startswith("infer."):
            self.unknown.append("whether the export answers as the trained model does: no parity report is at hand")

    def _unknowns(self) -> Iterator[str]:
        for step in self.steps:
            self.unknown += [f"{step.name}: {what} since it was made" for what in differences(step.found.target, step.manifest)]
            self.unknown += [f"{step.name}: its input {_name(name)} is gone or changed" for name in step.changed]
        yield "## Not known"
        yield ""
        yield from (f"- {_text(line)}" for line in dict.fromkeys(self.unknown))
        yield "- what the model does beyond what is measured above: no test of safety, bias or truthfulness is part of this card"

    def _places(self) -> list[str]:
        """Paths of this machine, and of those where the steps ran: none may be in the card."""
        there = [str(place) for s in self.steps for place in (s.manifest.get("folder", ""), s.found.target.folder.absolute())]
        return sorted({str(Path.home()), str(Path.cwd()), *there} - {"", "/"}, key=len, reverse=True)


def _is_hub_id(source: Any) -> bool:
    return isinstance(source, str) and not source.startswith("package:") and bool(_HUB_ID.match(source)) and not Path(source).exists()


def _name(source: str) -> str:
    """A source without the folders of a machine."""
    return Path(source).name if source.startswith(("/", "~", ".")) or "\\" in source else source


def _number(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if isinstance(value, float) else str(value)


def _change(before: Any, after: Any) -> str:
    return " -> ".join("not measured" if v is None else f"{v:.4f}" for v in (before, after)) if (before, after) != (None, None) else "not measured"


def _text(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(_text(_name(str(cell))) for cell in row)} |" for row in rows)


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, allow_unicode=True, sort_keys=False, width=1000)
    return text


def _clean(text: str, places: Sequence[str]) -> str:
    """Without secrets and without paths of a machine."""
    for place in places:
        text = text.replace(place, Path(place).name)
    return redact(_PATH.sub(lambda m: Path(m[0].rstrip("\\/").replace("\\", "/")).name, text))


# --- the command --------------------------------------------------------------------------------------------------------------------------


def write(path: Path, output: Path | None = None, evaluations: Sequence[Path] = ()) -> Path:
    """Write the card; returns where it is. `evaluations`: folders in which to look for measurements, beside the usual ones.

    Raises:
        SopError: where a file that this command did not write stands there.
    """
    card = Card(path, evaluations)
    target = output or _default(card.target.found.target)
    if target.exists() and MARK not in target.read_text(encoding="utf-8", errors="replace"):
        raise SopError("a file that `sop card` did not write is here", where=display(target), fix="move it, or choose another with -o")
    write_atomic(target, card.text())
    return target


def _default(target: Target) -> Path:
    return target.folder / (f"{target.group}.README.md" if target.group else "README.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def work() -> int:
        parser = argparse.ArgumentParser(prog="sop card", description="write the model card of an artifact from the manifests of its lineage", allow_abbrev=False)
        parser.add_argument("path", type=Path, help="folder of a model (or of any artifact), or a file that belongs to one")
        parser.add_argument("-o", "--output", type=Path, help="the card; default: README.md in the artifact's folder")
        parser.add_argument("--evaluations", type=Path, nargs="+", default=[], metavar="FOLDER", help="where evaluations of it lie, where that is not beside the artifacts")
        parser.add_argument("--check", action="store_true", help="write nothing; exit 3 where the card there is not the one that the manifests give")
        args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
        if not args.path.exists():
            raise SopError("no such file or folder", where=display(args.path))
        if args.check:
            return check(args.path, args.output, args.evaluations)
        card = write(args.path, args.output, args.evaluations)
        console.say(f"{display(card)}: {len(lineage(args.path))} artifacts in its lineage")
        return errors.OK

    return guarded(work)


def check(path: Path, output: Path | None = None, evaluations: Sequence[Path] = ()) -> int:
    """Whether the card there is the one that the manifests give.

    Raises:
        SopError: where there is none, or another (exit code 3).
    """
    card = Card(path, evaluations)
    target = output or _default(card.target.found.target)
    there = target.read_text(encoding="utf-8") if target.exists() else None
    if there != card.text():
        raise SopError("no card is here" if there is None else "the card is not the one that the manifests give", where=display(target), fix="run sop card again", code=DATA)
    console.say(f"{display(target)}: as the manifests say")
    return errors.OK
