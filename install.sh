#!/usr/bin/env bash
# Creates .venv and installs the tested set into it. Safe to repeat; an interrupted run is continued.
#   ./install.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")"

# The first Python of at least 3.11 among the one that was asked for and the usual names.
python=
for candidate in "${1:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "shoal needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
    exit 1
fi

# A folder without pip is what a failed `venv` leaves behind.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
torch=$(grep '^torch==' constraints.txt)
echo "[1/4] $torch (set PIP_EXTRA_INDEX_URL to choose a CPU-only or another CUDA build)"
pip install -c constraints.txt pip "$torch"
echo "[2/4] shoal and what it needs"
pip install -c constraints.txt -e '.[dev,load]'
echo "[3/4] kernels of its own (compiled for this processor)"
.venv/bin/python -m workers.kernels.build || echo "not built: torch's operations serve (shoal status says so)" >&2
echo "[4/4] DeepSpeed's shared-memory collective (compiled once)"
.venv/bin/python -m workers.parallel.build || echo "not built: ranks will use gloo (shoal status says so)" >&2
