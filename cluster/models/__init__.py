"""Models by name: which there are, where they come from, and whether a folder can be served."""

from __future__ import annotations

from cluster.models.errors import ModelError
from cluster.models.resolve import pull, resolve

__all__ = ["ModelError", "pull", "resolve"]
