"""llama.cpp as the project uses it: its converter (a script of its sources), its quantiser and its runtime (the package llama-cpp-python).

One source distribution of that package holds all three; `inference/llama.cpp/setup.sh` fetches it, compiles it, and unpacks the converter.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DATA, ENVIRONMENT, SopError

if TYPE_CHECKING:
    import numpy as np

VERSION = "0.3.36"
SETUP = "bash inference/llama.cpp/setup.sh"
FOLDER_VARIABLE = "SOP_LLAMA_CPP"
_UNPACKED = Path("inference/llama.cpp/llama.cpp")


def package() -> Any:
    """The module `llama_cpp`.

    Raises:
        SopError: exit 4 where it is not installed or does not load.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        what = f"llama.cpp's Python package is not usable here: {str(error).splitlines()[0]}"
        raise SopError(what, fix=f"{SETUP} (compiles it once, some minutes)", code=ENVIRONMENT) from error
    return llama_cpp


def sources(root: Path) -> Path:
    """The folder with llama.cpp's converter: what SOP_LLAMA_CPP names, else where the set-up script unpacks it.

    Raises:
        SopError: exit 4 where it is not there.
    """
    folder = Path(os.environ.get(FOLDER_VARIABLE) or root / _UNPACKED)
    if not (folder / "convert_hf_to_gguf.py").is_file():
        raise SopError("llama.cpp's converter is not there", where=str(folder), fix=f"{SETUP}; or set {FOLDER_VARIABLE} to a folder with convert_hf_to_gguf.py", code=ENVIRONMENT)
    return folder


def convert(converter: Path, model: Path, out: Path, outtype: str, *, base_tokenizer: Path | None = None, split: str | None = None) -> None:
    """A Hugging Face folder -> GGUF in `f32`, `f16`, `bf16` or `q8_0`; with `split` (such as `4G`) in numbered parts.

    Raises:
        SopError: exit 3 with the converter's last words where it fails.
    """
    options = ["--outfile", str(out), "--outtype", outtype, *(["--split-max-size", split] if split else [])]
    command = [sys.executable, "-m", "self_model_sop.infer.converter", str(converter), str(base_tokenizer or ""), str(model), *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        raise SopError(f"llama.cpp's converter failed: {last[0]}", where=str(model), fix="is this architecture one that llama.cpp reads?", code=DATA)


def quantise(source: Path, out: Path, kind: str, *, importance: Mapping[str, np.ndarray] | None = None, keep_split: bool = False) -> None:
    """GGUF -> GGUF with k-quants and the like, by llama.cpp's own quantiser.

    Args:
        source: f32, f16 or bf16; of a split file the first part.
        out: the new file; with `keep_split` the name that the parts' numbers are added to.
        kind: `q4_k_m` and so on: a file type of llama.cpp.
        importance: GGUF name of a matrix -> mean squared input of each of its columns.

    Raises:
        SopError: exit 3 where it fails.
    """
    llama = package()
    said = quiet(llama)
    options = llama.llama_model_quantize_default_params()
    options.ftype = file_type(llama, kind)
    options.nthread = os.cpu_count() or 1
    options.keep_split = keep_split
    kept = _importance(llama, importance or {})
    if importance:
        options.imatrix = ctypes.cast(kept, ctypes.POINTER(llama.llama_model_imatrix_data))
    if llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)):
        raise SopError(f"llama.cpp's quantiser failed: {(said or ['no message'])[-1]}", where=str(source), fix="try another --quantize", code=DATA)


def file_type(llama: Any, kind: str) -> int:
    """llama.cpp's number of a file type."""
    for name in (f"LLAMA_FTYPE_MOSTLY_{kind.upper()}", f"LLAMA_FTYPE_ALL_{kind.upper()}"):
        if hasattr(llama, name):
            return int(getattr(llama, name))
    raise SopError(f"llama.cpp has no file type {kind!r}")


def _importance(llama: Any, importance: Mapping[str, np.ndarray]) -> Any:
    """The array of the C interface, ended by an empty name."""
    import numpy as np

    table = (llama.llama_model_imatrix_data * (len(importance) + 1))()
    table.values = [np.ascontiguousarray(v, dtype=np.float32) for v in importance.values()]  # kept alive with the table
    for entry, name, values in zip(table, importance, table.values, strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return table


_LOG: list[Any] = []


def quiet(llama: Any) -> list[str]:
    """llama.cpp's log goes into the list that is returned, warnings and errors only."""
    said: list[str] = []

    def take(level: int, text: bytes, _: Any) -> None:
        if level in (3, 4):  # GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR
            said.append(text.decode("utf-8", "replace").strip())

    _LOG[:] = [llama.llama_log_callback(take)]  # the C side holds a bare pointer to it
    llama.llama_log_set(_LOG[0], ctypes.c_void_p(0))
    return said


class LlamaSide:
    """A GGUF file in llama.cpp as one side of the parity gate.

    Args:
        path: the file; of a split one the first part.
        window: tokens of the longest sequence that will be asked.
    """

    def __init__(self, path: Path, window: int, *, threads: int | None = None) -> None:
        llama = package()
        said = quiet(llama)
        self.name, self._llama = path.name, llama
        try:
            self._model = llama.Llama(str(path), n_ctx=window, n_batch=window, n_ubatch=window, logits_all=True, verbose=False, n_threads=threads, n_threads_batch=threads)
        except (ValueError, OSError, AssertionError) as error:
            raise SopError(f"llama.cpp does not load it: {(said or [str(error)])[-1]}", where=str(path), code=DATA) from error

    def template(self) -> str | None:
        found = self._model.metadata.get("tokenizer.chat_template")
        return None if found is None else str(found)

    def vocabulary(self) -> int:
        return int(self._model.n_vocab())

    def encode(self, texts: Sequence[str], *, control: bool) -> list[list[int]]:
        return [list(self._model.tokenize(t.encode("utf-8"), add_bos=False, special=control)) for t in texts]

    def stops(self, token: int) -> bool:
        vocabulary = self._llama.llama_model_get_vocab(self._model.model)
        return bool(self._llama.llama_vocab_is_eog(vocabulary, token))

    def logits(self, ids: Sequence[int], first: int) -> np.ndarray:
        self._model.reset()
        self._model.eval(list(ids))
        table: np.ndarray = self._model.scores[first : len(ids)].copy()
        return table

    def close(self) -> None:
        """Give the memory back."""
        self._model.close()
