"""A trained model -> GGUF for llama.cpp and Ollama: llama.cpp's own converter and quantiser, and nothing published that answers differently from its source."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import Target
from ..config import option, project_root
from ..console import note
from ..stage import Artifact, Run, Stage, stage_main
from ..train.adapters import new_rows
from . import exported, llama_cpp, modelfile, parity
from .parity import Bound, Kind, Parity

DIRECT = ("f32", "f16", "bf16", "q8_0")  # what the converter writes by itself; the rest is the quantiser's
_KINDS: dict[str, Kind] = {
    "f32": "f32", "f16": "f16", "bf16": "bf16", "q8_0": "q8", "q6_k": "q5", "q5_k_m": "q5", "q5_k_s": "q5", "q5_0": "q5", "q5_1": "q5",
    "q4_k_m": "q4", "q4_k_s": "q4", "q4_0": "q4", "q4_1": "q4", "iq4_nl": "q4", "iq4_xs": "q4",
    "q3_k_l": "low", "q3_k_m": "low", "q3_k_s": "low", "iq3_m": "low", "iq3_s": "low", "iq3_xs": "low", "iq3_xxs": "low",
    "q2_k": "low", "q2_k_s": "low", "iq2_m": "low", "iq2_s": "low", "iq2_xs": "low", "iq2_xxs": "low",
}  # fmt: skip
_NEEDS_IMPORTANCE = ("iq3_xxs", "iq3_xs", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs")  # llama.cpp refuses these without one
_SIZE = re.compile(r"[1-9]\d*[MG]")
_IMPORTANCE_WINDOW = 512


@dataclass(frozen=True, kw_only=True)
class Config:
    """`config/infer_config/gguf.yaml`."""

    model_path: Path = option(Path("self_model/checkpoints/merged"), "folder of a full model", path="input", flag="--model_path")
    output_path: Path | None = option(None, "the .gguf file, or a folder for it; none: exports/model-<quantize>.gguf", path="output", flag="--output_path")
    quantize: str = option("f16", "f32, f16, bf16, q8_0, q4_k_m and so on: llama.cpp's names", flag="--quantize")
    imatrix: Path | None = option(None, "text of yours: the columns that it uses are kept more exactly", path="input", flag="--imatrix")
    imatrix_tokens: int = option(20_000, "so many tokens of it")
    split_max_size: str | None = option(None, "numbered parts of at most this size, such as 4G", flag="--split_max_size")
    system: str | None = option(None, "system message of the Modelfile, for conversations without one")
    parameters: dict[str, float] = option(help="Ollama's parameters in the Modelfile; empty: those of `sop infer chat`", factory=dict)
    allow_divergence: bool = option(False, "publish also what is out of bounds, with that on record", flag="--allow_divergence")
    threads: int | None = option(None, "threads of llama.cpp; none: all cores", cosmetic=True)
    parity: Parity = option(factory=Parity)


def _target(config: Config) -> Target:
    path = config.output_path or project_root() / "exports" / f"model-{config.quantize}.gguf"
    return Target(path.parent, path.stem) if path.suffix == ".gguf" else Target(path)


def _names(config: Config) -> tuple[str, str, str]:
    """File names of the model, the parity report and the Modelfile."""
    group = _target(config).group
    return (f"{group}.gguf", f"{group}.{parity.REPORT}", f"{group}.Modelfile") if group else (f"model-{config.quantize}.gguf", parity.REPORT, "Modelfile")


def _preflight(config: Config) -> list[tuple[str, str, str]]:
    from ..errors import suggest

    found = []
    if config.quantize not in _KINDS:
        found.append(("quantize", f"no such kind: {config.quantize!r}", suggest(config.quantize, list(_KINDS), "kinds: " + ", ".join(_KINDS))))
    if config.split_max_size is not None and not _SIZE.fullmatch(config.split_max_size):
        found.append(("split_max_size", f"{config.split_max_size!r} is no size", "a number with M or G, such as 4G"))
    if config.quantize in _NEEDS_IMPORTANCE and config.imatrix is None:
        found.append(("imatrix", f"{config.quantize} is useless without an importance matrix", "name a text file of yours: --imatrix FILE"))
    if config.imatrix is not None and config.quantize in DIRECT:
        found.append(("imatrix", f"{config.quantize} does not use an importance matrix", "leave it out"))
    if config.model_path.is_dir():
        found += exported.misfits(config.model_path)
    return found


# --- building -------------------------------------------------------------------------------------------------------------------------------


def build(run: Run[Config]) -> dict[str, Any]:
    """Convert, quantise, compare; returns the stats.

    Raises:
        SopError: exit 3 where the export answers differently; exit 4 where llama.cpp is not set up.
    """
    from ..eval.models import open_model
    from ..train import setup
    from .torch_side import TorchSide, new_texts, reference_of

    setup.quiet()
    config = run.config
    llama_cpp.package()
    converter = llama_cpp.sources(project_root())
    scratch = run.work / ".scratch"
    scratch.mkdir()
    out = run.work / _names(config)[0]
    direct = config.quantize in DIRECT
    model, tokenizer = open_model(config.model_path)
    whole = out if direct else scratch / "whole.gguf"  # before the source is asked: what llama.cpp does not know it says at once
    kind = config.quantize if direct else _outtype(config.model_path)
    llama_cpp.convert(converter, config.model_path, whole, kind, base_tokenizer=without_new_tokens(config.model_path, scratch), split=config.split_max_size)
    source = TorchSide(model, tokenizer, "source")
    reference = reference_of(source, config.parity, scratch / "reference", new_texts(config.model_path, tokenizer))
    importance_tokens = 0 if direct else _quantised(config, source, _first_part(scratch, "whole"), out)
    renderer = source.renderer
    del model, source
    report = _compared(run, reference)
    shutil.rmtree(scratch)
    parts = sorted(p for p in run.work.iterdir() if p.suffix == ".gguf")
    if renderer is not None:
        modelfile.write(run.work / _names(config)[2], parts[0], renderer, system=config.system, parameters=config.parameters or None)
    return {
        "quantize": config.quantize, "files": [p.name for p in parts], "bytes": sum(p.stat().st_size for p in parts), "source_bytes": exported.weights_bytes(config.model_path),
        "importance_tokens": importance_tokens, "llama_cpp_python": llama_cpp.VERSION, "parity": parity.numbers(report),
    }  # fmt: skip


def _outtype(folder: Path) -> str:
    """The unquantised type that loses nothing of a model's weights."""
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {"bfloat16": "bf16", "float16": "f16"}.get(str(named.get("dtype") or named.get("torch_dtype")), "f32")


