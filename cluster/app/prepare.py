"""Everything that can be found out, and found wrong, before a process is started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from cluster.app.ports import free_port
from cluster.app.spec import ClusterSpec
from cluster.config import Config, ConfigError
from cluster.config.environment import cache_folder
from cluster.config.load import parse
from cluster.config.machine import Machine
from cluster.config.network import NetworkSettings
from cluster.config.resolve import autoscale_settings, engine_settings
from cluster.config.scheduling import front_door_limits, resolve_routing
from cluster.front_door.call import SamplingOptions
from cluster.front_door.model_card import ModelCard
from cluster.models import catalog
from cluster.models.errors import ModelError
from cluster.models.folder import ModelFacts, inspect
from cluster.models.progress import Progress
from cluster.operations.judge import Limits
from cluster.operations.rollout import Rollout
from cluster.security import administrators, api_keys, new_secret, quotas, tls_files
from cluster.telemetry import endpoint_of
from protos.shoal.v1 import admin_pb2
from workers.model.other_config import NOTICE
from workers.settings import EngineSettings

__all__ = ["prepare", "prepare_rollout"]

# What a client's text goes through: the front doors have the old version's.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class _Found:
    """The model that a configuration names."""

    folder: Path
    name: str
    facts: ModelFacts


def prepare(config: Config, machine: Machine, progress: Progress) -> ClusterSpec:
    """Raises ConfigError, ModelError or PortError."""
    cluster, network = config.cluster, config.cluster.network
    keys = dict(api_keys(config.security))
    operators = _operators(config, keys)
    certificates = tls_files(config.security)
    grpc_port = free_port(cluster.host, cluster.port, key="cluster.port", option="--port")
    http_port = free_port(cluster.host, cluster.http_port, key="cluster.http_port", option="--http-port")
    model = _find(config, progress)
    settings = engine_settings(config, model.facts, machine, name=model.name, folder=model.folder)
    return ClusterSpec(
        settings=settings,
        card=_card(config, model, settings),
        secret=new_secret(),
        api_keys=keys,
        administrators=operators,
        quotas=quotas(config.security),
        max_engines=_max_engines(config),
        autoscale=autoscale_settings(config),
        tls=certificates,
        chaos=config.chaos.enabled,
        cors_origins=config.security.cors_origin,
        rank_host=None if cluster.address else "127.0.0.1",
        host=cluster.host,
        grpc_port=grpc_port,
        http_port=http_port,
        limits=front_door_limits(config),
        routing=resolve_routing(config, settings.plan, spreads_experts=model.facts.config.moe is not None),
        engines=cluster.engines,
        front_doors=cluster.front_doors,
        drain_timeout_s=cluster.drain_timeout_s,
        start_timeout_s=cluster.start_timeout_s,
        network=NetworkSettings(
            interface=network.interface, nccl={name: str(value) for name, value in network.nccl.items()}
        ),
        log_level=config.telemetry.log_level,
        otlp_endpoint=endpoint_of(config.telemetry),
        warnings=tuple(_warnings(config, model.facts, settings, machine)),
    )


def _operators(config: Config, keys: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Who may operate the cluster."""
    found = administrators(config.security, keys)
    if config.chaos.enabled and not found:
        raise ConfigError(
            "chaos.enabled: name who may do it in security.administrators, with a key in security.api_key"
        )
    return found


def _find(config: Config, progress: Progress | None = None) -> _Found:
    """Pulls the model, where that is needed."""
    models_dir = Path(config.model.models_dir).expanduser() if config.model.models_dir else cache_folder()
    folder = catalog.resolve(config.model.path, models_dir, progress)
    facts = inspect(folder)
    return _Found(folder, config.model.name or catalog.model_name(config.model.path, folder), facts)


def _card(config: Config, model: _Found, settings: EngineSettings) -> ModelCard:
    try:
        card = ModelCard.from_folder(
            model.folder,
            name=model.name,
            max_model_len=settings.max_model_len,
            dtype=settings.dtype,
            defaults=SamplingOptions(temperature=config.inference.temperature, top_p=config.inference.top_p),
        )
    except ValueError as error:
        raise ModelError(f"{model.folder}: {error}") from None
    return replace(card, architecture=card.architecture or model.facts.config.model_type)


def _warnings(config: Config, model: ModelFacts, settings: EngineSettings, machine: Machine) -> Iterator[str]:
    if not model.config.native:
        yield f"a {model.config.model_type} model {NOTICE}"
    ranks = settings.plan.num_ranks * config.cluster.engines
    # Of a cluster's nodes Ray gives no core away twice.
    alone = config.cluster.address is None
    if alone and settings.device == "cpu" and ranks * settings.num_threads > machine.cores:
        yield f"{ranks} ranks of {settings.num_threads} threads share {machine.cores} cores"


def _max_engines(config: Config) -> int:
    """By default what a blue-green rollout needs at least."""
    cluster = config.cluster
    if cluster.max_engines != "auto":
        return cluster.max_engines
    return max(2 * cluster.engines, cluster.autoscale.most if cluster.autoscale else 0)


def prepare_rollout(request: admin_pb2.RolloutRequest, spec: ClusterSpec, machine: Machine) -> Rollout:
    """The new engines: `model`, `parallel`, `inference` and `resources` of the file; all else stays as it is.

    Raises ConfigError or ModelError.
    """
    try:
        document = yaml.safe_load(request.config)
    except yaml.YAMLError as error:
        raise ConfigError(f"config: not YAML: {str(error).splitlines()[0]}") from None
    if not request.version:
        raise ConfigError("version: the new engines need a name")
    config = parse(document, where="config")
    model = _find(config)
    config = replace(config, cluster=replace(config.cluster, engines=spec.engines))
    settings = engine_settings(config, model.facts, machine, name=spec.settings.model_name, folder=model.folder)
    _check_same_text(Path(spec.settings.model_path), model.folder)
    if settings.max_model_len < spec.card.max_model_len:
        raise ConfigError(
            f"inference.max_model_len: {settings.max_model_len} is below the {spec.card.max_model_len} that clients "
            "were promised"
        )
    limits = Limits(
        max_error_rate=request.max_error_rate if request.HasField("max_error_rate") else Limits().max_error_rate,
        max_slowdown=request.max_slowdown if request.HasField("max_slowdown") else Limits().max_slowdown,
    )
    return Rollout(
        strategy=request.strategy or "rolling",
        spec=replace(spec, settings=settings, version=request.version),
        weight=request.weight if request.HasField("weight") else 0.1,
        watch_s=request.watch_s if request.HasField("watch_s") else 10.0,
        limits=limits,
    )


def _check_same_text(old: Path, new: Path) -> None:
    for name in _TOKENIZER_FILES:
        ours, theirs = ((folder / name).read_bytes() if (folder / name).is_file() else b"" for folder in (old, new))
        if ours != theirs:
            raise ConfigError(f"model.path: {new} has another {name}; front doors keep the tokenizer they began with")
