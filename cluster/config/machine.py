"""What this machine has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Machine", "this_machine"]

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One machine, or the smallest of a cluster. `fast_bfloat16` is whether the CPU multiplies bfloat16 itself."""

    cores: int
    memory_bytes: int
    free_bytes: int
    gpus: int
    fast_bfloat16: bool


def this_machine() -> Machine:
    """Cores and memory are those this process may use: its affinity and its container count."""
    memory = psutil.virtual_memory()
    limit = min((memory.total, *_cgroup_limits()))
    flags = _cpu_flags()
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=limit,
        free_bytes=min(memory.available, limit),
        gpus=len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        fast_bfloat16=bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
    )


def _cgroup_limits() -> list[int]:
    texts = [path.read_text().strip() for path in _CGROUP_LIMITS if path.is_file()]
    return [int(text) for text in texts if text.isdigit()]


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()  # not Linux: nothing is known, so nothing fast is assumed
    return frozenset(
        next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "").split()
    )
