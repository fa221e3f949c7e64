"""Where a rank stands: its generation, the ranks that it shares steps with, and whether it can run any."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from workers.assemble import spreads_experts
from workers.group import Membership
from workers.parallel.channel import PlanListener
from workers.parallel.pulse import Pulse
from workers.report import Outdated, RankAddress
from workers.settings import EngineSettings
from workers.watch import PeerWatch

__all__ = ["Standing"]


class Standing:
    """One rank's, generation after generation.

    `membership` and `pulse` are those of the generation in force; between two there are none.
    """

    def __init__(self, rank: int, settings: EngineSettings, secret: bytes) -> None:
        self.generation = 0
        self.newest = 0  # the highest generation that a leader has named, in force or not
        self.spread_experts = False
        self.membership: Membership | None = None
        self.pulse: Pulse | None = None
        self._rank = rank
        self._settings = settings
        self._secret = secret
        self._listener: PlanListener | None = None
        self._watch: PeerWatch | None = None
        self._troubled = threading.Event()
        self._trouble = ""

    def open(self, host: str) -> None:
        """Before anything else; a rank that others connect to listens from now on."""
        plan = self._settings.plan
        self.spread_experts = spreads_experts(self._settings)
        if plan.place(self._rank).first_in_group and (plan.group_size > 1 or self.spread_experts):
            self._listener = PlanListener(host)

    @property
    def regroups(self) -> bool:
        """Whether a generation may end, and the group go on in the next one: where groups share steps."""
        return self.spread_experts

    @property
    def port(self) -> int:
        """Where others connect; 0 where nobody does."""
        return self._listener.port if self._listener is not None else 0

    def meet(
        self,
        generation: int,
        store: tuple[str, int],
        addresses: Sequence[RankAddress],
        *,
        alone: bool,
        timeout_s: float,
    ) -> Membership:
        """Joins these ranks, which do the same: whole DP groups, or, `alone`, those of this one that comes in later.

        Who waits for some that have died goes as soon as a leader names the generation after that: Outdated.
        """
        self.membership = Membership.join(
            self._settings,
            self._rank,
            generation=generation,
            store=store,
            addresses=addresses,
            listener=self._listener,
            secret=self._secret,
            spread_experts=self.spread_experts and not alone,
            timeout_s=timeout_s,
            is_over=lambda: self.newest > generation,
        )
        self.generation = generation
        self.newest = max(self.newest, generation)
        return self.membership

    def turn_away(self) -> None:
        """Strangers who connected while no generation is being joined."""
        if self._listener is not None:
            self._listener.turn_away()

    def hear(self, generation: int) -> None:
        """A leader names the next generation. Raises Outdated where another one has named it, or a later one."""
        if generation <= self.newest:
            raise Outdated(f"generation {generation} is over: rank {self._rank} has heard of {self.newest}")
        self.newest = generation

    def expect(self, generation: int) -> None:
        """Raises Outdated unless `generation` is the one that was named last."""
        if generation != self.newest:
            raise Outdated(f"generation {generation} is over: rank {self._rank} has heard of {self.newest}")

    @property
    def troubled(self) -> bool:
        return self._troubled.is_set()

    @property
    def trouble(self) -> str:
        """Why no step of the generation in force can be run any more; empty while steps can be."""
        return self._trouble

    def note_trouble(self, reason: str) -> None:
        """The first reason counts. From any thread."""
        if not self._troubled.is_set():
            self._trouble = reason
            self._troubled.set()

    def wait_for_trouble(self, generation: int, timeout_s: float) -> str:
        """Why this rank can run no step of `generation` any more; empty after `timeout_s`."""
        if self.generation == generation and not self._troubled.wait(timeout_s):
            return ""
        return self._trouble or f"generation {generation} is over"

    def recover(self) -> None:
        """Steps of a new generation begin."""
        self._troubled.clear()
        self._trouble = ""

    def join_pulse(self, on_wake: Callable[[], None], on_gone: Callable[[str], None]) -> Pulse | None:
        """The common beat with the engine's other groups, where they exchange tokens; not yet started."""
        assert self.membership is not None, "a pulse before join"
        if self.membership.companions:
            self.pulse = Pulse(
                self.generation,
                self.membership.companions,
                timeout_s=self._settings.step_timeout_s,
                on_wake=on_wake,
                on_gone=on_gone,
            )
        return self.pulse

    def watch(self, on_gone: Callable[[str], None], on_hang: Callable[[str], None]) -> None:
        """Watches the other ranks of the group from now on."""
        assert self.membership is not None, "watch before join"
        if self._settings.plan.group_size > 1:
            self._watch = self.membership.watch(self._settings, on_gone, on_hang)
            self._watch.start()

    def end_watch(self) -> None:
        if self._watch is not None:
            self._watch.end()

    def hang_up(self) -> None:
        """Lets every rank that shares steps with this one know that it takes none any more. From any thread."""
        membership, pulse = self.membership, self.pulse
        if membership is not None:
            membership.hang_up()
        if pulse is not None:
            pulse.close()

    def leave(self) -> None:
        """The generation is over; no step may be under way."""
        if self.membership is not None:
            self.membership.close()
        self.membership = self.pulse = self._watch = None

    def close(self) -> None:
        """Ends every thread and connection. Safe to repeat."""
        self.end_watch()
        if self.pulse is not None:
            self.pulse.close()
        self.leave()
        if self._listener is not None:
            self._listener.close()
        self._listener = None
