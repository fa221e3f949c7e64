"""What the file asks of a plan, and what of it can be refused without looking at memory."""

from __future__ import annotations

from dataclasses import replace

from cluster.config.schema import Config, ParallelSection
from cluster.config.sizes import parse_size
from cluster.models.folder import ModelFacts
from scheduler.planner.candidates import MOST_DETERMINISTIC_TENSOR
from scheduler.planner.shape import Wishes
from workers.model.other_config import NOTICE
from workers.model.sharding import check_plan
from workers.parallel.plan import ParallelPlan

__all__ = ["asked_plan", "cache_bytes", "check_asked", "wishes_of"]


def wishes_of(config: Config, model: ModelFacts) -> Wishes:
    """An axis that is "auto" is the planner's to choose. Raises ValueError."""
    section = config.parallel
    if section == "auto":
        section = ParallelSection(data="auto", pipeline="auto", tensor="auto", redundant_experts="auto")
    inference = config.inference
    return Wishes(
        max_model_len=_max_model_len(config, model),
        max_batch_size=inference.max_batch_size,
        block_size=inference.block_size,
        deterministic=inference.deterministic,
        cache_bytes=cache_bytes(config),
        data=None if section.data == "auto" else section.data,
        pipeline=None if section.pipeline == "auto" else section.pipeline,
        tensor=None if section.tensor == "auto" else section.tensor,
        redundant_experts=None if section.redundant_experts == "auto" else section.redundant_experts,
    )


def asked_plan(wishes: Wishes) -> ParallelPlan:
    """What was asked for, with one for what was not."""
    return ParallelPlan(
        data=wishes.data or 1,
        pipeline=wishes.pipeline or 1,
        tensor=wishes.tensor or 1,
        redundant_experts=wishes.redundant_experts or 0,
    )


def check_asked(config: Config, model: ModelFacts, wishes: Wishes) -> None:
    """Raises ValueError naming the key at fault and what would work."""
    plan, inference = asked_plan(wishes), config.inference
    copies = plan.redundant_experts if wishes.data is not None or model.config.moe is None else 0
    check_plan(model.config, replace(plan, redundant_experts=copies))
    if inference.deterministic and plan.tensor > MOST_DETERMINISTIC_TENSOR:
        raise ValueError(
            f"parallel.tensor {plan.tensor}: inference.deterministic takes 1 or 2, since a sum over more ranks is made "
            "in an order that depends on how much is summed"
        )
    if inference.quantization == "fp8" and model.config.quantization is None:
        raise ValueError(
            "inference.quantization: fp8 needs a checkpoint in FP8, which `shoal convert` makes; none and int8 work"
        )
    if inference.quantization != "none" and not model.config.native:
        raise ValueError(f"inference.quantization: must be none for a {model.config.model_type} model, which {NOTICE}")


def cache_bytes(config: Config) -> int | None:
    """Of a rank; None where it is measured. Raises ValueError."""
    size = config.resources.cache_size
    return None if size == "auto" else parse_size(size, "resources.cache_size")


def _max_model_len(config: Config, model: ModelFacts) -> int:
    wanted = config.inference.max_model_len
    if wanted == "auto":
        return model.config.max_position_embeddings
    if wanted > model.config.max_position_embeddings:
        raise ValueError(
            f"inference.max_model_len: {wanted} is beyond the model's {model.config.max_position_embeddings} positions"
        )
    return wanted
