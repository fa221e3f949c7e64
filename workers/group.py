"""A rank's membership in its DP group for one generation: its collectives, its end of the plan channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.parallel.channel import PlanListener, PlanReceiver, PlanSender
from workers.parallel.groups import Groups
from workers.report import RankAddress
from workers.settings import EngineSettings
from workers.watch import PeerWatch

__all__ = ["Membership"]


@dataclass(frozen=True, slots=True)
class Membership:
    """Exactly one of `sender` and `receiver` is set in a group of several ranks."""

    groups: Groups
    sender: PlanSender | None = None
    receiver: PlanReceiver | None = None

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
        timeout_s: float,
    ) -> Membership:
        """Meets the others; they must call this too. Raises TimeoutError naming who is missing."""
        hosts = tuple(address.host for address in addresses)
        groups = Groups.join(settings, rank, generation=generation, store=store, hosts=hosts, timeout_s=timeout_s)
        size = settings.plan.group_size
        first = settings.plan.place(rank).dp_group * size
        if size == 1:
            return cls(groups)
        if rank != first:
            receiver = PlanReceiver.connect(
                addresses[first].host,
                addresses[first].plan_port,
                rank=rank,
                generation=generation,
                secret=secret,
                timeout_s=timeout_s,
            )
            return cls(groups, receiver=receiver)
        assert listener is not None
        followers = set(range(first + 1, first + size))
        sender = listener.accept(followers, generation=generation, secret=secret, timeout_s=timeout_s)
        return cls(groups, sender=sender)

    def watch(self, settings: EngineSettings, on_gone: Callable[[str], None]) -> PeerWatch:
        """A watch over the other ranks of the group, not yet started."""
        return PeerWatch(self._gone, self.groups.tensor, step_timeout_s=settings.step_timeout_s, on_gone=on_gone)

    def hang_up(self) -> None:
        """Lets the other ranks know that this one runs no more steps. From any thread."""
        if self.sender is not None:
            self.sender.hang_up()
        if self.receiver is not None:
            self.receiver.hang_up()

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
