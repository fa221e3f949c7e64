"""An engine's leader: places its ranks, brings them up, watches them, and starts them again."""

from __future__ import annotations
