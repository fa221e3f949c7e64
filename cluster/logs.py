"""Logs: one format for all our processes, on standard error."""

from __future__ import annotations

import logging
import sys

__all__ = ["configure"]

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
_NOISY = ("ray.serve", "httpx", "grpc", "filelock", "urllib3")
_OURS = ("cluster", "workers", "scheduler")


def configure(level: str) -> None:
    """`level` applies to our own packages; of libraries only warnings are kept."""
    handler = logging.StreamHandler(sys.__stderr__)  # Serve puts a filter of its own in place of sys.stderr
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())
