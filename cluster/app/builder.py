"""Shoal for whoever deploys Serve applications by himself, KubeRay's operator above all: `cluster.app.builder:app`.

What `shoal serve --address` does from outside happens here inside the cluster, in Serve's own build task; the
application's one argument is `config`, the path of shoal's configuration, the same file on every node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from cluster.app.prepare import prepare
from cluster.config import ConfigError, load
from cluster.config.environment import api_key
from cluster.config.machine import this_machine
from cluster.config.resolve import check_exposure
from cluster.models.progress import Silent

__all__ = ["app"]

_KNOWN = {"config"}


def app(args: Mapping[str, str]) -> Any:
    """The application, bound. SHOAL_API_KEY goes before the file's `security.api_key`. Raises ConfigError or
    ModelError."""
    from cluster.app.front_door import front_door_deployment
    from cluster.engine.deployment import engine_deployment
    from cluster.roster_actor import start_roster

    if args.keys() - _KNOWN or "config" not in args:
        raise ConfigError(f"args: must be {{config: PATH}}, not {dict(args)}")
    key = api_key()
    config = load(Path(args["config"]), {("security", "api_key"): key} if key else {})
    if config.cluster.address is None:
        raise ConfigError(f"{args['config']}: cluster.address must be auto: Ray is there already")
    check_exposure(config)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    cores = min((int(resources["CPU"]) for resources in nodes), default=1)
    gpus = sum(int(resources.get("GPU", 0)) for resources in nodes)
    spec = prepare(config, replace(this_machine(), cores=cores, gpus=gpus), Silent())
    start_roster(spec.log_level)
    return front_door_deployment(spec).bind(spec, engine_deployment(spec).bind(spec))
