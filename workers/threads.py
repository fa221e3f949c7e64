"""One team of compute threads in the process: that of the step loop.

OpenMP keeps a team for every thread that has ever run a parallel operation, for as long as that thread lives. Once
the teams together have more threads than the machine has cores, it no longer spins at barriers but sleeps, in all
of them: on two cores a decode step takes twice as long. So what computes beside the loop does it in a thread that
ends, and its team with it.

Such a thread can stand back behind those that serve, in this process or another: niceness belongs to threads, is
inherited by those that a thread starts, and cannot be taken back without privileges. So it must be one that ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["in_passing_thread"]

T = TypeVar("T")


def in_passing_thread(work: Callable[[], T], name: str, *, niceness: int = 0) -> T:
    """What `work` returns or raises, run in a thread that ends before this comes back.

    With `niceness`, 0 to 19, whatever is less nice goes before it where there are not cores enough.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if niceness:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
            results.append(work())
        except BaseException as error:  # the caller's to handle, whatever it is
            errors.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
