#!/usr/bin/env bash
# Serve a trained model on a GPU through vLLM: checks it, starts it, waits for a real answer.
#   SOP_API_KEY=... bash inference/vllm/run_vllm.sh FOLDER [--adapter ADAPTER] [--engine compose] [key=value ...]
# The same as `sop infer vllm --model FOLDER --run`; without --run that command prints what it would start.
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
if [ -z "${SOP_API_KEY:-}" ]; then
  SOP_API_KEY=$(python3 -c 'import secrets; print(secrets.token_urlsafe(24))')
  export SOP_API_KEY
  if [ -t 2 ]; then
    printf 'API key, shown once: %s\n' "$SOP_API_KEY" >&2
  else
    echo "error: SOP_API_KEY is not set, and a fresh key is only shown on a terminal" >&2
    exit 2
  fi
fi
model=$1
shift
exec sop infer vllm --model "$model" --run "$@"
