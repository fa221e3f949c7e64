"""`shoal doctor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from cluster import logs
from cluster.app.ray_session import visiting_ray
from cluster.cli.failure import USAGE, fail
from cluster.config import Config, ConfigError, load
from cluster.config.environment import cache_folder
from cluster.doctor.facts import Wanted
from cluster.doctor.finding import Finding, Level, failure
from cluster.doctor.report import as_json, render
from cluster.front_door.tls import TlsFiles
from cluster.models import catalog
from cluster.models.errors import ModelError

__all__ = ["doctor"]

_SICK = 1
_LOOPBACK = "127.0.0.1"


def doctor(
    config_path: Path | None,
    options: Mapping[tuple[str, ...], object],
    *,
    as_script: bool,
    with_links: bool,
    timeout_s: float,
) -> None:
    """Ends by SystemExit: 0 healthy, 1 failures were found, 2 it could not look."""
    try:
        config = load(config_path, options)
    except ConfigError as error:
        fail(error, USAGE)
    logs.configure("warning")
    missing: tuple[Finding, ...] = ()
    model_path = ""
    if config_path is not None or ("model", "path") in options:
        model_path, missing = _model(config)
    wanted = _wanted(config, model_path)
    findings = (*missing, *_examine(config, wanted, with_links=with_links, timeout_s=timeout_s))
    if as_script:
        print(as_json(findings))
    else:
        _show(findings)
    raise SystemExit(_SICK if any(finding.level is Level.FAILURE for finding in findings) else 0)


def _examine(config: Config, wanted: Wanted, *, with_links: bool, timeout_s: float) -> Sequence[Finding]:
    address = config.cluster.address
    if address is None:
        from cluster.doctor.checks import examine
        from cluster.doctor.gather import gather

        return examine([gather(wanted, address=_LOOPBACK)], wanted)
    with ExitStack() as visit:
        try:
            visit.enter_context(visiting_ray(address))
        except ConnectionError as error:
            fail(error, USAGE)
        from cluster.doctor.nodes import examine_cluster

        return examine_cluster(wanted, with_links=with_links, timeout_s=timeout_s)


def _wanted(config: Config, model_path: str) -> Wanted:
    tensor = 1 if config.parallel == "auto" else config.parallel.tensor
    return Wanted(
        model_path=model_path,
        ports=tuple(port for port in (config.cluster.port, config.cluster.http_port) if port),
        host=config.cluster.host,
        interface=config.cluster.network.interface,
        tensor=1 if tensor == "auto" else tensor,
        device="cuda" if config.inference.device_map == "cuda" else "cpu",
        tls=_tls(config),
    )


def _tls(config: Config) -> TlsFiles | None:
    """As the file names them; whether they are there, and fit, is to be found on each node."""
    section = config.security.tls
    if section is None:
        return None
    cert, key = (str(Path(name).expanduser().absolute()) for name in (section.cert, section.key))
    client_ca = None if section.client_ca is None else str(Path(section.client_ca).expanduser().absolute())
    return TlsFiles(cert=cert, key=key, client_ca=client_ca)


def _model(config: Config) -> tuple[str, tuple[Finding, ...]]:
    """The folder that every node is to have; nothing is pulled."""
    path = config.model.path
    if Path(path).expanduser().is_absolute():
        return str(Path(path).expanduser()), ()
    models_dir = Path(config.model.models_dir).expanduser() if config.model.models_dir else cache_folder()
    try:
        folder = Path(path).resolve() if Path(path).is_dir() else catalog.pulled_folder(path, models_dir)
    except ModelError as error:
        return "", (failure("model", "", str(error), f"shoal models pull {path}"),)
    if folder is None:
        return "", (failure("model", "", f"{path} is not on this machine", f"shoal models pull {path}"),)
    return str(folder), ()


def _show(findings: Sequence[Finding]) -> None:
    console = Console(highlight=False)
    for part in render(findings):
        console.print(part, soft_wrap=not hasattr(part, "columns"))
