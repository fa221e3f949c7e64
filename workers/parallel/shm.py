"""DeepSpeed's shared-memory all-reduce: where it is safe, and the proof that it runs.

The op reduces over the whole world it was initialised with, in every process once and for good; it busy-waits for
its peers without a time limit, and crashes where its buffers are missing. So it is used only where the world is
one tensor group on one host, for a process's first group, after every rank has found that it can; and its buffers
are looked up in this process's own memory map, which no setting can fake.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from workers.parallel.build import library_path

__all__ = [
    "Buffer",
    "crowding",
    "forbid_op",
    "mapped_buffers",
    "mark",
    "obstacle",
    "offer_op",
    "release_waiters",
    "unlink",
]

_OP = "deepspeed_shm_comm"
_FOLDER = Path("/dev/shm")  # noqa: S108 -- the op's own place
_BUFFER_NAME = "deepspeed_allreduce_buffer"
_BUFFER_BYTES = 2 * (1 << 20) + 2 * (32 << 20) + (1 << 12)  # shm.cpp: struct allreduce_workspace, rounded up


@dataclass(frozen=True, slots=True)
class Buffer:
    """One rank's buffer as mapped here; it begins with the two states that its peers wait for."""

    path: Path
    address: int


def mark(name: str) -> Path:
    """A file by which ranks find out whether they share memory."""
    return _FOLDER / f"shoal-{name}"


def crowding(num_threads: int) -> str | None:
    """Why the op would be slow here, or None: a rank that waits takes a core from the rank that it waits for."""
    num_cores = len(os.sched_getaffinity(0))
    return f"{num_threads} threads for {num_cores} cores" if num_threads > num_cores else None


def obstacle(world_size: int, dtype: str) -> str | None:
    """Why this process cannot use the op, or None where it can."""
    if platform.system() != "Linux":
        return "shared memory needs Linux"
    if library_path() is None:
        return "shared memory is not compiled: run python -m workers.parallel.build"
    if mapped_buffers():
        return "shared memory serves a process's first group only"
    needed = "avx2" if dtype == "float32" else "avx512bw"
    if platform.machine() == "x86_64" and not _cpu_has(needed):
        return f"shared memory needs {needed} for {dtype}"
    free_bytes = os.statvfs(_FOLDER).f_bavail * os.statvfs(_FOLDER).f_frsize
    if free_bytes < world_size * _BUFFER_BYTES:
        return f"{_FOLDER} has {free_bytes >> 20} MiB, and {world_size * _BUFFER_BYTES >> 20} are needed"
    return None


def _cpu_has(flag: str) -> bool:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return any(flag in line.split() for line in lines if line.startswith("flags"))


def offer_op() -> None:
    """Hands DeepSpeed the compiled op, so that it neither compiles nor waits for a lock."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    path = library_path()
    assert path is not None
    OpBuilder._loaded_ops[_OP] = _load(path)
    _decide(use=True)


def forbid_op() -> None:
    _decide(use=False)


def _decide(*, use: bool) -> None:
    """Answers DeepSpeed's question which ops fit; left to itself it runs the compiler to find out."""
    import deepspeed.ops

    compatible: dict[str, Any] = defaultdict(bool)
    compatible[_OP] = use
    deepspeed.ops.__compatible_ops__ = compatible


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_OP, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mapped_buffers() -> list[Buffer]:
    """The op's buffers in this process's memory: one per rank of its world once it is initialised."""
    buffers = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if _BUFFER_NAME in line:
            span, _, offset, _, _, path = line.split(maxsplit=5)
            if int(offset, 16) == 0:
                buffers.append(Buffer(Path(path.removesuffix(" (deleted)")), int(span.partition("-")[0], 16)))
    return buffers


def unlink(rank: int) -> None:
    """Frees this rank's buffer at the end of the processes that map it, however they end."""
    for buffer in mapped_buffers():
        if buffer.path.name.endswith(f"_{rank}"):
            buffer.path.unlink(missing_ok=True)


def release_waiters(buffers: list[Buffer], rank: int, attempt: int) -> None:
    """Ends the wait of an all-reduce in this process whose peer is gone; its sums are then worthless.

    The op waits until a peer's state has one of two values out of six; each attempt writes another.
    """
    for buffer in buffers:
        if not buffer.path.name.endswith(f"_{rank}"):
            states = (ctypes.c_int * 2).from_address(buffer.address)
            states[0] = states[1] = attempt % 6
