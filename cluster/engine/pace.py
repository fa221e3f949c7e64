"""How often a leader looks, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Pace"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """A rank that answers nothing for `answer_timeout_s` while others are in trouble is lost; one that had owed an
    answer for as long already, in `doubted_timeout_s`; otherwise it has `call_timeout_s`. `rest_timeout_s` is how long
    a step may take to end once its generation is over. Two ranks between which no connection is made in
    `reach_timeout_s` are cut off from each other. A rank lives `rank_lease_s` without a leader: no less than Ray's own
    processes wait for a head that is away."""

    renew_every_s: float = 1.0
    rank_lease_s: float = 600.0
    probe_every_s: float = 5.0
    probe_timeout_s: float = 20.0
    call_timeout_s: float = 10.0
    answer_timeout_s: float = 1.5
    doubted_timeout_s: float = 0.5
    rest_timeout_s: float = 5.0
    reach_timeout_s: float = 1.0
    start_timeout_s: float = 120.0
    progress_every_s: float = 0.5
    look_every_s: float = 5.0
    move_timeout_s: float = 30.0
    first_backoff_s: float = 0.5
    most_backoff_s: float = 15.0
    max_starts: int = 5  # in a row, without becoming ready
    max_regroups: int = 5  # attempts in a row, before all ranks are started again
