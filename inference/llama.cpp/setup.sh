#!/usr/bin/env bash
# Fetch llama.cpp (the source distribution of its Python package), compile the package into the active environment, and unpack the converter beside this script.
# Needs a C++ compiler and cmake's build tools (pip brings cmake and ninja); some minutes on 2 cores. Run it again: what is there is kept.
#
#   bash inference/llama.cpp/setup.sh [--converter-only]
#
# The environment: PYTHON, else the project's .venv (where `uv run` works), else `python`. The compiled wheel is kept below the download, one for each CMAKE_ARGS, for the next environment.
# CMAKE_ARGS="-DGGML_CUDA=on" compiles for a GPU.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
version=0.3.36
venv="$here/../../.venv/bin/python"
python="${PYTHON:-$([ -x "$venv" ] && echo "$venv" || echo python)}"
sources="$here/llama.cpp"

if command -v uv > /dev/null && ! "$python" -m pip --version > /dev/null 2>&1; then
    pip() { uvx --quiet pip "$@"; } # an environment made by uv has no pip of its own
else
    pip() { "$python" -m pip "$@"; }
fi

if [ ! -f "$here/downloads/llama_cpp_python-$version.tar.gz" ]; then
    mkdir -p "$here/downloads"
    pip download --quiet --no-deps --no-binary :all: --dest "$here/downloads" "llama-cpp-python==$version"
fi
if [ ! -f "$sources/convert_hf_to_gguf.py" ]; then
    rm -rf "$sources.part" && mkdir -p "$sources.part"
    tar -xzf "$here/downloads/llama_cpp_python-$version.tar.gz" -C "$sources.part" --strip-components=3 \
        "llama_cpp_python-$version/vendor/llama.cpp/"{convert_hf_to_gguf.py,conversion,gguf-py,LICENSE}
    mv "$sources.part" "$sources"
fi
[ "${1:-}" != --converter-only ] || exit 0

if "$python" -c "import llama_cpp; assert llama_cpp.__version__ == '$version'" 2> /dev/null; then
    echo "llama-cpp-python $version is installed"
    exit 0
fi
wheels="$here/downloads/wheels-$(printf %s "${CMAKE_ARGS:-}" | cksum | cut -d " " -f 1)"  # one compiled for a GPU is no other
mkdir -p "$wheels"
wheel() { find "$wheels" -name "llama_cpp_python-$version-*.whl" | head -n 1; }
if [ -z "$(wheel)" ]; then
    # only what is used: no image models, no command-line tools, no server, and not the library that those share (half of the compiling)
    build="$(mktemp -d)"
    trap 'rm -rf "$build"' EXIT
    tar -xzf "$here/downloads/llama_cpp_python-$version.tar.gz" -C "$build" --strip-components=1
    sed -i.orig 's/set(LLAMA_BUILD_COMMON ON /set(LLAMA_BUILD_COMMON OFF /' "$build/CMakeLists.txt"
    export CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF ${CMAKE_ARGS:-}"
    export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN)}"
    pip wheel --quiet --no-deps --wheel-dir "$wheels" "$build"
fi
if command -v uv > /dev/null; then
    uv pip install --quiet --python "$("$python" -c 'import sys; print(sys.executable)')" "$(wheel)"
else
    pip install --quiet "$(wheel)"
fi
