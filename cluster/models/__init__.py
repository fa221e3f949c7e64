"""Models by name: which there are, where they come from, and whether a folder can be served."""

from __future__ import annotations
