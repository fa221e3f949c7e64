"""Compiles this package's own kernels, once, ahead: `python -m workers.kernels.build`.

A rank only loads what it finds; where nothing is found it computes with torch's operations and says so.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from workers.processor import instruction_sets

__all__ = ["BuildError", "build", "library_path", "main"]

_SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp") for name in ("native", "few_rows", "latent", "routing", "host_exchange")
)
_HEADERS = (Path(__file__).with_name("bfloat.h"),)
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-Wall", "-Wextra")
_COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT_S = 120.0


class BuildError(RuntimeError):
    """The kernels could not be compiled."""


def library_path() -> Path:
    """Where the compiled kernels are, or would be: beside the environment, a file for each text and processor."""
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in (*_SOURCES, *_HEADERS)))
    digest.update("\0".join((instruction_sets(), *_FLAGS)).encode())
    return Path(sys.prefix) / "share" / "shoal" / f"kernels-{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Compiles unless that is done. Raises BuildError. Safe to call from several processes at once."""
    path = library_path()
    if path.is_file():
        return path
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler ({', '.join(_COMPILERS)}) was found")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            linked = Path(folder, "kernels.so")
            compiled = [str(Path(folder, f"{source.stem}.o")) for source in _SOURCES]
            for source, target in zip(_SOURCES, compiled, strict=True):
                _run(compiler, *_FLAGS, "-c", str(source), "-o", target)
            # Not linked against OpenMP: its functions must be those of torch's library, which has them all loaded.
            _run(compiler, "-shared", *compiled, "-o", str(linked), "-lm")
            os.replace(linked, path)
    except OSError as error:
        raise BuildError(f"{path.parent}: {error}") from error
    return path


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)  # noqa: S603 -- ours
    except subprocess.CalledProcessError as error:
        raise BuildError(error.stderr.strip() or f"{command[0]} ended with {error.returncode}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"stopped after {_TIMEOUT_S:g} s") from error


def main() -> int:
    try:
        sys.stderr.write(f"  compiled: {build()}\n")
    except BuildError as error:
        sys.stderr.write(f"  {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
