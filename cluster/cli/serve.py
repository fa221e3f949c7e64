"""`shoal serve`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from cluster import logs
from cluster.app.announcer import Announcer
from cluster.app.ports import PortError
from cluster.app.prepare import prepare
from cluster.app.ray_session import RaySession, join_ray, start_ray
from cluster.app.run import Run, StartError
from cluster.app.spec import ClusterSpec
from cluster.cli.failure import FAILURE, USAGE, fail
from cluster.cli.models import PullProgress
from cluster.config import Config, ConfigError, load
from cluster.config.machine import this_machine
from cluster.config.resolve import check_exposure
from cluster.models.errors import ModelError

__all__ = ["serve"]

_INTERRUPTED = 130
_SAME_SIGNAL_S = 0.5


def serve(config_path: Path | None, options: Mapping[tuple[str, ...], object]) -> None:
    """Serves until a signal comes. Ends by SystemExit where that cannot be."""
    started_s = time.monotonic()
    try:
        config = load(config_path, options)
        check_exposure(config)
    except ConfigError as error:
        fail(error, USAGE)
    logs.configure(config.telemetry.log_level)
    address = config.cluster.address
    session: RaySession | None = None
    machine = this_machine()
    try:
        if address is not None:
            from cluster.app.nodes import cluster_machine  # brings Ray

            session = join_ray(address)
            machine = cluster_machine()
        with PullProgress(config.model.path) as progress:
            spec = prepare(config, machine, progress)
    except ConfigError as error:
        fail(error, USAGE)
    except (ModelError, PortError, ConnectionError) as error:
        fail(error, FAILURE)
    _serve(spec, session, config, machine.cores, started_s)


def _serve(spec: ClusterSpec, session: RaySession | None, config: Config, cores: int, started_s: float) -> None:
    announcer = Announcer()
    settings = spec.settings
    for warning in spec.warnings:
        announcer.line(f"note: {warning}")
    announcer.line(f"starting {spec.card.name} ({spec.card.architecture}, {settings.dtype}) from {settings.model_path}")
    if settings.plan_reasons:
        announcer.line(f"plan: {settings.plan}")
        for reason in settings.plan_reasons:
            announcer.line(f"  {reason}")
    if session is None:
        ranks = settings.plan.num_ranks * max(spec.engines, spec.max_engines)
        session = start_ray(ranks * settings.num_threads if settings.device == "cpu" else cores, cores)
    stop = threading.Event()
    _follow_signals(stop, session)
    run = Run(spec, session, announcer, stop)
    keep_logs = False
    try:
        run.start()
        if run.wait_until_ready():
            _tell_ready(announcer, spec, time.monotonic() - started_s, run.doors() if spec.rank_host is None else ())
            run.serve()
        announcer.line("draining")
        run.drain()
        code = 0
    except StartError as error:
        announcer.close()
        for line in str(error).splitlines():
            print(f"shoal: {line}", file=sys.stderr)
        code, keep_logs = FAILURE, not error.explained
    finally:
        announcer.close()
        run.take_down()
        session.end(keep_logs=keep_logs)
    kept = keep_logs and session.folder is not None
    announcer.line(f"stopped; logs are in {session.folder}/ray/session_latest/logs" if kept else "stopped")
    raise SystemExit(code)


def _follow_signals(stop: threading.Event, session: RaySession) -> None:
    """The first signal asks for an end, the second takes it. Wrappers like `timeout` send one signal twice."""
    asked_s = 0.0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked_s
        del number, frame
        if not stop.is_set():
            asked_s = time.monotonic()
            stop.set()
        elif time.monotonic() - asked_s > _SAME_SIGNAL_S:
            session.kill()
            os._exit(_INTERRUPTED)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)


def _tell_ready(announcer: Announcer, spec: ClusterSpec, seconds: float, nodes: Sequence[str]) -> None:
    """`nodes` are those with front doors, where that may be another machine than this one."""
    if spec.host in ("0.0.0.0", "::"):  # noqa: S104
        hosts = [f"[{node}]" if ":" in node else node for node in nodes] or ["127.0.0.1"]
    else:
        hosts = ["127.0.0.1" if spec.host == "localhost" else spec.host]
    engines = f"{spec.engines} engine{'s' * (spec.engines > 1)} of {spec.settings.plan}"
    announcer.line(f"ready after {seconds:.1f} s: {spec.card.name} in {spec.settings.dtype}, {engines}")
    for host in hosts:
        announcer.line(f"  gRPC  {host}:{spec.grpc_port}")
        announcer.line(f"  HTTP  {'http' if spec.tls is None else 'https'}://{host}:{spec.http_port}/v1")
