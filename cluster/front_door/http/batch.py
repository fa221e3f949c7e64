"""Several prompts in one request: all are checked before any is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.front_door.call import Call
from cluster.front_door.http.seam import DeskLike
from cluster.front_door.model_card import ModelCard
from cluster.front_door.validate import fit, resolve

__all__ = ["settle"]


async def settle(desk: DeskLike, card: ModelCard, calls: Sequence[Call]) -> tuple[Call, ...]:
    """The calls with their prompts as token ids. Raises InvalidRequest for the first that cannot be run.

    A lone call needs none of this: the desk checks it before its first chunk. Of several, one would be streaming
    already when the desk refuses the next.
    """
    if len(calls) == 1:
        return tuple(calls)
    settled = []
    for call in calls:
        resolved = resolve(call, card, desk.limits)
        if call.token_ids is None:
            call = replace(call, text=None, token_ids=tuple(await desk.tokenize(model=call.model, text=call.text)))
        fit(resolved, call.token_ids or (), card, field="prompt")
        settled.append(call)
    return tuple(settled)
