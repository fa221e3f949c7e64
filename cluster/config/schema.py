"""What the configuration file may say: one dataclass a section, every key optional, defaults here and nowhere else.

`"auto"` is a value like any other; `cluster.config.resolve` turns it into what the machine and the model ask for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import StringConstraints

__all__ = [
    "ApiKeySection",
    "AutoscaleSection",
    "ChaosSection",
    "ClusterSection",
    "Config",
    "ExpertBalanceSection",
    "FairnessSection",
    "InferenceSection",
    "ModelSection",
    "NetworkSection",
    "ParallelSection",
    "RateLimitSection",
    "ResourcesSection",
    "SchedulingSection",
    "SecuritySection",
    "TelemetrySection",
    "TenantSection",
    "TlsSection",
]

_FORBID_EXTRA = {"extra": "forbid", "allow_inf_nan": False}

Auto = Literal["auto"]
AtLeastOne = Annotated[int, Ge(1)]
Port = Annotated[int, Ge(0), Le(65535)]
AtLeastZero = Annotated[int, Ge(0)]
Seconds = Annotated[float, Gt(0)]
SecondsOrOff = Annotated[float, Ge(0)]
Routing = Literal[
    "even-steps", "least-tokens", "power-of-two", "prefix-affinity", "prefix-affinity-even-steps", "round-robin"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """`path` is a folder, a Hugging Face name or a short name of `shoal models list`; clients call the model `name`."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    path: str = "smollm2-135m"
    name: str | None = None
    models_dir: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSection:
    """How one engine is cut over ranks; the planner chooses what is "auto"."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    data: Auto | AtLeastOne = 1
    pipeline: Auto | AtLeastOne = 1
    tensor: Auto | AtLeastOne = 1
    redundant_experts: Auto | AtLeastZero = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertBalanceSection:
    """Move routed experts between DP groups while they serve: every `interval_s`, if a step waits `threshold` times as
    long for the most loaded ranks as it would for even ones."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    interval_s: Seconds = 60.0
    threshold: Annotated[float, Ge(1)] = 1.2


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceSection:
    """How steps are made. `temperature` and `top_p` are for requests that name none; without them the model's own
    generation_config.json decides."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    dtype: Auto | Literal["bfloat16", "float16", "float32"] = "auto"
    quantization: Literal["none", "fp8", "int8"] = "none"
    max_batch_size: AtLeastOne = 64
    max_batch_tokens: AtLeastOne = 2048
    max_model_len: Auto | AtLeastOne = "auto"
    block_size: AtLeastOne = 16
    temperature: Annotated[float, Ge(0), Le(100)] | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    device_map: Auto | Literal["cpu", "cuda"] = "auto"
    deterministic: bool = False
    collectives: Auto | Literal["shm", "gloo", "nccl"] = "auto"
    step_timeout_s: Seconds = 3.0
    load_timeout_s: Seconds = 1800.0
    expert_balance: ExpertBalanceSection | None = None
    record_routing: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantSection:
    """A tenant's share of each DP group, and its bounds there; 0 is no bound."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    weight: Annotated[float, Gt(0)] = 1.0
    max_requests: AtLeastZero = 0
    max_queued_tokens: AtLeastZero = 0
    max_blocks: AtLeastZero = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FairnessSection:
    """Tenants by the name of their API key, and what holds for all others.

    A token of a prompt costs 1, one of an answer `output_cost`."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    output_cost: Annotated[float, Ge(0)] = 2.0
    default: TenantSection = field(default_factory=TenantSection)
    tenants: dict[str, TenantSection] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulingSection:
    """Who goes first, who shares what with whom, and where a sequence goes. 0 turns a limit off.

    `fairness` is "auto" (between tenants, where there are several API keys), null (off) or a section; `routing` and
    `overlap` are "auto" by the model and the hardware.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    routing: Auto | Routing = "auto"
    overlap: Auto | bool = "auto"
    prefix_cache: bool = True
    share_prefixes: bool = False
    prefix_wait_tokens: AtLeastOne = 64
    target_step_s: SecondsOrOff = 0.0
    min_chunk_tokens: AtLeastOne = 32
    max_prefills: AtLeastOne = 8
    order: Literal["arrival", "deadline"] = "deadline"
    max_waiting: AtLeastOne = 1024
    max_waiting_tokens: AtLeastZero = 0
    max_queue_s: SecondsOrOff = 0.0
    refuse_late: bool = True
    preempt_lower: bool = False
    fairness: Auto | FairnessSection | None = "auto"
    max_open_requests: AtLeastOne = 4096
    max_open_tokens: AtLeastOne = 64_000_000
    background_share: Annotated[float, Gt(0), Le(1)] = 0.8
    record_steps: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourcesSection:
    """What the engines may take of a machine. `memory_limit` is a share ("80%") or a size ("8GiB"), of all ranks
    of the machine together; `cache_size` is a size per rank, measured where it is "auto". `gpu_memory` is what each GPU
    has, for planning where it cannot be found out."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    gpus: Auto | Annotated[int, Ge(0)] = "auto"
    gpu_memory: str = "auto"
    cpu_threads: Auto | AtLeastOne = "auto"
    memory_limit: str = "80%"
    cache_size: str = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class RateLimitSection:
    """What one tenant may ask of a front door; null is no bound."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    requests_per_minute: AtLeastOne | None = None
    tokens_per_minute: AtLeastOne | None = None
    max_open: AtLeastOne | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKeySection:
    """A tenant's key, given here, in a file or in a variable of the environment, and the tenant's own limits."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    tenant: Annotated[str, MinLen(1)]
    key: str | None = None
    key_file: str | None = None
    key_env: str | None = None
    role: Literal["user", "admin"] = "user"
    requests_per_minute: AtLeastOne | None = None
    tokens_per_minute: AtLeastOne | None = None
    max_open: AtLeastOne | None = None
    weight: Annotated[float, Gt(0)] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsSection:
    """Files in PEM, on every machine that has a front door; with `client_ca` clients must show a certificate too."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    cert: str
    key: str
    client_ca: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SecuritySection:
    """`api_key` is one key, or several by the name of who holds them; `api_keys` says more of each; `rate_limit` is for
    every tenant that has no limits of its own; `administrators` are the names that may drain,
    scale, roll out and harm (a lone key is called "default"). `insecure` states that an address other than loopback
    may be served without a key."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    api_key: str | dict[str, str] | None = None
    api_keys: tuple[ApiKeySection, ...] = ()
    rate_limit: RateLimitSection | None = None
    tls: TlsSection | None = None
    insecure: bool = False
    cors_origin: tuple[str, ...] = ()
    administrators: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetrySection:
    """Traces go to `otlp_endpoint` (gRPC), or to OTEL_EXPORTER_OTLP_ENDPOINT; without either there are none."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    otlp_endpoint: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSection:
    """Where ranks speak to each other. `interface` must be on every node; `nccl` holds NCCL's own variables, such as
    NCCL_IB_HCA, for every rank. Over slow `links` between nodes the planner spreads no experts."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    interface: str | None = None
    links: Auto | Literal["fast", "slow"] = "auto"
    nccl: dict[Annotated[str, StringConstraints(pattern="^NCCL_[A-Z0-9_]+$")], str | int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscaleSection:
    """Engines come when more than `most_waiting` sequences wait per engine or more than `cache_high` of the KV cache is
    in use for `up_after_s`, and go when `cache_low` would not be reached with one fewer for `down_after_s`."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    least: AtLeastOne = 1
    most: AtLeastOne = 4
    most_waiting: Annotated[float, Gt(0)] = 4.0
    cache_high: Annotated[float, Gt(0), Le(1)] = 0.85
    cache_low: Annotated[float, Ge(0), Le(1)] = 0.4
    up_after_s: Seconds = 10.0
    down_after_s: Seconds = 120.0
    pause_s: Seconds = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSection:
    """How many of what, and where. `address` is a running Ray cluster's; without one a local Ray is started, with room
    for `max_engines` at once (a rollout has old and new ones side by side).

    `start_timeout_s` bounds a start without the time for loading, which `inference.load_timeout_s` bounds.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    engines: AtLeastOne = 1
    front_doors: AtLeastOne = 1
    address: str | None = None
    host: str = "127.0.0.1"
    port: Port = 9000
    http_port: Port = 8000
    drain_timeout_s: Seconds = 30.0
    resume_window_s: Seconds = 60.0
    start_timeout_s: Seconds = 180.0
    network: NetworkSection = field(default_factory=NetworkSection)
    max_engines: Auto | AtLeastOne = "auto"
    autoscale: AutoscaleSection | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosSection:
    """`enabled`: administrators may kill, freeze and slow down processes with `shoal chaos`."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    enabled: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole file."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    model: ModelSection = field(default_factory=ModelSection)
    parallel: ParallelSection | Auto = field(default_factory=ParallelSection)
    inference: InferenceSection = field(default_factory=InferenceSection)
    scheduling: SchedulingSection = field(default_factory=SchedulingSection)
    resources: ResourcesSection = field(default_factory=ResourcesSection)
    security: SecuritySection = field(default_factory=SecuritySection)
    telemetry: TelemetrySection = field(default_factory=TelemetrySection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    chaos: ChaosSection = field(default_factory=ChaosSection)
