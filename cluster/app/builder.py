"""Shoal for whoever deploys Serve applications by himself, KubeRay's operator above all.

What `shoal serve --address` does from outside happens here inside the cluster, in Serve's own build tasks:
`cluster.app.builder:doors` with `{config: PATH}` are the front doors, `cluster.app.builder:engine` with `{config: PATH,
engine: engine-0}` is one engine; the configuration is the same file on every node. Nobody operates such a cluster
but who deploys it: there is no drain, scale or rollout by `shoal`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.app.names import engine_names
from cluster.app.nodes import cluster_machine
from cluster.app.prepare import prepare
from cluster.app.spec import ClusterSpec
from cluster.config import Config, ConfigError, load
from cluster.config.environment import ray_token
from cluster.config.resolve import check_exposure
from cluster.models.progress import Silent
from cluster.security import derived_secret

__all__ = ["doors", "engine"]


def doors(args: Mapping[str, str]) -> Any:
    """The front doors' application, bound. Raises ConfigError or ModelError."""
    config = _config(args, {"config"})
    from cluster.app.front_door import front_door_deployment
    from cluster.roster_actor import start_roster

    spec = _spec(config)
    start_roster(spec.log_level)
    return front_door_deployment(spec).bind(spec)


def engine(args: Mapping[str, str]) -> Any:
    """One engine's application, bound. Raises ConfigError or ModelError."""
    config = _config(args, {"config", "engine"})
    known = engine_names(config.cluster.engines)
    if args["engine"] not in known:
        raise ConfigError(f"args.engine: {args['engine']} is none of {', '.join(known)} (cluster.engines)")
    from cluster.engine.deployment import engine_deployment
    from cluster.roster_actor import start_roster

    spec = _spec(config)
    start_roster(spec.log_level)
    return engine_deployment(spec).bind(spec, args["engine"])


def _config(args: Mapping[str, str], wanted: set[str]) -> Config:
    if args.keys() != wanted:
        raise ConfigError(f"args: must have {', '.join(sorted(wanted))}, not {', '.join(sorted(args)) or 'nothing'}")
    config = load(Path(args["config"]))
    if config.cluster.address is None:
        raise ConfigError(f"{args['config']}: cluster.address must be auto: Ray is there already")
    if 0 in (config.cluster.port, config.cluster.http_port):
        raise ConfigError(
            f"{args['config']}: cluster.port and cluster.http_port must be given: nobody would know others"
        )
    check_exposure(config)
    return config


def _spec(config: Config) -> ClusterSpec:
    """The ports are not tried: a build task may run beside the front door that has them."""
    token = ray_token()
    if token is None:
        raise ConfigError("Ray has no token here, from which the applications' common secret is made: RAY_AUTH_MODE")
    untried = replace(config, cluster=replace(config.cluster, port=0, http_port=0))
    spec = prepare(untried, cluster_machine(), Silent())
    cluster = config.cluster
    return replace(spec, secret=derived_secret(token), grpc_port=cluster.port, http_port=cluster.http_port)
