"""What a batcher is told at its start, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from scheduler.policy import ORDERS
from scheduler.tenants import FairnessSettings

__all__ = ["BatcherLoad", "BatcherSettings", "SchedulingSettings"]

_SIZES = ("max_batch_size", "max_batch_tokens", "max_model_len", "block_size", "num_blocks")
_COUNTS = ("max_waiting", "max_prompt_logits", "prefix_wait_tokens", "min_chunk_tokens", "max_prefills")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulingSettings:
    """What an operator may choose of a batcher, whatever its model. Raises ValueError naming the field.

    With `prefix_cache`, sequences of a tenant share the blocks of common prefixes, and a prefill waits for one in
    progress that will spare it at least `prefix_wait_tokens`. With `share_prefixes` those of all tenants share, and the
    time to a first token tells one what another has asked.

    With `target_step_s`, a step holds at most the tokens of prefill that keep it that short, though never fewer than
    `min_chunk_tokens`. Up to `max_prefills` prompts are under way where one step does not hold them all. A step makes
    at most `max_prompt_logits` rows of logits for prompt logprobs (a row is as wide as the vocabulary).

    `order` is one of scheduler.policy.ORDERS. The queue holds at most `max_waiting` requests and `max_waiting_tokens`
    tokens (0: any number), each for at most `max_queue_s` (0: as long as it takes). With `refuse_late`, a request that
    would not be finished by its deadline is refused as soon as that can be told; with `preempt_lower`, one of a lower
    class gives way to one that finds no room. With `fairness`, tenants of one class share the group by their weights.
    """

    prefix_cache: bool = True
    share_prefixes: bool = False
    prefix_wait_tokens: int = 64
    target_step_s: float = 0.0
    min_chunk_tokens: int = 32
    max_prefills: int = 8
    max_prompt_logits: int = 512
    order: str = "arrival"
    max_waiting: int = 1024
    max_waiting_tokens: int = 0
    max_queue_s: float = 0.0
    refuse_late: bool = False
    preempt_lower: bool = False
    fairness: FairnessSettings | None = None

    def __post_init__(self) -> None:
        _check_counts(self, _COUNTS)
        for name in ("target_step_s", "max_waiting_tokens", "max_queue_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 (off) or above, not {getattr(self, name)}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {self.order!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatcherSettings(SchedulingSettings):
    """The limits of one DP group. Raises ValueError naming the field for a value out of range.

    A step runs at most `max_batch_tokens` tokens of at most `max_batch_size` sequences; `max_model_len` bounds prompt
    and output together.
    """

    max_batch_size: int
    max_batch_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int

    def __post_init__(self) -> None:
        SchedulingSettings.__post_init__(self)
        _check_counts(self, _SIZES)

    @classmethod
    def of(cls, scheduling: SchedulingSettings, **sizes: int) -> BatcherSettings:
        """An operator's choices for a group of these sizes."""
        values: dict[str, Any] = {field.name: getattr(scheduling, field.name) for field in fields(SchedulingSettings)}
        return cls(**values | sizes)

    @property
    def max_running(self) -> int:
        """Sequences that may run together: each must find room for a token in every step."""
        return min(self.max_batch_size, self.max_batch_tokens)

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that the whole block pool holds."""
        return self.num_blocks * self.block_size

    @property
    def max_sequence_len(self) -> int:
        """Prompt and output of a sequence that has the pool for itself; its last token needs no place in the cache."""
        return min(self.max_model_len, self.max_cached_tokens + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatcherLoad:
    """How busy a DP group is. `num_waiting_tokens` are those to prefill before the queue is empty.

    Of the `prefix_query_tokens` tokens of all sequences admitted so far, `prefix_hit_tokens` came from the cache.
    `ep_imbalance` is what the fullest DP group brought to the last steps of the expert exchange, over the mean of all
    groups: 1 is even, 0 where there is no exchange.
    """

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_free_blocks: int
    num_blocks: int
    num_preemptions: int = 0
    step_s: float = 0.0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    ep_imbalance: float = 0.0


def _check_counts(settings: object, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(settings, name)}")
