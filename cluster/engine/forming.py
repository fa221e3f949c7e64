"""An engine from nothing: all ranks are placed, meet, load and start in a new generation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.engine.asking import ask_all
from cluster.engine.means import Means
from cluster.engine.members import Members
from cluster.engine.states import EngineEvent

__all__ = ["form"]


async def form(
    means: Means, generation: int, on_event: Callable[[EngineEvent], None], on_progress: Callable[[float], None]
) -> Members:
    """Raises RankLost or RankRefused. `on_progress` hears what part of the weights is read."""
    plan, pace = means.settings.plan, means.pace
    ranks = await means.ranks.place()
    addresses = await ask_all(ranks, lambda rank: rank.open(), pace.start_timeout_s)
    on_event(EngineEvent.PLACED)
    others = list(addresses.values())
    store = await means.meeting_place(others)
    await ask_all(ranks, lambda rank: rank.join(generation, store, others), pace.start_timeout_s)
    on_event(EngineEvent.JOINED)
    members = Members(plan=plan, ranks=ranks, addresses=addresses)
    await _load(means, members, on_progress)
    on_event(EngineEvent.LOADED)
    return members.started(await ask_all(ranks, lambda rank: rank.start(), pace.start_timeout_s))


async def _load(means: Means, members: Members, on_progress: Callable[[float], None]) -> None:
    ranks, pace = members.ranks, means.pace
    loading = asyncio.create_task(ask_all(ranks, lambda rank: rank.load(), means.settings.load_timeout_s))
    try:
        while not loading.done():
            await asyncio.wait({loading}, timeout=pace.progress_every_s)
            counts = (await ask_all(ranks, lambda rank: rank.load_progress(), pace.start_timeout_s)).values()
            whole = sum(total for _, total in counts)
            on_progress(sum(done for done, _ in counts) / whole if whole else 0.0)
        await loading
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