def _quantised(config: Config, source: Any, first: Path, out: Path) -> int:
    """The quantiser's work on an unquantised file (its first part); returns how many tokens the importance matrix comes from."""
    found: dict[str, Any] = {}
    tokens = 0
    if config.imatrix is not None:
        from .importance import importance

        sequences = _sequences(source, config)
        tokens = sum(map(len, sequences))
        note(f"importance of each column, over {tokens:,} tokens")
        found = importance(source.model, sequences, _architecture(first))
    llama_cpp.quantise(first, out.with_suffix("") if config.split_max_size else out, config.quantize, importance=found, keep_split=bool(config.split_max_size))
    return tokens


def _first_part(folder: Path, stem: str) -> Path:
    return sorted(folder.glob(f"{stem}*.gguf"))[0]


def _architecture(path: Path) -> str:
    import gguf

    field = gguf.GGUFReader(path).fields["general.architecture"]
    return str(field.contents())


def _sequences(source: Any, config: Config) -> list[list[int]]:
    """Token ids of the user's text, in pieces that fit into a window."""
    from ..eval.sets import documents

    assert config.imatrix is not None
    ids: list[list[int]] = []
    left = config.imatrix_tokens
    for text in documents(config.imatrix).items:
        encoded = source.encode([text], control=False)[0][:left]
        ids += [[*source.start(), *encoded[at : at + _IMPORTANCE_WINDOW]] for at in range(0, len(encoded), _IMPORTANCE_WINDOW)]
        left -= len(encoded)
        if left <= 0:
            break
    return ids


