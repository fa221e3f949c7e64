"""Cuts a model of transformers over the ranks of the tensor axis with DeepSpeed AutoTP.

AutoTP finds a layer's linear modules, splits those that come first by their outputs and those that end a block by their
inputs, and sums the latter's results. The sums are ours: through the engine's collectives a step ends when a peer dies
(`workers/parallel/collectives.py`), whatever carries them.
"""

from __future__ import annotations

import contextlib
import io
import logging
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from workers.parallel.collectives import Collectives, ProcessGroupCollectives

__all__ = ["SumFailed", "cut"]

log = logging.getLogger(__name__)


class SumFailed(RuntimeError):
    """A peer has gone, or does not answer: no fault of the model."""


class _SummedLinear(nn.Module):
    """`sum over ranks of (x @ weight.T) + bias`, of x or of the columns `part` of it."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, tensor: Collectives, part: slice | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._tensor = tensor
        self._part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._part is not None:
            x = x[..., self._part]
        out = x @ self.weight.T
        try:
            out = self._tensor.all_reduce(out)
        except RuntimeError as error:
            raise SumFailed(str(error)) from error
        return out if self.bias is None else out + self.bias


class _Unit:
    """What DeepSpeed asks for a process group that it has not made."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def get_model_parallel_group(self) -> Any:
        return self._group


def cut(model: Any, tensor: Collectives, dtype: torch.dtype, settle_s: tuple[float, float] = (3.0, 1800.0)) -> None:
    """Leaves this rank's part in `model`, which must be whole. All ranks of the engine must call it together.

    Each reads its part meanwhile, and DeepSpeed has them meet at the end: under the second timeout of `settle_s`, in
    place of the group's own, which is the first. Raises ValueError where AutoTP does not know how.
    """
    assert isinstance(tensor, ProcessGroupCollectives)
    import deepspeed

    # It takes the size from the one and the group from the other.
    group = {"mpu": _Unit(tensor.step_group), "tp_group": tensor.step_group}
    printed = io.StringIO()
    step_s, load_s = (timedelta(seconds=seconds) for seconds in settle_s)
    _set_pg_timeout(load_s, tensor.step_group)
    try:
        with contextlib.redirect_stdout(printed):
            deepspeed.init_inference(
                model,
                tensor_parallel={"tp_size": tensor.size, **group},
                dtype=dtype,
                replace_with_kernel_inject=False,
            )
    except (AssertionError, AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    finally:
        _set_pg_timeout(step_s, tensor.step_group)
    log.debug("%s", printed.getvalue().strip())
    _take_the_sums(model, tensor)


def _take_the_sums(model: Any, tensor: Collectives) -> None:
    from deepspeed.module_inject.layers import LinearAllreduce, LmHeadLinearAllreduce

    for name, module in list(model.named_modules()):
        if type(module) is LinearAllreduce:
            ours = _SummedLinear(module.weight, module.bias, tensor)
        elif type(module) is LmHeadLinearAllreduce:
            sizes = module._partition_sizes
            start = sum(sizes[: tensor.index])
            ours = _SummedLinear(module.weight, module.bias, tensor, slice(start, start + sizes[tensor.index]))
        else:
            continue
        model.set_submodule(name, ours)
