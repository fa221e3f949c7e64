"""What a figure was taken on."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil

__all__ = ["describe_code", "describe_machine"]

_ROOT = Path(__file__).parents[1]
_PACKAGES = ("torch", "deepspeed", "ray", "grpcio", "transformers")
_GIB = 1 << 30


def describe_machine() -> str:
    """Processor, memory and system in a line."""
    memory_gib = psutil.virtual_memory().total / _GIB
    return f"{psutil.cpu_count()} x {_processor()}, {memory_gib:.0f} GiB, {platform.system()} {platform.release()}"


def describe_code() -> str:
    """Versions of Python and of what does the work, and this repository's commit."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"Python {platform.python_version()}, {packages}; commit {_commit()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    git = shutil.which("git")
    if git is None or not (_ROOT / ".git").exists():
        return "unknown"
    command = [git, "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603
