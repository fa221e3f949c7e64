"""A rank's membership in its DP group for one generation: its collectives, its end of the plan channel."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from workers.parallel.channel import PlanListener, PlanReceiver, PlanSender, connect
from workers.parallel.groups import Groups
from workers.parallel.liveness import quicken, quicken_all
from workers.parallel.results import ResultReceiver, ResultSender
from workers.report import RankAddress
from workers.settings import EngineSettings
from workers.watch import PeerWatch

__all__ = ["Membership"]


@dataclass(frozen=True, slots=True)
class Membership:
    """Exactly one of `sender` and `receiver` is set in a group of several ranks.

    `companions` are connections to the first ranks of the generation's other groups, by rank, at a first rank whose
    groups take their steps together. `results` and `answers` are the ends of a pipeline's way back, at the first rank
    and at the one that samples.
    """

    groups: Groups
    sender: PlanSender | None = None
    receiver: PlanReceiver | None = None
    companions: Mapping[int, socket.socket] = field(default_factory=dict)
    results: ResultReceiver | None = None
    answers: ResultSender | None = None

    @classmethod
    def join(
        cls,
        settings: EngineSettings,
        rank: int,
        *,
        generation: int,
        store: tuple[str, int],
        addresses: Sequence[RankAddress],
        listener: PlanListener | None,
        secret: bytes,
        spread_experts: bool,
        timeout_s: float,
        is_over: Callable[[], bool],
    ) -> Membership:
        """Meets the others, whose `addresses` are all members of the generation; they must call this too.

        Raises TimeoutError naming who is missing, or Outdated once `is_over`; nothing is left of the attempt then.
        """
        by_rank = {address.rank: address for address in addresses}
        groups = Groups.join(
            settings,
            rank,
            generation=generation,
            store=store,
            hosts={address.rank: address.host for address in addresses},
            spread_experts=spread_experts,
            timeout_s=timeout_s,
            is_over=is_over,
        )
        meeting = _Meeting(settings, rank, by_rank, generation, secret, timeout_s)
        try:
            return meeting.lead(groups, listener, spread_experts) if meeting.first == rank else meeting.follow(groups)
        except BaseException:
            meeting.close()
            groups.close()
            raise

    def watch(
        self, settings: EngineSettings, on_gone: Callable[[str], None], on_hang: Callable[[str], None]
    ) -> PeerWatch:
        """A watch over the other ranks of the group, not yet started."""
        line = self.sender if self.sender is not None else self.receiver
        assert line is not None, "nobody to watch"
        return PeerWatch(
            line, self.groups.tensor, step_timeout_s=settings.step_timeout_s, on_gone=on_gone, on_hang=on_hang
        )

    def hang_up(self) -> None:
        """Lets the other ranks know that this one runs no more steps. From any thread."""
        if self.groups.expert is not None:
            self.groups.expert.hang_up()
        if self.sender is not None:
            self.sender.hang_up()
        if self.receiver is not None:
            self.receiver.hang_up()
        if self.groups.expert is not None:
            self.groups.expert.hang_up()

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()
        if self.receiver is not None:
            self.receiver.close()
        if self.results is not None:
            self.results.close()
        if self.answers is not None:
            self.answers.close()
        self.groups.close()


class _Meeting:
    """The connections of one rank in one generation; `first` leads its group, `sampling` closes its pipeline."""

    def __init__(
        self,
        settings: EngineSettings,
        rank: int,
        addresses: Mapping[int, RankAddress],
        generation: int,
        secret: bytes,
        timeout_s: float,
    ) -> None:
        self._settings = settings
        self._rank = rank
        self._addresses = addresses
        self._generation = generation
        self._secret = secret
        self._timeout_s = timeout_s
        plan = settings.plan
        self._group = plan.group(plan.place(rank).dp_group)
        self.first = self._group.start
        self._sampling = plan.sampling_rank(plan.place(rank).dp_group)
        self._way_back = plan.num_ranks + self._sampling  # a name that no rank has
        self._made: list[socket.socket] = []

    def follow(self, groups: Groups) -> Membership:
        receiver = PlanReceiver(self._generation, self._reach(self.first, self._rank))
        if self._rank != self._sampling:
            return Membership(groups, receiver=receiver)
        return Membership(groups, receiver=receiver, answers=ResultSender(self._reach(self.first, self._way_back)))

    def lead(self, groups: Groups, listener: PlanListener | None, spread_experts: bool) -> Membership:
        """Each first rank connects to those before it and then waits for those behind it: none waits in a circle."""
        plan, first = self._settings.plan, self.first
        followers = set(self._group[1:])
        others = {other for other in self._addresses if plan.place(other).first_in_group} if spread_experts else set()
        connections = {other: self._reach(other, first) for other in sorted(others) if other < first}
        later = followers | {other for other in others if other > first}
        if self._sampling != first:
            later.add(self._way_back)
        if later:
            assert listener is not None
            came = listener.accept(later, generation=self._generation, secret=self._secret, timeout_s=self._timeout_s)
            self._made.extend(came.values())
            connections |= came
        _quicken(self._settings, self._addresses, first, connections.values())
        found = {other: connections.pop(other) for other in followers}
        back = connections.pop(self._way_back, None)
        return Membership(
            groups,
            sender=PlanSender(self._generation, found) if found else None,
            companions=connections,
            results=None if back is None else ResultReceiver(self._generation, back),
        )

    def close(self) -> None:
        for connection in self._made:
            connection.close()

    def _reach(self, other: int, name: int) -> socket.socket:
        address = self._addresses[other]
        connection = connect(
            address.host,
            address.plan_port,
            rank=name,
            generation=self._generation,
            secret=self._secret,
            timeout_s=self._timeout_s,
        )
        self._made.append(connection)
        return connection


def _quicken(
    settings: EngineSettings, members: Mapping[int, RankAddress], rank: int, ours: Iterable[socket.socket]
) -> None:
    """Where members live on other hosts, one of these that is lost must be noticed in about the step timeout."""
    others = {address.host for address in members.values()} - {members[rank].host}
    if others:
        for connection in ours:
            quicken(connection, settings.step_timeout_s)
        quicken_all(others, settings.step_timeout_s)
