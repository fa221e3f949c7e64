"""What a rank is told at its start. Every value is resolved: "auto" ends in cluster's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.settings import SchedulingSettings
from workers.parallel.plan import ParallelPlan

__all__ = ["EngineSettings", "ExpertBalance"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertBalance:
    """Every `interval_s` experts move, if a step waits `threshold` times as long for the most loaded ranks as for
    even ones."""

    interval_s: float
    threshold: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """The same for every rank of an engine.

    `cache_bytes` is the KV cache's size per rank, or None to measure: then `memory_fraction` of the memory that is
    free after loading is taken. `memory_limit_bytes` bounds weights and cache of one rank together. With `overlap`, the
    next step is planned while one runs. `plan_reasons` say why the plan was chosen, where it was not given.
    """

    engine: str
    model_name: str
    model_path: str
    plan: ParallelPlan
    plan_reasons: tuple[str, ...] = ()
    dtype: str  # "bfloat16", "float16" or "float32"
    device: str  # "cpu" or "cuda"
    quantization: str = "none"
    num_threads: int = 1
    max_model_len: int
    max_batch_size: int = 64
    max_batch_tokens: int = 2048
    block_size: int = 16
    cache_bytes: int | None = None
    memory_fraction: float = 0.5
    memory_limit_bytes: int | None = None
    deterministic: bool = False
    step_timeout_s: float = 3.0
    load_timeout_s: float = 1800.0
    load_niceness: int = 0  # of the threads that load, where others serve meanwhile
    resume_window_s: float = 60.0  # how long a group keeps what it knows of a sequence that ended
    collectives: str = "auto"  # "auto", "shm", "gloo" or "nccl"
    expert_balance: ExpertBalance | None = None  # None: experts stay where they began
    record_routing: str | None = None  # a folder for every expert choice, to try placements on
    scheduling: SchedulingSettings = field(default_factory=SchedulingSettings)
    overlap: bool = False
    record_steps: str | None = None  # a folder for the size and time of every step, to fit the simulator to
