"""Looks at the machine it runs on."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
import ssl
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

import cluster
from cluster.config.environment import ray_uses_token
from cluster.config.machine import this_machine
from cluster.doctor.facts import Interface, ModelThere, NodeFacts, Wanted
from cluster.front_door.tls import Certificates, TlsFiles
from cluster.models.errors import ModelError
from cluster.models.folder import inspect

__all__ = ["gather", "model_there"]

# What must be the same on every node: what is spoken between them, and what computes.
_PACKAGES = ("shoal", "torch", "deepspeed", "ray", "grpcio", "protobuf")
_OURS = ("cluster", "protos", "scheduler", "workers")
_FOLDERS = ("/tmp",)  # noqa: S108  # where Ray keeps its logs and sockets, and spills what it cannot hold
_SHARED_MEMORY = "/dev/shm"  # noqa: S108
_HANDSHAKE_S = 2.0


def gather(wanted: Wanted, *, address: str) -> NodeFacts:
    """Quick, but for tensor-parallel plans: torch is imported to see what was compiled for it."""
    machine = this_machine()
    shared = shutil.disk_usage(_SHARED_MEMORY)
    taken = tuple(port for port in wanted.ports if _taken(wanted.host, port))
    return NodeFacts(
        name=socket.gethostname(),
        address=address,
        versions=_versions(),
        interfaces=_interfaces(),
        lookup_s=_lookup_s(address),
        shared_memory_bytes=shared.total,
        shared_memory_free_bytes=shared.free,
        memory_bytes=machine.memory_bytes,
        memory_free_bytes=machine.free_bytes,
        disk_free_bytes={folder: shutil.disk_usage(folder).free for folder in _FOLDERS},
        compiler=shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or "",
        sums_compiled=wanted.tensor > 1 and _sums_compiled(),
        model=model_there(wanted.model_path) if wanted.model_path else None,
        taken_ports=taken,
        serving=bool(taken) and _answers(wanted.host, taken[0], tls=wanted.tls is not None),
        tls_problem=_tls_problem(wanted.tls),
        cores=machine.cores,
        gpus=machine.gpus,
        token_auth=ray_uses_token(),
    )


def model_there(path: str) -> ModelThere:
    """Reads configuration and headers, no weights."""
    folder = Path(path)
    if not folder.is_dir():
        return ModelThere(problem=f"{folder} is not there")
    try:
        facts = inspect(folder)
    except ModelError as error:
        return ModelThere(problem=str(error))
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return ModelThere(digest=digest.hexdigest()[:12], weight_bytes=facts.weight_bytes)


def _lookup_s(address: str) -> float:
    """As torch looks up the names of hosts that it connects to: as IPv6 addresses."""
    began_s = time.monotonic()
    with contextlib.suppress(OSError):  # it has none
        socket.getnameinfo((address if ":" in address else f"::ffff:{address}", 0, 0, 0), 0)
    return time.monotonic() - began_s


def _sums_compiled() -> bool:
    from workers.parallel.build import is_built

    return is_built()


def _versions() -> dict[str, str]:
    import platform

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return {**found, "shoal's source": _source_digest()}


def _source_digest() -> str:
    """Two checkouts of one version need not be the same program."""
    root = Path(cluster.__file__).parents[1]
    digest = hashlib.sha256()
    for room in _OURS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _interfaces() -> tuple[Interface, ...]:
    states = psutil.net_if_stats()
    return tuple(
        Interface(
            name=name,
            addresses=tuple(a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)),
            up=name in states and states[name].isup,
            mbits_per_s=states[name].speed if name in states else 0,
        )
        for name, addresses in sorted(psutil.net_if_addrs().items())
    )


def _taken(host: str, port: int) -> bool:
    from cluster.app.ports import PortError, free_port
    from cluster.config.load import ConfigError

    if port == 0:
        return False
    try:
        free_port(host, port, key="", option="")
    except PortError:
        return True
    except ConfigError:
        return False  # an address of another node: front doors will not be placed here with it
    return False


def _answers(host: str, port: int, *, tls: bool) -> bool:
    """Whether a front door listens there, healthy or not."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    target = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104
    if tls:
        return _shakes_hands(target, port)
    with grpc.insecure_channel(f"{target}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        request = health_pb2.HealthCheckRequest(service="shoal.v1.Inference")
        try:
            health_pb2_grpc.HealthStub(channel).Check(request, timeout=2.0)
        except grpc.RpcError:
            return False
    return True


def _shakes_hands(host: str, port: int) -> bool:
    """Whether somebody speaks HTTP/2 over TLS there. Whose certificate it is does not matter to who only looks, and
    without one of our own a door that asks for it would say no more."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=_HANDSHAKE_S) as plain,
            context.wrap_socket(plain) as secure,
        ):
            return secure.selected_alpn_protocol() == "h2"
    except OSError:
        return False


def _tls_problem(files: TlsFiles | None) -> str:
    if files is None:
        return ""
    try:
        Certificates(files)
    except (OSError, ValueError) as error:
        return f"{files.cert} and {files.key}: {getattr(error, 'strerror', None) or error}"
    return ""
