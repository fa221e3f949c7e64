"""Randomness that a replay reproduces: a pure function of (seed, position, token id).

A token is drawn with the exponential form of the Gumbel-max trick: `argmax_i p_i / E_i` with independent
`E_i ~ Exp(1)` picks token `i` with probability `p_i / sum p`. Each `E_i` comes from a hash of the token's id under
a key that is made of the seed and the output position, so it is the same whatever else is in the batch, however
the prompt was cut into chunks, and on whichever engine a replay runs.

The hash is 32-bit multiply and xor-shift mixing (the finaliser of MurmurHash3, applied twice with a key word
before each), on int32 tensors whose products wrap; the key is 64 bits of SplitMix64. Right shifts of int32 are
arithmetic, hence the masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Noise"]

_MASK64 = (1 << 64) - 1
_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35, 0x7FEB352D)


def _signed(word: int) -> int:
    """A 32-bit word as the int32 with the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


_M1, _M2, _M3 = (_signed(word) for word in _MULTIPLIERS)


def _splitmix64(state: int) -> int:
    """One output of SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _key(seed: int, position: int) -> tuple[int, int]:
    """Two int32 words for a seed and an output position."""
    word = _splitmix64(_splitmix64(seed & _MASK64) ^ (position & _MASK64))
    return _signed(word & 0xFFFFFFFF), _signed(word >> 32)


def _xor_shift(x: torch.Tensor, scratch: torch.Tensor, bits: int) -> None:
    torch.bitwise_right_shift(x, bits, out=scratch)
    scratch.bitwise_and_((1 << (32 - bits)) - 1)
    x.bitwise_xor_(scratch)


class Noise:
    """Exponential noise for a vocabulary, on one device."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        words = torch.arange(vocab_size, dtype=torch.int32, device=device)
        words.mul_(_signed(0x9E3779B1))
        _xor_shift(words, torch.empty_like(words), 15)
        self._words = words

    def exponential(
        self, seeds: Sequence[int], positions: Sequence[int], token_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[rows, n] fp32 draws of Exp(1), one row per (seed, position).

        `token_ids` is [rows, n] int64, or None for the whole vocabulary in order.
        """
        pairs = [_key(seed, position) for seed, position in zip(seeds, positions, strict=True)]
        keys = torch.tensor(pairs, dtype=torch.int32, device=self.device)
        first, second = keys[:, :1], keys[:, 1:]
        words = self._words if token_ids is None else self._words[token_ids]
        x = words ^ first
        scratch = torch.empty_like(x)
        x.mul_(_M1)
        _xor_shift(x, scratch, 16)
        x.bitwise_xor_(second).mul_(_M2)
        _xor_shift(x, scratch, 15)
        x.mul_(_M3)
        _xor_shift(x, scratch, 16)
        x.bitwise_and_(0x7FFFFFFF)
        # 31 bits as a number in (0, 1): small values, which make the rare large Gumbels, keep full precision.
        uniform = x.to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
        return uniform.neg_().log1p_().neg_()
