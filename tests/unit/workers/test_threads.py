"""Work in a thread that ends."""

from __future__ import annotations

import os
import threading

import pytest

from workers.threads import in_passing_thread


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_it_stands_back_alone() -> None:
    ours = _niceness()
    assert in_passing_thread(_niceness, "nice", niceness=19) == 19
    assert in_passing_thread(_niceness, "as we are") == ours
    assert _niceness() == ours


def test_what_goes_wrong_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        in_passing_thread(lambda: 1 // 0, "wrong")
