"""Randomness that a replay reproduces: a pure function of (seed, position, token id).

A token is drawn with the exponential form of the Gumbel-max trick: `argmax_i p_i / E_i` with independent
`E_i ~ Exp(1)` picks token `i` with probability `p_i / sum p`. Each `E_i` comes from a hash of the token's id under
a key that is made of the seed and the output position, so it is the same whatever else is in the batch, however
the prompt was cut into chunks, and on whichever engine a replay runs.

The hash multiplies and shifts 32-bit words, twice, with a word of the key before each; a token's own word comes from
a table of ids hashed the same way, and the key is 64 bits of SplitMix64. Products of int32 tensors wrap, and their
right shifts are arithmetic, hence the masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Noise"]

_MASK64 = (1 << 64) - 1
_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35, 0x7FEB352D)
_SCALE = (1.0 - 2.0**-23) * 2.0**-31


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
    """Exponential noise for a vocabulary, on one device. Not thread-safe: it keeps its scratch space."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        words = torch.arange(vocab_size, dtype=torch.int32, device=device)
        spare = torch.empty_like(words)
        for multiplier, bits in ((_M1, 16), (_M2, 15), (_M3, 16)):
            words.mul_(multiplier)
            _xor_shift(words, spare, bits)
        self._words = words
        self._scratch = torch.empty(0, dtype=torch.int32, device=device)

    def negative(
        self, seeds: Sequence[int], positions: Sequence[int], token_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[rows, n] fp32 draws of -Exp(1), one row per (seed, position), valid until the next call.

        `token_ids` is [rows, n] int64, or None for the whole vocabulary in order.
        """
        pairs = [_key(seed, position) for seed, position in zip(seeds, positions, strict=True)]
        keys = torch.tensor(pairs, dtype=torch.int32, device=self.device)
        first, second = keys[:, :1], keys[:, 1:]
        words = self._words if token_ids is None else self._words[token_ids]
        x, spare = self._buffers(len(pairs), words.shape[-1])
        torch.bitwise_xor(words, first, out=x)
        x.mul_(_M1)
        _xor_shift(x, spare, 15)
        x.bitwise_xor_(second).mul_(_M2)
        # The high 31 bits of a product depend on all bits before it: what is left is a number in (0, 1).
        torch.bitwise_right_shift(x, 1, out=spare)
        spare.bitwise_and_(0x7FFFFFFF)
        # Small ones, which make the rare large draws, keep full precision; the largest stays below one.
        return x.view(torch.float32).copy_(spare).add_(0.5).mul_(-_SCALE).log1p_()

    def _buffers(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two [rows, columns] int32 tensors: fresh memory would cost more than the arithmetic."""
        size = rows * columns
        if self._scratch.numel() < 2 * size:
            self._scratch = torch.empty(2 * size, dtype=torch.int32, device=self.device)
        return self._scratch[:size].view(rows, columns), self._scratch[size : 2 * size].view(rows, columns)
