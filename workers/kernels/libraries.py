"""Which GPU libraries are installed: looked up once, without importing them, and named in `shoal status`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

__all__ = ["Library", "found"]

# Module and distribution, by what they are used for here.
_KNOWN = {
    "flash-attn": ("flash_attn", "flash-attn"),  # prompts
    "triton": ("triton", "triton"),  # decoding from the paged cache
    "FlashMLA": ("flash_mla", "flash_mla"),  # decoding from the paged cache of latents
    "DeepGEMM": ("deep_gemm", "deep_gemm"),  # linear layers on FP8 weights
    "DeepEP": ("deep_ep", "deep_ep"),  # expert dispatch
}


@dataclass(frozen=True, slots=True)
class Library:
    """`version` is empty where the distribution does not tell it."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}".rstrip()


@cache
def found() -> dict[str, Library]:
    """The libraries that this process could import, by name."""
    return {name: Library(name, _version(package)) for name, (module, package) in _KNOWN.items() if find_spec(module)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
