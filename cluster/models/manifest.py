"""What a pulled folder must hold: written last, checked at every use."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cluster.models.errors import ModelError

__all__ = ["NAME", "verify", "write"]

NAME = "shoal-manifest.json"


def write(folder: Path, source: str) -> None:
    """Records the size and the SHA-256 of every file in `folder`."""
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    text = json.dumps({"source": source, "files": files}, indent=2) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def verify(folder: Path, *, contents: bool) -> None:
    """Checks that every file is there in its full size and, with `contents`, with the bytes that were written.

    Raises ModelError.
    """
    try:
        files = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        raise ModelError(f"{folder} has no readable {NAME}; delete the folder and pull the model again") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["size_bytes"]:
            raise ModelError(f"{path} is missing or cut short; delete the folder and pull the model again")
        if contents and _sha256(path) != expected["sha256"]:
            raise ModelError(f"{path} is not what was pulled; delete the folder and pull the model again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
