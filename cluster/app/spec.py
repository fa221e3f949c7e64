"""What the processes of a run are told by the one that starts them."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.config.network import NetworkSettings
from cluster.front_door.limits import Limits
from cluster.front_door.model_card import ModelCard
from cluster.front_door.quotas import Quotas
from cluster.front_door.tls import TlsFiles
from scheduler.autoscale import AutoscaleSettings
from workers.settings import EngineSettings

__all__ = ["ClusterSpec"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSpec:
    """The same for every replica of every deployment; all in it is resolved."""

    settings: EngineSettings
    card: ModelCard
    secret: str = field(repr=False)
    api_keys: dict[str, tuple[str, ...]] = field(repr=False)
    cors_origins: tuple[str, ...]
    rank_host: str | None  # where ranks listen for each other and for front doors; None: their nodes' addresses
    host: str
    grpc_port: int
    http_port: int
    limits: Limits
    routing: str
    engines: int
    front_doors: int
    drain_timeout_s: float
    start_timeout_s: float
    network: NetworkSettings = field(default_factory=NetworkSettings)
    log_level: str
    otlp_endpoint: str | None
    max_engines: int = 1  # room for so many at once, on a Ray of our own
    autoscale: AutoscaleSettings | None = None
    version: str = "1"  # of the engines; a rollout brings another
    administrators: tuple[str, ...] = ()
    chaos: bool = False
    quotas: Quotas = field(default_factory=Quotas)
    tls: TlsFiles | None = None
    warnings: tuple[str, ...] = ()
