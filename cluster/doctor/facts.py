"""What one machine tells of itself; plain values, judged elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.front_door.tls import TlsFiles

__all__ = ["Interface", "Link", "ModelThere", "NodeFacts", "Wanted"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is to run. An empty `model_path` or no `ports`: that is not looked at."""

    model_path: str = ""
    ports: tuple[int, ...] = ()
    host: str = "127.0.0.1"
    interface: str | None = None
    tensor: int = 1
    device: str = "cpu"
    tls: TlsFiles | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Interface:
    """A network interface; `mbits_per_s` is 0 where the driver does not say."""

    name: str
    addresses: tuple[str, ...]
    up: bool
    mbits_per_s: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelThere:
    """A model's folder as a machine sees it; `problem` is empty where it is complete, and `digest` the same wherever
    the same files lie."""

    problem: str = ""
    digest: str = ""
    weight_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """`address` is the one that others reach it at. `clock_ahead_s` is against the asking machine, known to within
    `clock_error_s`."""

    name: str
    address: str
    versions: Mapping[str, str] = field(default_factory=dict)
    interfaces: tuple[Interface, ...] = ()
    clock_ahead_s: float = 0.0
    clock_error_s: float = 0.0
    lookup_s: float = 0.0  # until its own address had a name, or was known to have none
    shared_memory_bytes: int = 0
    shared_memory_free_bytes: int = 0
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    disk_free_bytes: Mapping[str, int] = field(default_factory=dict)  # by folder
    compiler: str = ""
    sums_compiled: bool = False  # DeepSpeed's shared-memory collective
    model: ModelThere | None = None
    taken_ports: tuple[int, ...] = ()
    serving: bool = False  # a front door of ours answers at the first of the ports
    tls_problem: str = ""  # why the doors cannot use the certificate
    cores: int = 0
    gpus: int = 0
    token_auth: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What two machines found between them; `problem` is empty where they met."""

    first: str
    second: str
    kind: str = "gloo"
    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    problem: str = ""
