"""What a rank tells its leader."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from scheduler.batcher import BatcherLoad

__all__ = ["ExpertLoads", "Holdings", "LoadReport", "Outdated", "RankAddress", "RankState", "RankStatus"]


class Outdated(RuntimeError):
    """Somebody speaks for a generation that is over."""


class RankState(StrEnum):
    """How far a rank has come."""

    NEW = "new"
    OPEN = "open"
    JOINED = "joined"
    LOADING = "loading"
    LOADED = "loaded"
    RUNNING = "running"
    INTERRUPTED = "interrupted"  # its generation is over; with all it holds it waits for the next one
    BROKEN = "broken"  # its group failed; it answers, and will run no step
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class RankAddress:
    """Where a rank is. `plan_port` is 0 but for the first rank of a DP group that has others."""

    rank: int
    host: str
    plan_port: int
    pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What loading made."""

    load_s: float
    bytes_read: int
    weight_bytes: int
    cache_bytes: int
    num_blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoads:
    """How often the tokens of a rank's group chose each expert since the start, and where the experts live.

    `counts[n]` and `slots[n]` are of layer `layers[n]`: one count per expert, and for every rank of the stage the
    experts of its slots, since the placement numbered `epoch`.
    """

    epoch: int
    layers: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Holdings:
    """The routed experts in this rank's memory: of each layer, in the order of its slots."""

    epoch: int = 0
    layers: tuple[int, ...] = ()
    experts: tuple[tuple[int, ...], ...] = ()
    num_experts: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStatus:
    """A rank at this moment; what is not known yet is empty. `reason` says why a rank is broken or interrupted."""

    rank: int
    dp_group: int
    state: RankState
    reason: str
    host: str
    pid: int
    generation: int
    newest_generation: int = 0  # that a leader has named, in force or not
    device: str
    dtype: str
    threads: int
    weight_bytes: int = 0
    cache_bytes: int = 0
    num_blocks: int = 0
    block_size: int
    load_s: float = 0.0
    collectives: str = ""
    dispatch: str = ""  # how rows reach their experts; empty for a model without
    kernels: str = ""
    session: str = ""  # host:port at the first rank of a DP group
    plan_port: int = 0  # as in its address
    load: BatcherLoad | None = None
    expert_epoch: int = 0  # which placement of the routed experts is in force; 0 is the first
    expert_tokens: int = 0  # expert choices of the group's tokens since the start, over all layers
    warnings: tuple[str, ...] = ()  # every fallback in force
