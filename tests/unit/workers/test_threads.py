"""Threads that end: what they computed with ends with them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from workers.threads import in_passing_thread

# In a process of its own: this one's tests have made teams already.
_TEAM_ENDS = """
import os, time, torch
from workers.threads import in_passing_thread
torch.set_num_threads(3)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
during = in_passing_thread(lambda: (torch.ones(1 << 22).exp(), count())[1], "work")
deadline_s = time.monotonic() + 10  # the team's threads end by themselves, soon after their master
while count() > before and time.monotonic() < deadline_s:
    os.sched_yield()
print(during - before, count() - before)
"""


def test_returns_what_the_work_returns() -> None:
    assert in_passing_thread(lambda: 7, "work") == 7


def test_raises_what_the_work_raises() -> None:
    def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        in_passing_thread(work, "work")


def test_leaves_no_team_behind() -> None:
    command = [sys.executable, "-c", _TEAM_ENDS]
    during, after = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(during) > 1, "the operation ran without a team: this test shows nothing"
    assert int(after) == 0


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_stands_back_alone() -> None:
    ours = _niceness()
    assert in_passing_thread(_niceness, "nice", niceness=19) == 19
    assert in_passing_thread(_niceness, "as we are") == ours
    assert _niceness() == ours
