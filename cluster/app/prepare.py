"""Everything that can be found out, and found wrong, before a process is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.app.ports import free_port
from cluster.app.spec import ClusterSpec
from cluster.config import Config, ConfigError
from cluster.config.environment import cache_folder
from cluster.config.machine import Machine
from cluster.config.network import NetworkSettings
from cluster.config.resolve import engine_settings
from cluster.config.scheduling import front_door_limits, resolve_routing
from cluster.front_door.call import SamplingOptions
from cluster.front_door.model_card import ModelCard
from cluster.models import catalog
from cluster.models.errors import ModelError
from cluster.models.folder import inspect
from cluster.models.progress import Progress
from cluster.security import administrators, api_keys, new_secret, quotas
from cluster.telemetry import endpoint_of
from workers.model.other_config import NOTICE

__all__ = ["prepare"]


def prepare(config: Config, machine: Machine, progress: Progress) -> ClusterSpec:
    """Raises ConfigError, ModelError or PortError."""
    cluster = config.cluster
    keys = dict(api_keys(config.security))
    operators = administrators(config.security, keys)
    if config.chaos.enabled and not operators:
        raise ConfigError(
            "chaos.enabled: name who may do it in security.administrators, with a key in security.api_key"
        )
    grpc_port = free_port(cluster.host, cluster.port, key="cluster.port", option="--port")
    http_port = free_port(cluster.host, cluster.http_port, key="cluster.http_port", option="--http-port")
    models_dir = Path(config.model.models_dir).expanduser() if config.model.models_dir else cache_folder()
    folder = catalog.resolve(config.model.path, models_dir, progress)
    model = inspect(folder)
    name = config.model.name or catalog.model_name(config.model.path, folder)
    settings = engine_settings(config, model, machine, name=name, folder=folder)
    try:
        card = ModelCard.from_folder(
            folder,
            name=name,
            max_model_len=settings.max_model_len,
            dtype=settings.dtype,
            defaults=SamplingOptions(temperature=config.inference.temperature, top_p=config.inference.top_p),
        )
    except ValueError as error:
        raise ModelError(f"{folder}: {error}") from None
    ranks = settings.plan.num_ranks * cluster.engines
    warnings = () if model.config.native else (f"a {model.config.model_type} model {NOTICE}",)
    shared = settings.device == "cpu" and ranks * settings.num_threads > machine.cores
    return ClusterSpec(
        settings=settings,
        card=replace(card, architecture=card.architecture or model.config.model_type),
        secret=new_secret(),
        api_keys=keys,
        administrators=operators,
        quotas=quotas(config.security),
        chaos=config.chaos.enabled,
        cors_origins=config.security.cors_origin,
        rank_host=None if cluster.address else "127.0.0.1",
        host=cluster.host,
        grpc_port=grpc_port,
        http_port=http_port,
        limits=front_door_limits(config),
        routing=resolve_routing(config, settings.plan, spreads_experts=model.config.moe is not None),
        engines=cluster.engines,
        front_doors=cluster.front_doors,
        drain_timeout_s=cluster.drain_timeout_s,
        start_timeout_s=cluster.start_timeout_s,
        network=NetworkSettings(
            interface=cluster.network.interface,
            nccl={name: str(value) for name, value in cluster.network.nccl.items()},
        ),
        log_level=config.telemetry.log_level,
        otlp_endpoint=endpoint_of(config.telemetry),
        warnings=(*warnings, f"{ranks} ranks of {settings.num_threads} threads share {machine.cores} cores")
        if shared
        else warnings,
    )
