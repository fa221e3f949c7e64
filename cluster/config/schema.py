"""What the configuration file may say: one dataclass a section, every key optional, defaults here and nowhere else.

`"auto"` is a value like any other; `cluster.config.resolve` turns it into what the machine and the model ask for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

__all__ = [
    "ChaosSection",
    "ClusterSection",
    "Config",
    "ExpertBalanceSection",
    "InferenceSection",
    "ModelSection",
    "ParallelSection",
    "ResourcesSection",
    "SecuritySection",
    "TelemetrySection",
]

_FORBID_EXTRA = {"extra": "forbid", "allow_inf_nan": False}

Auto = Literal["auto"]
AtLeastOne = Annotated[int, Ge(1)]
Port = Annotated[int, Ge(0), Le(65535)]
Seconds = Annotated[float, Gt(0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """`path` is a folder, a Hugging Face name or a short name of `shoal models list`; clients call the model `name`."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    path: str = "smollm2-135m"
    name: str | None = None
    models_dir: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSection:
    """How one engine is cut over ranks."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    data: AtLeastOne = 1
    pipeline: AtLeastOne = 1
    tensor: AtLeastOne = 1
    redundant_experts: Annotated[int, Ge(0)] = 0


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
    max_waiting: AtLeastOne = 1024
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
class ResourcesSection:
    """What the engines may take of a machine. `memory_limit` is a share ("80%") or a size ("8GiB"), of all ranks
    of the machine together; `cache_size` is a size per rank, measured where it is "auto"."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    gpus: Auto | Annotated[int, Ge(0)] = "auto"
    cpu_threads: Auto | AtLeastOne = "auto"
    memory_limit: str = "80%"
    cache_size: str = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class SecuritySection:
    """`api_key` is one key, or several by the name of who holds them; `administrators` are the names that may drain,
    scale, roll out and harm (a lone key is called "default"). `insecure` states that an address other than loopback
    may be served without a key."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    api_key: str | dict[str, str] | None = None
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
class ClusterSection:
    """How many of what, and where. `address` is a running Ray cluster's; without one a local Ray is started."""

    __pydantic_config__: ClassVar[dict[str, object]] = _FORBID_EXTRA
    engines: AtLeastOne = 1
    front_doors: AtLeastOne = 1
    address: str | None = None
    host: str = "127.0.0.1"
    port: Port = 9000
    http_port: Port = 8000
    drain_timeout_s: Seconds = 30.0
    resume_window_s: Seconds = 60.0


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
    resources: ResourcesSection = field(default_factory=ResourcesSection)
    security: SecuritySection = field(default_factory=SecuritySection)
    telemetry: TelemetrySection = field(default_factory=TelemetrySection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    chaos: ChaosSection = field(default_factory=ChaosSection)
