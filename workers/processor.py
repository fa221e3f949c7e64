"""What code that is compiled for this processor depends on."""

from __future__ import annotations

from pathlib import Path

__all__ = ["instruction_sets"]


def instruction_sets() -> str:
    """The kernel's line of what the processor can do; empty where it has none of that name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")
