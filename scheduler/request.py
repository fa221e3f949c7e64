"""What one sequence asks of a DP group.

A client's request with `n` choices is `n` requests here, each with its own key and its own seed. A request that
is replayed after a failure carries the tokens that were already emitted: generation goes on behind them as if
nothing had happened, because everything that chooses the next token is a function of the values below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Grammar", "GrammarKind", "Request", "SamplingParams"]


class GrammarKind(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"  # any object; there is no text
    REGEX = "regex"
    CHOICE = "choice"  # a JSON list of the texts that may come
    RULES = "grammar"  # Lark's notation, or GBNF


@dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """What the whole output must match. The scheduler does not look inside; a rank compiles it.

    `whitespace` is a regular expression for what may stand between the parts of JSON; None: one space behind
    commas and colons, and nothing elsewhere.
    """

    kind: GrammarKind
    text: str = ""
    whitespace: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen; every value is resolved, none means "default".

    Raises ValueError naming the field for a value out of range.
    """

    temperature: float = 1.0  # >= 0; 0 is greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # [0, 1]
    repetition_penalty: float = 1.0  # > 0
    presence_penalty: float = 0.0  # [-2, 2]
    frequency_penalty: float = 0.0  # [-2, 2]
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    max_tokens: int = 16  # >= 1, counted over the whole output, replayed tokens included
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives per generated token; 0: the chosen one only; None: none
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0.0 <= self.temperature <= 100.0, "must be between 0 and 100")
        _require("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "must be above 0 and at most 1")
        _require("top_k", self.top_k, self.top_k >= 0, "must be 0 (off) or positive")
        _require("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "must be between 0 and 1")
        _require(
            "repetition_penalty",
            self.repetition_penalty,
            0.0 < self.repetition_penalty <= 100.0,
            "must be above 0 and at most 100",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(name, value, -2.0 <= value <= 2.0, "must be between -2 and 2")
        for token_id, bias in self.logit_bias.items():
            _require(f"logit_bias[{token_id}]", bias, -100.0 <= bias <= 100.0, "must be between -100 and 100")
        _require("seed", self.seed, -(2**63) <= self.seed < 2**63, "must fit in 64 bits")
        _require("max_tokens", self.max_tokens, self.max_tokens >= 1, "must be at least 1")
        _require(
            "min_tokens",
            self.min_tokens,
            0 <= self.min_tokens <= self.max_tokens,
            "must be between 0 and max_tokens",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(name, value, value is None or value >= 0, "must be at least 0")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name} {rule}, not {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to generate.

    `key` is unique in its DP group. `deadline_s` and `arrival_s` are times of the batcher's clock.
    """

    key: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float
    eos_token_ids: frozenset[int] = frozenset()
    output_token_ids: tuple[int, ...] = ()  # emitted before a replay
    deadline_s: float | None = None
    priority: int = 0  # lower is sooner
    tenant: str = ""
    request_id: str = ""
    traceparent: str = ""
