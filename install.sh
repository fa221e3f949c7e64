#!/usr/bin/env bash
# Creates .venv and installs the tested set into it. Safe to repeat; an interrupted run is continued.
set -euo pipefail
cd "$(dirname "$0")"
python=${1:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "shoal needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
    exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
torch=$(grep '^torch==' constraints.txt)
echo "[1/3] $torch (set PIP_EXTRA_INDEX_URL to choose a CPU-only or another CUDA build)"
pip install -c constraints.txt "$torch"
echo "[2/3] shoal and what it needs"
pip install -c constraints.txt -e '.[dev,load]'
echo "[3/3] DeepSpeed's shared-memory collective (compiled once)"
.venv/bin/python -m workers.parallel.build || echo "not built: ranks will use gloo (shoal status says so)" >&2
