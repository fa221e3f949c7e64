"""Moves routed experts between ranks while they serve.

    stage      every rank reads what it lacks of a new placement and keeps it beside the running model
    switch     every rank changes over before the same step; what its slots keep is not touched
    regroup    between two generations, other ranks: what only lost ones held is read now

Each staged placement has a number, its epoch. What decides on the step is not here: the first ranks agree by their
common beat (`parallel/pulse.py`), and each tells its followers with the step's plan.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from scheduler.experts import ExpertPlacement
from workers.memory import free_bytes
from workers.model.experts import Expert
from workers.model.moe import MoE
from workers.parallel.all_to_all import AllToAllDispatch
from workers.parallel.exchange import Exchange
from workers.report import ExpertLoads, Holdings
from workers.weights.experts import ExpertReader

__all__ = ["Relocation"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A slot's content is the number of the slot that has it now, or an expert that was read for it."""

    dispatch: AllToAllDispatch
    slots: tuple[int | Expert, ...]


@dataclass(frozen=True, slots=True)
class _Staged:
    base: int  # the epoch in force whose slots it refers to
    layers: dict[int, _Layer]


class Relocation:
    """One rank's experts. `stage` and `wait` may take long, in a thread of the caller's; `switch` is for the step's
    thread, between steps."""

    def __init__(self, mixtures: Mapping[int, MoE], reader: ExpertReader) -> None:
        self._mixtures = mixtures
        self._reader = reader
        self._changed = threading.Condition()
        self._staged: dict[int, _Staged] = {}
        self._ended = False
        self.epoch = 0

    def loads(self) -> ExpertLoads:
        """Choices counted since the start, and where each layer's experts live now."""
        with self._changed:
            return ExpertLoads(
                epoch=self.epoch,
                layers=tuple(self._mixtures),
                counts=tuple(tuple(mixture.counts.tolist()) for mixture in self._mixtures.values()),
                slots=tuple(_dispatch(mixture).placement.slots for mixture in self._mixtures.values()),
            )

    @torch.inference_mode()
    def stage(self, epoch: int, placements: Mapping[int, ExpertPlacement]) -> int:
        """Prepares new placements of some layers; the bytes that this took.

        Raises ValueError for a placement that does not fit the model or the ranks, or memory that does not suffice.
        """
        started_s = time.monotonic()
        with self._changed:
            if epoch <= self.epoch:
                raise ValueError(f"epoch {epoch} is not new")
            base = self.epoch
            now = {number: self._dispatch_of(number, placement) for number, placement in placements.items()}
        dispatches = {number: now[number].relocated(placement) for number, placement in placements.items()}
        size_bytes, layers = self._prepare(now, dispatches)
        with self._changed:
            self._staged = {epoch: _Staged(base, layers)}  # what a leader before this one left is given up
        log.info("experts of epoch %d: %d bytes read in %.2f s", epoch, size_bytes, time.monotonic() - started_s)
        return size_bytes

    def holdings(self) -> Holdings:
        """What this rank has in memory, whatever placement the others may follow."""
        with self._changed:
            dispatches = [_dispatch(mixture) for mixture in self._mixtures.values()]
            return Holdings(
                epoch=self.epoch,
                layers=tuple(self._mixtures),
                experts=tuple(dispatch.held for dispatch in dispatches),
                num_experts=dispatches[0].placement.num_experts if dispatches else 0,
            )

    @torch.inference_mode()
    def regroup(self, epoch: int, exchange: Exchange, placements: Mapping[int, ExpertPlacement]) -> int:
        """Puts new placements of all layers in force, among the ranks of `exchange`; the bytes that had to be read.

        For a rank at rest. Raises ValueError, and changes nothing, where memory does not suffice.
        """
        assert placements.keys() == self._mixtures.keys()
        with self._changed:
            now = {number: _dispatch(mixture) for number, mixture in self._mixtures.items()}
        dispatches = {number: now[number].regrouped(exchange, placement) for number, placement in placements.items()}
        size_bytes, layers = self._prepare(now, dispatches)
        with self._changed:
            self._ended = False
            self._put(layers)
            self.epoch = max(epoch, self.epoch)
            self._staged.clear()
            self._changed.notify_all()
        return size_bytes

    def check(self, epoch: int) -> None:
        """Raises ValueError where `switch` could not go to that epoch."""
        with self._changed:
            self._ready(epoch)

    def switch(self, epoch: int) -> None:
        with self._changed:
            self._put(self._ready(epoch).layers)
            self.epoch = epoch
            # Whatever else was staged refers to slots that are no more.
            self._staged.clear()
            self._changed.notify_all()

    def wait(self, epoch: int, timeout_s: float) -> None:
        """Until `switch` has gone there. Raises TimeoutError, or RuntimeError where no step follows any more."""
        with self._changed:
            self._changed.wait_for(lambda: self.epoch >= epoch or self._ended, timeout_s)
            if self.epoch >= epoch:
                return
            if self._ended:
                raise RuntimeError("the rank runs no more steps")
        raise TimeoutError(f"the ranks did not agree on epoch {epoch} in {timeout_s:g} s")

    def end(self) -> None:
        """No step follows."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _prepare(
        self, now: Mapping[int, AllToAllDispatch], wanted: Mapping[int, AllToAllDispatch]
    ) -> tuple[int, dict[int, _Layer]]:
        """Reads what this rank lacks of the wanted dispatches; its bytes, and the layers as they will be."""
        missing = [
            (number, expert)
            for number, dispatch in wanted.items()
            for expert in dispatch.held
            if expert not in now[number].held
        ]
        size_bytes = self._check_memory(missing) if missing else 0
        read: dict[tuple[int, int], Expert] = {}
        for number, expert, gate_up, down in self._reader.read(missing) if missing else ():
            read[number, expert] = self._mixtures[number].experts.build(gate_up, down)
        layers = {}
        for number, dispatch in wanted.items():
            held = {expert: slot for slot, expert in enumerate(now[number].held)}
            slots = (held[expert] if expert in held else read[number, expert] for expert in dispatch.held)
            layers[number] = _Layer(dispatch, tuple(slots))
        return size_bytes, layers

    def _put(self, layers: Mapping[int, _Layer]) -> None:
        for number, layer in layers.items():
            mixture = self._mixtures[number]
            mixture.relocate(layer.dispatch, mixture.experts.rearranged(layer.slots))

    def _ready(self, epoch: int) -> _Staged:
        staged = self._staged.get(epoch)
        if staged is None or staged.base != self.epoch:
            raise ValueError(f"epoch {epoch} is not staged")
        return staged

    def _dispatch_of(self, layer: int, placement: ExpertPlacement) -> AllToAllDispatch:
        """The layer's dispatch as it is now. Raises ValueError where `placement` is not one of that layer."""
        mixture = self._mixtures.get(layer)
        if mixture is None:
            raise ValueError(f"layer {layer} has no routed experts")
        dispatch = _dispatch(mixture)
        current = dispatch.placement
        if (placement.num_experts, placement.num_ranks) != (current.num_experts, current.num_ranks):
            raise ValueError(
                f"a placement of layer {layer} is of {current.num_experts} experts on {current.num_ranks} ranks, "
                f"not of {placement.num_experts} on {placement.num_ranks}"
            )
        return dispatch

    def _check_memory(self, wanted: list[tuple[int, int]]) -> int:
        size_bytes = self._reader.size_bytes(wanted)
        if size_bytes > free_bytes(self._reader.device):
            raise ValueError(f"no memory for {len(wanted)} more experts ({size_bytes} bytes)")
        return size_bytes


def _dispatch(mixture: MoE) -> AllToAllDispatch:
    assert isinstance(mixture.dispatch, AllToAllDispatch)
    return mixture.dispatch
