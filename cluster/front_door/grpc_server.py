"""The gRPC server of a front door: its port, its options, and the services every gRPC server should have."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from cluster.front_door.admin_door import ADMIN, AdminDoor
from cluster.front_door.auth import Authenticate
from cluster.front_door.desk import Desk
from cluster.front_door.grpc_door import SERVICE, InferenceDoor
from cluster.front_door.tls import Certificates

__all__ = ["GrpcServer"]

_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
_MOMENT_S, _CATCH_UP_S = 0.001, 0.5


class GrpcServer:
    """Serves `desk` on one port, which several front doors on a node may share."""

    def __init__(
        self,
        desk: Desk,
        *,
        authenticate: Authenticate,
        admin: AdminDoor | None,
        max_message_bytes: int,
        certificates: Certificates | None = None,
    ) -> None:
        self._desk = desk
        self._certificates = certificates
        self._server = grpc.aio.server(options=_options(max_message_bytes))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._services = [SERVICE]
        self._door = InferenceDoor(desk, authenticate)
        handlers = [self._door.handler()]
        if admin is not None:
            handlers.append(admin.handler())
            self._services.append(ADMIN)
        self._server.add_generic_rpc_handlers(tuple(handlers))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._add_reflection()
        self._changed = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        desk.on_ready_change(self._changed.set)

    async def start(self, host: str, port: int) -> int:
        """Returns the port, which matters where 0 was asked for. Raises OSError where it cannot be had."""
        bracketed = f"[{host}]" if ":" in host else host
        try:
            if self._certificates is None:
                bound = self._server.add_insecure_port(f"{bracketed}:{port}")
            else:
                bound = self._server.add_secure_port(f"{bracketed}:{port}", self._certificates.for_grpc())
        except RuntimeError as error:
            raise OSError(f"gRPC port {port} on {host} cannot be opened: is it in use?") from error
        await self._tell_health()
        await self._server.start()
        self._follower = asyncio.get_running_loop().create_task(self._follow_health(), name="gRPC health")
        return bound

    async def leave(self, grace_s: float) -> None:
        """Tells those who watch that no new call should come; then the port is closed and every connection hears so
        (GOAWAY). Calls that are open go on for `grace_s` at most."""
        await self._health.enter_graceful_shutdown()
        await self._catch_up()
        self._leaving = asyncio.get_running_loop().create_task(self._server.stop(grace_s), name="gRPC door leaves")
        await self._catch_up()

    async def _catch_up(self) -> None:
        """Until no call has come for a moment. From the moment that gRPC stops it answers CANCELLED to calls that it
        has read but not handed over yet, and to those that are sent before their client has read the GOAWAY."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + _CATCH_UP_S
        seen = -1
        while seen != self._door.num_calls and loop.time() < give_up_s:
            seen = self._door.num_calls
            await asyncio.sleep(_MOMENT_S)

    async def stop(self, grace_s: float) -> None:
        """Ends all calls; those of health watchers and the like after `grace_s` at most."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._server.stop(grace_s)

    async def _follow_health(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._tell_health()

    async def _tell_health(self) -> None:
        ready = self._desk.ready()
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, status)

    def _add_reflection(self) -> None:
        """Under the name that older clients ask for and, with the same messages, the one that newer ones do."""
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        servicer = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]
        reflection.enable_server_reflection(names, self._server)
        method = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        handlers = grpc.method_handlers_generic_handler(_REFLECTION_V1, {"ServerReflectionInfo": method})
        self._server.add_generic_rpc_handlers((handlers,))


def _options(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # Long answers outlive the pings that clients and balancers send; without these they earn `too_many_pings`.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
    )
