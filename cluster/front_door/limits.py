"""How much one client call, and all of them together, may ask of a front door."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds on a call and on what is open at once.

    Memory per open call is bounded by its prompt and its `max_tokens` (both bounded by the model's length): a client
    that reads slowly costs one merged chunk per choice, not one per token.
    """

    max_n: int = 16
    max_logprobs: int = 20
    max_prompt_logprobs: int = 20
    max_stop: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 128
    max_logit_bias: int = 300
    max_prompt_chars: int = 8_000_000
    max_request_id_chars: int = 128
    max_priority: int = 2**31 - 1
    # Chunks of one call come no closer than this, the first and the last excepted: tokens that come faster share one.
    # A chunk costs a front door 50 us and more, whatever is in it.
    min_chunk_gap_s: float = 0.005
    max_open_requests: int = 4096
    max_open_tokens: int = 64_000_000  # prompts and the most that may be answered, over all choices
    background_share: float = 0.8  # of both, for requests of a class below the default one
    max_replays: int = 8  # of one choice
    replay_patience_s: float = 60.0  # how long an interrupted choice waits for a DP group
    resume_window_s: float = 60.0
    max_resumable_requests: int = 256
    max_resumable_tokens: int = 4_000_000
    max_message_bytes: int = 32 * 1024 * 1024
