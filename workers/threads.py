"""One team of compute threads in the process: that of the step loop.

OpenMP keeps a team for every thread that has ever run a parallel operation, for as long as that thread lives. Once
the teams together have more threads than the machine has cores, it no longer spins at barriers but sleeps, in all
of them: on two cores a decode step takes twice as long. So what computes beside the loop does it in a thread that
ends, and its team with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["in_passing_thread"]

T = TypeVar("T")


def in_passing_thread(work: Callable[[], T], name: str) -> T:
    """What `work` returns or raises, run in a thread that ends before this comes back."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # the caller's to handle, whatever it is
            errors.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
