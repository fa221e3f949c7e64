"""What is asked: seeded sequences of prompts and output lengths.

A workload is a pure function of its fields: the same seed gives the same requests on every machine, so that two
runs or two servers can be given the same work, and two doors of one server work of the same lengths.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = [
    "FixedLengths",
    "LengthModel",
    "LogNormalLengths",
    "MixtureLengths",
    "TextPrompts",
    "TokenPrompts",
    "UniformLengths",
    "Work",
    "Workload",
    "parse_lengths",
    "sharegpt_like",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One request to send. With `ignore_eos` the answer has exactly `num_output_tokens` tokens."""

    prompt: tuple[int, ...] | str
    num_output_tokens: int
    ignore_eos: bool = True
    temperature: float = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        """Zero for text, whose length only the server knows."""
        return 0 if isinstance(self.prompt, str) else len(self.prompt)


class LengthModel(Protocol):
    """Draws (prompt tokens, output tokens), both at least one."""

    def draw(self, rng: random.Random) -> tuple[int, int]: ...


@dataclass(frozen=True, slots=True)
class FixedLengths:
    """Every request alike."""

    num_prompt_tokens: int
    num_output_tokens: int

    def __post_init__(self) -> None:
        _at_least_one(self.num_prompt_tokens, self.num_output_tokens)

    def draw(self, rng: random.Random) -> tuple[int, int]:
        return self.num_prompt_tokens, self.num_output_tokens


@dataclass(frozen=True, slots=True)
class UniformLengths:
    """Both lengths uniform and independent; ranges include their ends."""

    prompt: tuple[int, int]
    output: tuple[int, int]

    def __post_init__(self) -> None:
        for low, high in (self.prompt, self.output):
            _at_least_one(low)
            if high < low:
                raise ValueError(f"lengths: the range {low}-{high} is empty")

    def draw(self, rng: random.Random) -> tuple[int, int]:
        return rng.randint(*self.prompt), rng.randint(*self.output)


@dataclass(frozen=True, slots=True)
class LogNormalLengths:
    """Long-tailed lengths: (median, sigma of the logarithm) of each."""

    prompt: tuple[float, float]
    output: tuple[float, float]

    def __post_init__(self) -> None:
        for median, sigma in (self.prompt, self.output):
            _at_least_one(median)
            if sigma < 0:
                raise ValueError(f"lengths: sigma must not be negative, not {sigma}")

    def draw(self, rng: random.Random) -> tuple[int, int]:
        prompt, output = (
            max(1, round(rng.lognormvariate(math.log(median), sigma))) for median, sigma in (self.prompt, self.output)
        )
        return prompt, output


@dataclass(frozen=True, slots=True)
class MixtureLengths:
    """Draws from one of several models, chosen by weight."""

    parts: tuple[tuple[float, LengthModel], ...]

    def __post_init__(self) -> None:
        if not self.parts or any(weight <= 0 for weight, _ in self.parts):
            raise ValueError("lengths: a mixture needs parts, each with a positive weight")

    def draw(self, rng: random.Random) -> tuple[int, int]:
        models = [model for _, model in self.parts]
        weights = [weight for weight, _ in self.parts]
        return rng.choices(models, weights)[0].draw(rng)


def sharegpt_like() -> MixtureLengths:
    """Chat-shaped lengths: short questions, follow-ups with context, pasted documents.

    The shape (many short prompts, a long tail, outputs of a few hundred tokens) was chosen by hand after public
    summaries of the ShareGPT conversations; it is not fitted to them.
    """
    return MixtureLengths(
        (
            (0.55, LogNormalLengths((24.0, 0.8), (180.0, 0.8))),
            (0.35, LogNormalLengths((180.0, 0.9), (220.0, 0.8))),
            (0.10, LogNormalLengths((900.0, 0.6), (160.0, 0.9))),
        )
    )


def _at_least_one(*lengths: float) -> None:
    for length in lengths:
        if length < 1:
            raise ValueError(f"lengths: must be at least 1, not {length}")


class Prompts(Protocol):
    """Makes the prompt of a request from the number of tokens drawn for it."""

    def make(self, rng: random.Random, num_tokens: int) -> tuple[int, ...] | str: ...


@dataclass(frozen=True, slots=True)
class TokenPrompts:
    """Random token ids. Special tokens sit at the ends of a vocabulary, so a tenth is left out at either end."""

    vocab_size: int

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, not {self.vocab_size}")

    def make(self, rng: random.Random, num_tokens: int) -> tuple[int, ...]:
        low = self.vocab_size // 10
        return tuple(rng.choices(range(low, self.vocab_size - low), k=num_tokens))


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """Lines of text, one drawn for each request; the drawn prompt length does not apply."""

    lines: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.lines:
            raise ValueError("prompts: no line of text")

    @classmethod
    def from_file(cls, path: Path) -> TextPrompts:
        """The file's lines that are not blank."""
        return cls(tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()))

    def make(self, rng: random.Random, num_tokens: int) -> str:
        return rng.choice(self.lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """An endless sequence of requests; `max_model_len` cuts what would not fit.

    Whoever else is `asked` of one server is asked requests of the same lengths with other tokens: it must not find
    the first one's prefixes in the server's cache.
    """

    lengths: LengthModel
    prompts: Prompts
    seed: int = 0
    asked: str = ""
    ignore_eos: bool = True
    temperature: float = 0.0
    max_model_len: int | None = None

    def requests(self) -> Iterator[Work]:
        """The same requests at every call."""
        lengths, tokens = random.Random(self.seed), random.Random(f"{self.seed} {self.asked}")
        while True:
            num_prompt, num_output = self._fit(*self.lengths.draw(lengths))
            yield Work(
                prompt=self.prompts.make(tokens, num_prompt),
                num_output_tokens=num_output,
                ignore_eos=self.ignore_eos,
                temperature=self.temperature,
            )

    def _fit(self, num_prompt: int, num_output: int) -> tuple[int, int]:
        if self.max_model_len is None:
            return num_prompt, num_output
        num_output = min(num_output, self.max_model_len - 1)
        return min(num_prompt, self.max_model_len - num_output), num_output


def parse_lengths(text: str) -> LengthModel:
    """Reads `fixed:IN:OUT`, `uniform:LO-HI:LO-HI`, `lognormal:MEDIAN~SIGMA:MEDIAN~SIGMA` or `sharegpt`."""
    kind, *rest = text.split(":")
    try:
        match kind, rest:
            case "fixed", [prompt, output]:
                return FixedLengths(int(prompt), int(output))
            case "uniform", [prompt, output]:
                return UniformLengths(_integers(prompt), _integers(output))
            case "lognormal", [prompt, output]:
                return LogNormalLengths(_floats(prompt), _floats(output))
            case "sharegpt", []:
                return sharegpt_like()
    except ValueError as error:
        raise ValueError(f"lengths {text!r}: {error}") from error
    raise ValueError(f"lengths {text!r}: use fixed:IN:OUT, uniform:LO-HI:LO-HI, lognormal:M~S:M~S or sharegpt")


def _integers(text: str) -> tuple[int, int]:
    low, high = text.split("-")
    return int(low), int(high)


def _floats(text: str) -> tuple[float, float]:
    median, sigma = text.split("~")
    return float(median), float(sigma)
