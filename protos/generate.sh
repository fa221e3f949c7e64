#!/usr/bin/env bash
# Writes the Python stubs beside the .proto files. With --check, fails where the committed ones are stale.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
PATH="$(cd "$(dirname "$(command -v "$python")")" && pwd):$PATH"
out=.
if [ "${1:-}" = --check ]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
fi
files=$(find protos -name '*.proto' | LC_ALL=C sort)
# shellcheck disable=SC2086
"$python" -m grpc_tools.protoc -I. --python_out="$out" --grpc_python_out="$out" \
    --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" $files
if [ "$out" != . ]; then
    status=0
    for stub in $(cd "$out" && find protos -type f); do
        cmp -s "$out/$stub" "$stub" || { echo "stale stub: $stub; run protos/generate.sh" >&2; status=1; }
    done
    exit $status
fi
