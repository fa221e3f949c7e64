"""What the names in a checkpoint say about how it was written."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from workers.model.config import ModelConfig

__all__ = ["has_fused_experts", "log_skipped_layers"]

log = logging.getLogger(__name__)

_FUSED = ".mlp.experts.gate_up_proj"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def has_fused_experts(names: Iterable[str]) -> bool:
    """Whether a layer's routed experts lie in two tensors rather than three for each."""
    return any(name.endswith(_FUSED) for name in names)


def log_skipped_layers(config: ModelConfig, names: Iterable[str]) -> None:
    """Says so where the checkpoint has layers behind the last one, which predict further tokens and are not run."""
    numbers = {int(found[1]) for name in names if (found := _LAYER.match(name))}
    skipped = sorted(number for number in numbers if number >= config.num_layers)
    if skipped:
        log.info("layers %s of the checkpoint predict further tokens; they are not read", ", ".join(map(str, skipped)))
