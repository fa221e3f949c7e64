"""What can go wrong before a model is served, in one line each."""

from __future__ import annotations

__all__ = ["ModelError"]


class ModelError(Exception):
    """The model cannot be had, or cannot be served as it is."""
