"""How a checkpoint's weights are quantized, read from config.json."""

from __future__ import annotations

from dataclasses import dataclass

from workers.model.fields import Fields

__all__ = ["BlockQuantization", "read_quantization"]


@dataclass(frozen=True, slots=True)
class BlockQuantization:
    """FP8 e4m3 values with one scale per block of `rows` x `columns` (DeepSeek-V3, arXiv 2412.19437, section 3.3)."""

    rows: int
    columns: int


def read_quantization(fields: Fields) -> BlockQuantization | None:
    """None where the checkpoint has no blocks. Which tensors are is said by their own dtypes."""
    section = fields.section("quantization_config")
    if section is None:
        return None
    method, form = section.text("quant_method", ""), section.text("fmt", "e4m3")
    if method == "int8":
        return None
    if method != "fp8" or form != "e4m3":
        raise ValueError(
            f"config.json: quantization_config with quant_method {method!r} and fmt {form!r} is not supported; "
            "supported: fp8 with e4m3, int8, or an unquantized checkpoint"
        )
    block = section.sizes("weight_block_size")
    if len(block) != 2:
        raise ValueError(f"config.json: weight_block_size must be two positive whole numbers, not {list(block)}")
    scale_form = section.text("scale_fmt", "float")
    if scale_form not in ("float", "ue8m0"):
        raise ValueError(f"config.json: scale_fmt {scale_form!r} is not supported; supported: float, ue8m0")
    return BlockQuantization(*block)
