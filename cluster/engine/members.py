"""The ranks that take part in a generation: whole DP groups, not always all of the plan's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from cluster.engine.ranks import Rank
from cluster.front_door.groups import GroupAddress
from workers.parallel.plan import ParallelPlan
from workers.report import RankAddress

__all__ = ["Members"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Members:
    """By rank, ascending; `sessions` by DP group."""

    plan: ParallelPlan
    ranks: Mapping[int, Rank] = field(default_factory=dict)
    addresses: Mapping[int, RankAddress] = field(default_factory=dict)
    sessions: Mapping[int, str] = field(default_factory=dict)

    @property
    def firsts(self) -> dict[int, Rank]:
        """Of each DP group the rank that leads it."""
        return {number: rank for number, rank in self.ranks.items() if self.plan.place(number).first_in_group}

    @property
    def stages(self) -> dict[int, Rank]:
        """Of each stage of each DP group the first rank, which sees all of the group's tokens."""
        return {number: rank for number, rank in self.ranks.items() if self.plan.place(number).tensor_index == 0}

    @property
    def missing(self) -> tuple[int, ...]:
        """The plan's ranks that are not here."""
        return tuple(number for number in range(self.plan.num_ranks) if number not in self.ranks)

    @property
    def missing_groups(self) -> set[int]:
        return {self.plan.place(number).dp_group for number in self.missing}

    def whole(self, living: Collection[int]) -> Members:
        """The DP groups all of whose ranks are in `living`."""
        size = self.plan.group_size
        groups = {group for group in range(self.plan.data) if all(group * size + n in living for n in range(size))}
        kept = {number for number in self.ranks if self.plan.place(number).dp_group in groups}
        return Members(
            plan=self.plan,
            ranks={number: rank for number, rank in self.ranks.items() if number in kept},
            addresses={number: address for number, address in self.addresses.items() if number in kept},
            sessions={group: session for group, session in self.sessions.items() if group in groups},
        )

    def joined(self, others: Members) -> Members:
        """These and those."""
        return Members(
            plan=self.plan,
            ranks=dict(sorted({**self.ranks, **others.ranks}.items())),
            addresses=dict(sorted({**self.addresses, **others.addresses}.items())),
            sessions=dict(sorted({**self.sessions, **others.sessions}.items())),
        )

    def started(self, sessions: Mapping[int, str | None]) -> Members:
        """These, which serve now: what `start` gave at each rank."""
        found = {self.plan.place(number).dp_group: session for number, session in sessions.items() if session}
        return replace(self, sessions=found)

    def groups(self, engine: str, generation: int) -> tuple[GroupAddress, ...]:
        """The DP groups for front doors."""
        return tuple(_group(engine, index, generation, target) for index, target in self.sessions.items())


def _group(engine: str, dp_group: int, generation: int, target: str) -> GroupAddress:
    host, _, port = target.rpartition(":")
    return GroupAddress(
        key=f"{engine}/{dp_group}",
        engine=engine,
        dp_group=dp_group,
        host=host.strip("[]"),
        port=int(port),
        generation=generation,
    )
