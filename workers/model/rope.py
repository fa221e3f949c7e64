"""Rotary position embedding: which angles, and a table of their cosines and sines.

Sources: Su et al., "RoFormer" (arXiv 2104.09864); Peng et al., "YaRN" (arXiv 2309.00071); llama 3.1's frequency
scaling as published with the model; checked against transformers' `modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from workers.model.config import RopeConfig

__all__ = ["RotaryTable", "inverse_frequencies", "rotary_table"]


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Row p holds position p: `cos` [positions, head_dim], and `sin` with its first half negated.

    The sign makes the rotation of neox-style halves `x * cos + roll(x, head_dim / 2) * sin`.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines at `positions` [tokens], each [tokens, 1, head_dim]."""
        return self.cos.index_select(0, positions).unsqueeze(1), self.sin.index_select(0, positions).unsqueeze(1)


def rotary_table(
    config: RopeConfig, head_dim: int, num_positions: int, *, dtype: torch.dtype, device: torch.device
) -> RotaryTable:
    """The table for positions 0 to `num_positions` - 1; angles are computed in fp32 and rounded once."""
    frequencies, attention_factor = inverse_frequencies(config, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return RotaryTable(
        torch.cat((cos, cos), dim=-1).to(device, dtype),
        torch.cat((-sin, sin), dim=-1).to(device, dtype),
    )


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head_dim / 2] in fp32, and the factor on cosines and sines."""
    powers = config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if config.type == "yarn":
        return _yarn(config, powers, head_dim), _yarn_attention_factor(config)
    if config.type == "llama3":
        return _llama3(config, 1.0 / powers), 1.0
    return 1.0 / powers / config.factor, 1.0


def _llama3(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between interpolated."""
    original = config.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / config.factor + kept * frequencies


def _yarn(config: RopeConfig, powers: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN's "NTK by parts": dimensions between the two correction bounds ramp from kept to interpolated."""

    def dimension(num_rotations: float) -> float:
        ratio = config.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return interpolated / (config.factor * powers) + (1 - interpolated) / powers


def _yarn_attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor

    def scale(mscale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * mscale * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)
