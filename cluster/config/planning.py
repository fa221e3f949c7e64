"""The plan of an engine: what the file says of it, and the planner's choice where it says "auto".

Either is held against heads, experts, layers, ranks and memory before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cluster.config.cluster_shape import cluster_shape
from cluster.config.hardware import resolve_device, resolve_dtype
from cluster.config.machine import Machine
from cluster.config.model_shape import model_shape, step_bytes
from cluster.config.schema import Config
from cluster.config.wishes import asked_plan, check_asked, wishes_of
from cluster.models.folder import ModelFacts
from scheduler.planner.choose import choose
from scheduler.planner.memory import RankMemory
from scheduler.planner.reasons import reasons
from scheduler.planner.refusal import Remedy, refusal
from scheduler.planner.shape import ClusterShape, ModelShape, Wishes
from workers.model.other_config import require_transformers
from workers.model.sharding import check_plan
from workers.parallel.plan import ParallelPlan

__all__ = ["Resolved", "resolve_engine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """`reasons` are empty where the file left nothing to choose; `memory` is None where that of GPUs is not known."""

    device: str
    dtype: str
    max_model_len: int
    plan: ParallelPlan
    reasons: tuple[str, ...]
    memory: RankMemory | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    """What the planner is asked, in the words of the file."""

    config: Config
    model: ModelFacts
    machine: Machine
    device: str
    dtype: str

    def wishes(self) -> Wishes:
        return wishes_of(self.config, self.model)

    def shape(self) -> ModelShape:
        quantization = self.config.inference.quantization
        return model_shape(self.model, dtype=self.dtype, quantization=quantization, packs_head=self.device == "cpu")

    def cluster(self) -> ClusterShape | None:
        inference = self.config.inference
        step = step_bytes(
            self.model.config,
            dtype=self.dtype,
            max_batch_tokens=inference.max_batch_tokens,
            max_batch_size=inference.max_batch_size,
        )
        return cluster_shape(self.config, self.machine, self.device, step_bytes=step, given=not self.wishes().open)


def resolve_engine(config: Config, model: ModelFacts, machine: Machine) -> Resolved:
    """Raises ValueError for a plan that the model or the cluster cannot follow."""
    if not model.config.native:
        require_transformers(model.config.model_type)
    device = resolve_device(config, machine)
    dtype = resolve_dtype(config.inference.dtype, model, machine, device)
    question = _Question(config=config, model=model, machine=machine, device=device, dtype=dtype)
    wishes = question.wishes()
    check_asked(config, model, wishes)
    if not wishes.open and device == "cuda":
        _check_gpus(config, machine, asked_plan(wishes))
    plan, why, memory = _plan(question, wishes)
    return Resolved(
        device=device, dtype=dtype, max_model_len=wishes.max_model_len, plan=plan, reasons=why, memory=memory
    )


def _check_gpus(config: Config, machine: Machine, plan: ParallelPlan) -> None:
    if plan.num_ranks * config.cluster.engines > machine.gpus:
        raise ValueError(f"parallel: {plan} needs {plan.num_ranks} GPUs an engine, {machine.gpus} were found in all")


def _plan(question: _Question, wishes: Wishes) -> tuple[ParallelPlan, tuple[str, ...], RankMemory | None]:
    """The plan, why, and what a rank then holds."""
    shape, cluster = question.shape(), question.cluster()
    if cluster is None:
        if wishes.open:
            raise ValueError("parallel: auto must know the memory of a GPU; say it, as in resources.gpu_memory: 80GB")
        return asked_plan(wishes), (), None  # whether it fits, the ranks find out
    planned = choose(shape, cluster, wishes)
    if planned is None:
        raise ValueError(refusal(shape, cluster, wishes, tuple(_remedies(question))))
    axes = planned.axes
    plan = ParallelPlan(
        data=axes.data, pipeline=axes.pipeline, tensor=axes.tensor, redundant_experts=axes.redundant_experts
    )
    check_plan(question.model.config, plan)
    why = (*reasons(shape, cluster, wishes, planned), *question.machine.notes) if wishes.open else ()
    return plan, why, planned.memory


def _remedies(question: _Question) -> Iterator[Remedy]:
    """Changes of the file that may make a plan fit."""
    for text, other in _changes(question):
        cluster = other.cluster()
        if cluster is not None:
            yield Remedy(text, other.shape(), cluster, other.wishes())


def _changes(question: _Question) -> Iterator[tuple[str, _Question]]:
    config, model = question.config, question.model.config
    inference, resources = config.inference, config.resources
    if inference.quantization == "none" and model.native:
        if model.quantization:
            lighter = replace(inference, quantization="fp8")
            yield "inference.quantization: fp8", replace(question, config=replace(config, inference=lighter))
        lighter = replace(inference, quantization="int8")
        yield "inference.quantization: int8", replace(question, config=replace(config, inference=lighter))
    if question.dtype == "float32":
        yield "inference.dtype: bfloat16", replace(question, dtype="bfloat16")
    if resources.cache_size != "auto":
        measured = replace(resources, cache_size="auto")
        yield "resources.cache_size: auto", replace(question, config=replace(config, resources=measured))
    if question.device == "cpu":
        more = replace(resources, memory_limit="95%")
        yield "resources.memory_limit: 95%", replace(question, config=replace(config, resources=more))
        for engines in range(config.cluster.engines - 1, 0, -1):
            fewer = replace(config.cluster, engines=engines)
            yield f"cluster.engines: {engines}", replace(question, config=replace(config, cluster=fewer))
