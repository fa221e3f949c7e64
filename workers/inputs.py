"""The numbers of a step: what every rank of a DP group must know to run the same forward pass.

They are the numeric part of the batcher's plan, in the plan's order, and cross processes as a proto.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from protos.shoal.v1 import session_pb2
from scheduler.plan import StepPlan

__all__ = ["Ints", "StepInputs"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """Per sequence, in the plan's order; `token_ids` and `block_ids` are the sequences' own, concatenated."""

    generation: int
    step: int
    token_ids: Ints
    num_tokens: Ints
    num_computed: Ints
    block_ids: Ints
    num_blocks: Ints
    num_logits: Ints

    @classmethod
    def from_plan(cls, plan: StepPlan) -> StepInputs:
        """Copies what it needs: the plan's histories may grow afterwards."""
        sequences = plan.sequences
        tokens = [s.history[s.num_computed : s.num_computed + s.num_tokens] for s in sequences]
        return cls(
            generation=plan.generation,
            step=plan.step,
            token_ids=_array(chain.from_iterable(tokens)),
            num_tokens=_array(s.num_tokens for s in sequences),
            num_computed=_array(s.num_computed for s in sequences),
            block_ids=_array(chain.from_iterable(s.block_ids for s in sequences)),
            num_blocks=_array(len(s.block_ids) for s in sequences),
            num_logits=_array(s.num_logits for s in sequences),
        )

    @classmethod
    def from_proto(cls, message: session_pb2.StepPlan) -> StepInputs:
        return cls(
            generation=message.generation,
            step=message.step,
            token_ids=_array(message.token_ids),
            num_tokens=_array(message.num_tokens),
            num_computed=_array(message.num_computed),
            block_ids=_array(message.block_ids),
            num_blocks=_array(message.num_blocks),
            num_logits=_array(message.num_logits),
        )

    def to_proto(self) -> session_pb2.StepPlan:
        return session_pb2.StepPlan(
            generation=self.generation,
            step=self.step,
            token_ids=self.token_ids.tolist(),
            num_tokens=self.num_tokens.tolist(),
            num_computed=self.num_computed.tolist(),
            block_ids=self.block_ids.tolist(),
            num_blocks=self.num_blocks.tolist(),
            num_logits=self.num_logits.tolist(),
        )


def _array(values: object) -> Ints:
    return np.fromiter(values, dtype=np.int64)  # type: ignore[call-overload, no-any-return]
