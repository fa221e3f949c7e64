"""Arrivals: read from a file, or drawn."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["EOS", "Arrival", "drawn", "length", "poisson", "read", "sessions"]

EOS = 0
_VOCAB_SIZE = 32_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A request, when it comes, and the answer that it will get however it is scheduled."""

    at_s: float
    prompt_token_ids: tuple[int, ...]
    answer_token_ids: tuple[int, ...]
    max_tokens: int = 0  # 0: as many as the answer has
    tenant: str = ""
    priority: int = 0
    timeout_s: float | None = None


def tokens(rng: random.Random, number: int) -> tuple[int, ...]:
    return tuple(rng.randrange(1, _VOCAB_SIZE) for _ in range(number))


def length(rng: random.Random, median: int, spread: float = 0.6, most: int = 8192) -> int:
    """A log-normal number of tokens."""
    return min(max(1, round(rng.lognormvariate(math.log(median), spread))), most)


def poisson(rng: random.Random, rate: float, until_s: float, from_s: float = 0.0) -> Iterator[float]:
    """Times at which something happens `rate` times a second."""
    at_s = from_s + rng.expovariate(rate)
    while at_s < until_s:
        yield at_s
        at_s += rng.expovariate(rate)


def drawn(
    rng: random.Random,
    times: Iterable[float],
    *,
    prompt: int,
    answer: int,
    spread: float = 0.6,
    tenant: str = "",
) -> list[Arrival]:
    """A request at each of these times, of about `prompt` and `answer` tokens."""
    return [
        Arrival(
            at_s=at_s,
            prompt_token_ids=tokens(rng, length(rng, prompt, spread)),
            answer_token_ids=tokens(rng, length(rng, answer, spread)),
            tenant=tenant,
        )
        for at_s in times
    ]


def sessions(
    rng: random.Random, starts: Iterable[float], *, system: int, turn: int, answer: int, num_turns: int, pause_s: float
) -> list[Arrival]:
    """Conversations: every turn repeats all that was said, behind a system prompt that all of them share."""
    beginning = tokens(rng, system)
    arrivals = []
    for at_s in starts:
        history = beginning
        for _ in range(rng.randint(1, 2 * num_turns - 1)):
            history += tokens(rng, length(rng, turn))
            said = tokens(rng, length(rng, answer))
            arrivals.append(Arrival(at_s=at_s, prompt_token_ids=history, answer_token_ids=said))
            history += said
            at_s += pause_s * rng.uniform(0.5, 1.5)
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def read(rng: random.Random, lines: Iterable[str]) -> list[Arrival]:
    """A trace as JSON lines of lengths; the tokens are drawn.

    `at_s`, `prompt_tokens`, `output_tokens`, and if wanted `max_tokens`, `tenant`, `priority`, `timeout_s`, and
    `prefix`, the name of a beginning that is shared over `prefix_tokens` tokens. Raises ValueError naming the line.
    """
    prefixes: dict[str, tuple[int, ...]] = {}
    arrivals = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            num_shared = int(entry.get("prefix_tokens", 0))
            name = str(entry.get("prefix", ""))
            shared = prefixes.get(name, ())
            if len(shared) < num_shared:
                shared = prefixes[name] = shared + tokens(rng, num_shared - len(shared))
            own = tokens(rng, int(entry["prompt_tokens"]) - num_shared)
            arrivals.append(
                Arrival(
                    at_s=float(entry["at_s"]),
                    prompt_token_ids=shared[:num_shared] + own,
                    answer_token_ids=tokens(rng, int(entry["output_tokens"])),
                    max_tokens=int(entry.get("max_tokens", 0)),
                    tenant=str(entry.get("tenant", "")),
                    priority=int(entry.get("priority", 0)),
                    timeout_s=None if entry.get("timeout_s") is None else float(entry["timeout_s"]),
                )
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"line {number} of the trace: {type(error).__name__}: {error}") from error
    return sorted(arrivals, key=lambda arrival: arrival.at_s)
