"""Whether a new version does as well as the old one: pure functions of what front doors counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.roster import FrontDoorReport, GroupTraffic

__all__ = ["Limits", "Tally", "judge", "since", "tallies"]

_ENOUGH = 5  # sequences, before a rate or a mean says anything


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """`max_slowdown` is for the mean time to the first token, over the old version's."""

    max_error_rate: float = 0.02
    max_slowdown: float = 2.0


@dataclass(frozen=True, slots=True)
class Tally:
    """One version's sequences."""

    num_begun: int = 0
    num_failed: int = 0
    num_first_tokens: int = 0
    first_tokens_s: float = 0.0

    @property
    def error_rate(self) -> float:
        return self.num_failed / self.num_begun if self.num_begun else 0.0

    @property
    def first_token_s(self) -> float | None:
        """The mean, where there is enough for one."""
        return self.first_tokens_s / self.num_first_tokens if self.num_first_tokens >= _ENOUGH else None


Counts = dict[tuple[str, str], GroupTraffic]
"""By front door and DP group."""


def tallies(doors: Iterable[FrontDoorReport]) -> Counts:
    """What all front doors have counted so far."""
    return {(door.id, group.key): group for door in doors for group in door.traffic}


def since(before: Counts, now: Counts, version: str) -> Tally:
    """What came for a version in between. A counter that fell, or is new, began at nothing."""
    total = Tally()
    for key, group in now.items():
        if group.version != version:
            continue
        old = before.get(key)
        if old is None or old.num_begun > group.num_begun:
            old = GroupTraffic(key=group.key, engine=group.engine, version=version, num_open=0)
        total = Tally(
            total.num_begun + group.num_begun - old.num_begun,
            total.num_failed + group.num_failed - old.num_failed,
            total.num_first_tokens + group.num_first_tokens - old.num_first_tokens,
            total.first_tokens_s + group.first_tokens_s - old.first_tokens_s,
        )
    return total


def judge(old: Tally, new: Tally, limits: Limits) -> str:
    """Why the new version must be taken back; empty where it need not."""
    if new.num_begun >= _ENOUGH and new.error_rate > max(limits.max_error_rate, old.error_rate):
        return f"{new.num_failed} of {new.num_begun} sequences failed, more than {limits.max_error_rate:.1%}"
    if old.first_token_s and new.first_token_s and new.first_token_s > limits.max_slowdown * old.first_token_s:
        return (
            f"the first token takes {new.first_token_s:.3f} s in the mean, {old.first_token_s:.3f} s before, "
            f"more than {limits.max_slowdown:g} times"
        )
    return ""
