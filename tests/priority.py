"""A client that shares a machine with what it measures, as if it had one of its own.

A fair scheduler lets a client that mostly sleeps wait for up to a second while other sessions' programs start, whatever
its niceness (Linux 6.18 with `sched_autogroup_enabled`); that would be told as a pause of the server.
"""

from __future__ import annotations

import os

__all__ = ["AS_OTHERS", "as_others", "go_first"]

AS_OTHERS = ("chrt", "--other", "0")
"""Before a command that is not to go first."""


def go_first() -> str:
    """This process's threads, and all that they start, before everybody else's; says so for the reader of figures."""
    try:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        return "shares the cores with all that it measures: its own lateness is in the pauses"
    return "in real time (SCHED_RR), as if it had a machine of its own"


def as_others() -> None:
    """The calling thread, and what it starts, like everybody else's."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
