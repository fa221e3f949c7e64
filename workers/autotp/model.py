"""A causal language model of transformers as a step's runner sees it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from workers.autotp.attention import AttentionLayer, PagedStep, Survey
from workers.cache import KVCache
from workers.model.moe import MoE, RoutingRecorder
from workers.step import StepTensors

__all__ = ["AdoptedModel"]


class AdoptedModel:
    """The same face as `workers.model.decoder.Decoder`. `model` attends with `paged_attention`.

    `first` says whether this rank is at index 0 of the tensor axis. Raises ValueError for a model that cannot run so.
    """

    ragged = False  # attention is torch's: it wants sequences of about one length together

    def __init__(self, model: Any, *, first: bool, num_layers: int, device: torch.device) -> None:
        parameters = inspect.signature(model.forward).parameters
        for name in ("position_ids", "logits_to_keep"):
            if name not in parameters:
                raise ValueError(f"a {model.config.model_type} model takes no {name}")
        self._model = model
        self._first = first
        self.mixtures: Mapping[int, MoE] = {}
        layers = _survey(model, device)
        if len(layers) != num_layers:
            raise ValueError(
                f"{len(layers)} of the {num_layers} layers of this {model.config.model_type} model attend through the "
                "interface that our cache needs; what the others keep of the past would be lost"
            )
        self.layers = tuple(layers.values())
        self._numbers = {module: number for number, module in enumerate(layers)}

    @property
    def cache_rows(self) -> list[int]:
        """Elements per token that each layer keeps on this rank."""
        return [layer.cache_row for layer in self.layers]

    def record_routing(self, recorder: RoutingRecorder | None) -> None:
        assert recorder is None, "what this model's experts are chosen by is its own affair"

    def forward(self, step: StepTensors, cache: KVCache) -> torch.Tensor | None:
        """See `Decoder.forward`."""
        rows = step.logit_rows
        count = len(step.token_ids) if rows is None else len(rows)
        if rows is None:
            rows = torch.arange(count, device=step.token_ids.device)
        elif not count:
            rows = rows.new_zeros(1)  # a sum over ranks of nothing at all is not worth finding out about
        paged = PagedStep(step, cache, self._numbers)
        logits = _run(self._model, step.token_ids, step.positions, rows, paged)
        return logits[:count].float() if self._first else None

    def keep_step(self, nothing: torch.Tensor) -> None:
        raise AssertionError("groups of a model without spread experts share no steps")


def _survey(model: Any, device: torch.device) -> dict[nn.Module, AttentionLayer]:
    survey = Survey()
    token_ids = torch.arange(4, device=device)
    _run(model, token_ids, token_ids, token_ids, survey)
    return survey.layers


def _run(
    model: Any, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, paged: PagedStep | Survey
) -> torch.Tensor:
    """Logits [rows, vocabulary] of one pass."""
    output = model(
        input_ids=token_ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows, paged=paged
    )
    logits: torch.Tensor = output.logits[0]
    return logits
