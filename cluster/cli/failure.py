"""How a command fails: one line on standard error, and an exit code that says whose fault it was."""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["FAILURE", "USAGE", "fail"]

FAILURE = 1
USAGE = 2


def fail(message: object, code: int = FAILURE) -> NoReturn:
    """Ends the command."""
    for line in str(message).splitlines() or [""]:
        print(f"shoal: {line}", file=sys.stderr)
    raise SystemExit(code)
