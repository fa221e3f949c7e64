"""A whole answer, collected."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from cluster.front_door.call import Chunk, Usage
from cluster.front_door.http.merge import Item
from scheduler.plan import FinishReason, TokenLogprobs

__all__ = ["add_usage", "finish_name", "gather", "stop_reason", "usage_object"]

_NAMES = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.CANCELLED: "abort"}


@dataclass(slots=True)
class _Gathered:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    first: Chunk | None = None
    last: Chunk | None = None

    def add(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.first = self.first or chunk
        self.last = chunk

    def chunk(self) -> Chunk:
        assert self.first is not None
        assert self.last is not None
        return replace(
            self.last,
            position=0,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            prompt_token_ids=self.first.prompt_token_ids,
            prompt_logprobs=self.first.prompt_logprobs,
        )


async def gather(stream: AsyncGenerator[Item, None]) -> tuple[list[Item], Usage]:
    """Each choice as one chunk, in order of call and index, and the usage of all calls together."""
    choices: dict[tuple[int, int], _Gathered] = {}
    usage = Usage(0, 0)
    async with aclosing(stream) as chunks:
        async for at, chunk in chunks:
            choices.setdefault((at, chunk.index), _Gathered()).add(chunk)
            if chunk.usage is not None:
                usage = add_usage(usage, chunk.usage)
    return [(key[0], choices[key].chunk()) for key in sorted(choices)], usage


def add_usage(first: Usage, second: Usage) -> Usage:
    return Usage(
        first.prompt_tokens + second.prompt_tokens,
        first.completion_tokens + second.completion_tokens,
        first.cached_tokens + second.cached_tokens,
    )


def usage_object(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finish_name(finish: FinishReason | None) -> str | None:
    return None if finish is None else _NAMES[finish]


def stop_reason(chunk: Chunk) -> str | int | None:
    """The stop string or the stop token id that ended a choice, as vLLM tells it."""
    return chunk.stop_string if chunk.stop_string is not None else chunk.stop_token_id
