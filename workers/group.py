"""A rank's membership in its DP group for one generation: its collectives, its end of the plan channel."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from workers.parallel.channel import PlanListener, PlanReceiver, PlanSender, connect
from workers.parallel.groups import Groups
from workers.report import RankAddress
from workers.settings import EngineSettings
from workers.watch import PeerWatch

__all__ = ["Membership"]


@dataclass(frozen=True, slots=True)
class Membership:
    """Exactly one of `sender` and `receiver` is set in a group of several ranks.

    `companions` are connections to the first ranks of the engine's other groups, by rank, at a first rank whose
    groups take their steps together.
    """

    groups: Groups
    sender: PlanSender | None = None
    receiver: PlanReceiver | None = None
    companions: Mapping[int, socket.socket] = field(default_factory=dict)

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
    ) -> Membership:
        """Meets the others; they must call this too. Raises TimeoutError naming who is missing."""
        groups = Groups.join(
            settings,
            rank,
            generation=generation,
            store=store,
            hosts=tuple(address.host for address in addresses),
            spread_experts=spread_experts,
            timeout_s=timeout_s,
        )

        def reach(other: int) -> socket.socket:
            address = addresses[other]
            return connect(
                address.host,
                address.plan_port,
                rank=rank,
                generation=generation,
                secret=secret,
                timeout_s=timeout_s,
            )

        plan = settings.plan
        first = plan.place(rank).dp_group * plan.group_size
        if rank != first:
            return cls(groups, receiver=PlanReceiver(generation, reach(first)))
        followers = set(range(first + 1, first + plan.group_size))
        firsts = set(range(0, plan.num_ranks, plan.group_size)) if spread_experts else {first}
        # Each first rank connects to those before it and then waits for those behind it, so none waits in a circle.
        companions = {other: reach(other) for other in sorted(firsts) if other < first}
        later = {other for other in firsts if other > first}
        if not followers | later:
            return cls(groups, companions=companions)
        assert listener is not None
        found = listener.accept(followers | later, generation=generation, secret=secret, timeout_s=timeout_s)
        companions |= {other: found.pop(other) for other in later}
        sender = PlanSender(generation, found) if found else None
        return cls(groups, sender=sender, companions=companions)

    def watch(self, settings: EngineSettings, on_gone: Callable[[str], None]) -> PeerWatch:
        """A watch over the other ranks of the group, not yet started."""
        return PeerWatch(self._gone, self.groups.tensor, step_timeout_s=settings.step_timeout_s, on_gone=on_gone)

    def hang_up(self) -> None:
        """Lets the other ranks know that this one runs no more steps. From any thread."""
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
        self.groups.close()

    def _gone(self, timeout_s: float) -> str | None:
        if self.sender is not None:
            ranks = self.sender.hung_up(timeout_s)
            return f"rank {', '.join(map(str, ranks))} has gone" if ranks else None
        assert self.receiver is not None
        return "the first rank has gone" if self.receiver.hung_up(timeout_s) else None
