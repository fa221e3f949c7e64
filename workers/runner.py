"""Runs steps on this rank: numbers in, logits out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from workers.cache import KVCache
from workers.graphs import Capture, DecodeGraphs
from workers.inputs import StepInputs
from workers.model.config import ModelConfig
from workers.model.moe import MoE, RoutingRecorder
from workers.parallel.static_dispatch import StaticDispatch
from workers.relocation import Relocation
from workers.step import StepTensors, build_tensors

__all__ = ["Model", "Report", "Runner"]

log = logging.getLogger(__name__)


class Model(Protocol):
    """One rank's part of a model; see `workers.model.decoder.Decoder`."""

    @property
    def mixtures(self) -> Mapping[int, MoE]: ...

    @property
    def cache_rows(self) -> list[int]: ...

    @property
    def ragged(self) -> bool: ...

    def record_routing(self, recorder: RoutingRecorder | None) -> None: ...

    def forward(self, step: StepTensors, cache: KVCache) -> torch.Tensor | None: ...

    def keep_step(self, nothing: torch.Tensor) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a rank made of its settings, for status and logs."""

    architecture: str
    dtype: str
    device: str
    kernels: str
    collectives: str
    dispatch: str  # empty for a model without experts
    weight_bytes: int
    cache_bytes: int
    num_blocks: int
    block_size: int
    bytes_read: int
    load_s: float


class Runner:
    """One rank's part of a model with its cache. Not thread-safe: one step at a time.

    `experts` can move between steps, where they are spread over DP groups; None elsewhere.
    """

    def __init__(
        self,
        decoder: Model,
        cache: KVCache,
        *,
        model_config: ModelConfig,
        report: Report,
        experts: Relocation | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self.experts = experts
        self._cache = cache
        self._dtype = dtype
        self._device = device
        self.model_config = model_config
        self.report = report
        self._kernels = report.kernels
        self._graphs: DecodeGraphs | None = None
        self._meetings: Callable[[], int] = lambda: 1
        self._recorded_at = 1
        self._records_routing = False

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache, the same on every rank of the tensor axis."""
        return self._cache.num_blocks

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Those of this rank's layers that have routed experts."""
        return tuple(self._decoder.mixtures)

    def record_routing(self, recorder: RoutingRecorder | None) -> None:
        """Tells `recorder` of every expert choice from the next step on; None stops that."""
        self._records_routing = recorder is not None  # a replayed step would not tell of its choices
        self._decoder.record_routing(recorder)

    @torch.inference_mode()
    def forward(self, inputs: StepInputs) -> torch.Tensor | None:
        """Logits [sum(num_logits), vocabulary] in fp32 and the plan's order; None but at tensor index 0.

        Every rank of the tensor axis must run the same steps in the same order.
        """
        step = build_tensors(
            inputs, self._cache.block_size, dtype=self._dtype, device=self._device, ragged=self._decoder.ragged
        )
        if (recorded := self._recorded(step)) is not None:
            return recorded.run(step)
        return self._decoder.forward(step, self._cache)

    def cannot_record(self) -> str | None:
        """Why steps of this model cannot be recorded; None where they can."""
        if not self._decoder.ragged:
            return "attention asks for lengths on the host"
        kinds = {
            mixture.dispatch.kind
            for mixture in self._decoder.mixtures.values()
            if not isinstance(mixture.dispatch, StaticDispatch)
        }
        return f"experts' counts are wanted on the host ({', '.join(sorted(kinds))})" if kinds else None

    @torch.inference_mode()
    def record_decoding(
        self, capture: Capture, *, max_batch_size: int, max_model_len: int, meetings: Callable[[], int] = lambda: 1
    ) -> None:
        """Records steps of decoding alone, to be replayed from now on, where `cannot_record` gives no reason.

        `meetings` rises when the ranks of the tensor axis meet anew: what was recorded speaks to those of before.
        """
        assert self.cannot_record() is None
        self._graphs = DecodeGraphs(
            lambda step: self._decoder.forward(step, self._cache),
            capture,
            max_batch_size=max_batch_size,
            blocks_per_sequence=-(-max_model_len // self._cache.block_size),
            block_size=self._cache.block_size,
            device=self._device,
        )
        self._meetings, self._recorded_at = meetings, meetings()
        for mixture in self._decoder.mixtures.values():
            mixture.counts.zero_()  # of the recordings' own tokens
        self._say("CUDA graphs for decoding")

    def say_not_recorded(self, reason: str) -> None:
        """Has the report tell that, and why, every step is launched anew."""
        self._say(f"no CUDA graphs: {reason}")

    def _say(self, words: str) -> None:
        self.report = replace(self.report, kernels=f"{self._kernels}; {words}")

    def _recorded(self, step: StepTensors) -> DecodeGraphs | None:
        """What replays the step, if it may."""
        if self._graphs is not None and self._meetings() != self._recorded_at:
            self._graphs = None
            log.warning("decoding is no longer replayed: its recordings were of an earlier generation's ranks")
            self.say_not_recorded("the ranks have met anew since they were recorded")
        if self._graphs is None or self._records_routing or not self._graphs.covers(step):
            return None
        return self._graphs

    @torch.inference_mode()
    def keep_step(self) -> None:
        """Takes part in a step of other DP groups for which this one has no tokens."""
        self._decoder.keep_step(torch.empty(0, self.model_config.hidden_size, dtype=self._dtype, device=self._device))
