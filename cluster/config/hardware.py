"""What the hardware decides: where tensors live, and in which dtype they are computed."""

from __future__ import annotations

from cluster.config.machine import Machine
from cluster.config.model_shape import DTYPE_BYTES
from cluster.config.schema import Config
from cluster.models.folder import ModelFacts

__all__ = ["resolve_device", "resolve_dtype"]


def resolve_device(config: Config, machine: Machine) -> str:
    """ "cuda" where there are GPUs and the configuration lets them be used. Raises ValueError."""
    gpus = machine.gpus if config.resources.gpus == "auto" else config.resources.gpus
    wanted = config.inference.device_map
    if gpus > machine.gpus:
        raise ValueError(f"resources.gpus: {gpus} asked for, {machine.gpus} found")
    if wanted == "cuda" and gpus == 0:
        raise ValueError("inference.device_map: cuda asked for, but no GPU was found")
    return "cuda" if wanted != "cpu" and gpus > 0 else "cpu"


def resolve_dtype(wanted: str, model: ModelFacts, machine: Machine, device: str) -> str:
    """The checkpoint's dtype where the hardware computes in it, float32 where it does not."""
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return model.config.dtype if model.config.dtype in DTYPE_BYTES else "bfloat16"
    return "bfloat16" if machine.fast_bfloat16 and model.config.dtype != "float32" else "float32"