def _compared(run: Run[Config], reference: parity.Reference) -> dict[str, Any]:
    config = run.config
    window = max(*(len(a.prompt) + len(a.answer) for a in reference.asked), *(len(ids) for _, ids, _ in reference.texts))
    export = llama_cpp.LlamaSide(_first_part(run.work, Path(_names(config)[0]).stem), window, threads=config.threads)
    measured = parity.measure(reference, export, config.parity.margin)
    export.close()
    bound: Bound = getattr(config.parity.bounds, _KINDS[config.quantize])
    target = _target(config)
    fix = "nothing was published; a finer --quantize or an --imatrix keeps more, --allow_divergence publishes it with this on record"
    return parity.enforce(measured, bound, report=run.work / _names(config)[1], failed=target.hidden(parity.FAILED), allow=config.allow_divergence, fix=fix)


def without_new_tokens(model: Path, scratch: Path) -> Path | None:
    """A copy of a model's tokenizer with the appended tokens taken out again: what the base's was. None where there are none, or it has no merges.

    Appended merges never change the pre-tokenizer, which is all that the converter looks at.
    """
    rows = new_rows(model)
    data = json.loads((model / "tokenizer.json").read_text(encoding="utf-8")) if (model / "tokenizer.json").is_file() else {}
    if not rows or data.get("model", {}).get("type") != "BPE":
        return None
    vocabulary: dict[str, int] = data["model"]["vocab"]
    kept = {token: i for token, i in vocabulary.items() if i not in rows}
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in data["model"]["merges"])
    data["model"]["merges"] = [pair for pair in pairs if "".join(pair) in kept and all(p in kept for p in pair)]
    data["model"]["vocab"] = kept
    data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] not in rows]
    folder = scratch / "base_tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)
    return folder


# --- the stage ------------------------------------------------------------------------------------------------------------------------------------


def _plan(config: Config) -> list[str]:
    way = "written by llama.cpp's converter" if config.quantize in DIRECT else "converted unquantised, then by llama.cpp's quantiser"
    out = _target(config).folder / _names(config)[0]
    return [f"{config.model_path} -> {out} as {config.quantize}, {way}", f"compared on {config.parity.prompts} prompts x {config.parity.tokens} tokens"]


def _disk(config: Config) -> int:
    """The file, and where the quantiser writes it the unquantised one beside it."""
    return exported.weights_bytes(config.model_path) * (1 if config.quantize in DIRECT else 2)


def _summary(artifact: Artifact) -> list[str]:
    stats = artifact.stats
    return [f"{', '.join(stats['files'])}: {stats['bytes'] / 2**20:,.0f} MiB (source {stats['source_bytes'] / 2**20:,.0f} MiB)", parity.line(stats["parity"])]


STAGE = Stage(
    name="infer.gguf", version=1, config=Config, output=_target, build=build, apart=True, disk=_disk, preflight=_preflight, plan=_plan, summary=_summary,
    inputs=lambda c: {"model": c.model_path, "imatrix": c.imatrix, "heldout": c.parity.heldout}, next=lambda c: f"sop infer serve model={_target(c).folder / _names(c)[0]}",
)  # fmt: skip


def run(config: Config) -> Artifact:
    """Export (or find it up to date).

    Raises:
        SopError: with the exit code of the process.
    """
    return STAGE.run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """`sop infer gguf`"""
    return stage_main(STAGE, argv)


