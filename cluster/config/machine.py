"""What this machine has."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Machine", "Node", "this_machine"]

_TOOL_TIMEOUT_S = 10.0
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One node of a cluster. `gpu_memory_bytes` is of each GPU; None: it could not be found out."""

    cores: int
    memory_bytes: int
    free_bytes: int
    gpus: int = 0
    gpu_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One machine; or of a cluster's `nodes` the least, with the GPUs of all. `fast_bfloat16` is whether the CPU
    multiplies bfloat16 itself. `notes` say what is assumed of nodes rather than known."""

    cores: int
    memory_bytes: int
    free_bytes: int
    gpus: int
    fast_bfloat16: bool
    gpu_memory_bytes: int | None = None
    nodes: tuple[Node, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def all_nodes(self) -> tuple[Node, ...]:
        """At least one."""
        return self.nodes or (
            Node(
                cores=self.cores,
                memory_bytes=self.memory_bytes,
                free_bytes=self.free_bytes,
                gpus=self.gpus,
                gpu_memory_bytes=self.gpu_memory_bytes,
            ),
        )


def this_machine() -> Machine:
    """Cores and memory are those this process may use: its affinity and its container count."""
    memory = psutil.virtual_memory()
    limit = min((memory.total, *_cgroup_limits()))
    flags = _cpu_flags()
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=limit,
        free_bytes=min(memory.available, limit),
        gpus=gpus,
        fast_bfloat16=bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        gpu_memory_bytes=_gpu_memory() if gpus else None,
    )


def _gpu_memory() -> int | None:
    """Bytes of the smallest GPU by the driver's own tool; None where it does not say. Not run on a GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=True)  # noqa: S603
        return min(int(line) for line in answer.stdout.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None  # the planner then asks for resources.gpu_memory


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
