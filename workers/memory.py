"""How much memory a rank may take: what the device has free, and on a CPU what the control group still allows."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

__all__ = ["free_bytes"]

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, *_cgroup_free(_CGROUP_ROOT, Path("/proc/self/cgroup")))


def _cgroup_free(root: Path, membership: Path) -> list[int]:
    """What each control group above this process still allows; empty-handed groups count as huge."""
    free = [2**63]
    for folder in _cgroups(root, membership):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            free.append(max(0, limit - used + _reclaimable(folder / "memory.stat")))
    return free


def _cgroups(root: Path, membership: Path) -> list[Path]:
    """The process's memory control groups and their parents (versions 2 and 1)."""
    folders = []
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root if not controllers else root / "memory" if "memory" in controllers.split(",") else None
        if base is not None:
            folder = base / path.lstrip("/")
            folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(base))]
    return folders


def _number(path: Path) -> int | None:
    """The number in the file; None where there is no such file or it says "max"."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(path: Path) -> int:
    """Page cache of files that the kernel drops when memory is short: usage counts it, need does not."""
    try:
        fields = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
    except OSError:
        return 0
    return int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))
