"""The gRPC door of operators: service shoal.v1.Admin."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Protocol

import grpc

from cluster.front_door.auth import Authenticate
from cluster.front_door.convert import Asker
from cluster.front_door.errors import PermissionDenied
from cluster.front_door.grpc_guard import Context, Guard, Method, handler
from protos.shoal.v1 import admin_pb2 as pb

__all__ = ["ADMIN", "AdminDoor", "Operations"]

ADMIN = pb.DESCRIPTOR.services_by_name["Admin"].full_name


class Operations(Protocol):
    """What a cluster can be asked to do. All raise RequestErrors."""

    async def status(self) -> pb.StatusResponse: ...

    def drain(self, request: pb.DrainRequest) -> AsyncIterator[pb.OperationEvent]: ...

    def scale(self, request: pb.ScaleRequest) -> AsyncIterator[pb.OperationEvent]: ...

    def rollout(self, request: pb.RolloutRequest) -> AsyncIterator[pb.OperationEvent]: ...

    async def inject(self, request: pb.InjectRequest) -> pb.InjectResponse: ...


class AdminDoor:
    """`may_operate` says of a client whether it is an administrator, `chaos` whether faults may be injected at all."""

    def __init__(
        self,
        operations: Operations,
        authenticate: Authenticate,
        *,
        may_operate: Callable[[str], bool],
        chaos: bool,
    ) -> None:
        self._operations = operations
        self._may_operate = may_operate
        self._chaos = chaos
        self._guard = Guard(authenticate)

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """For `add_generic_rpc_handlers`."""
        guard = self._guard
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        return handler(
            ADMIN,
            {
                "Status": Method(guard(self.status, "Status"), pb.StatusRequest, unary),
                "Drain": Method(guard(self.drain, "Drain"), pb.DrainRequest, stream),
                "Scale": Method(guard(self.scale, "Scale"), pb.ScaleRequest, stream),
                "Rollout": Method(guard(self.rollout, "Rollout"), pb.RolloutRequest, stream),
                "Inject": Method(guard(self.inject, "Inject"), pb.InjectRequest, unary),
            },
        )

    async def status(self, request: pb.StatusRequest, asker: Asker, context: Context) -> pb.StatusResponse:
        return await self._operations.status()

    async def drain(self, request: pb.DrainRequest, asker: Asker, context: Context) -> None:
        self._check(asker)
        await _write_all(self._operations.drain(request), context)

    async def scale(self, request: pb.ScaleRequest, asker: Asker, context: Context) -> None:
        self._check(asker)
        await _write_all(self._operations.scale(request), context)

    async def rollout(self, request: pb.RolloutRequest, asker: Asker, context: Context) -> None:
        self._check(asker)
        await _write_all(self._operations.rollout(request), context)

    async def inject(self, request: pb.InjectRequest, asker: Asker, context: Context) -> pb.InjectResponse:
        if not self._chaos:
            raise PermissionDenied("faults are not injected here: set chaos.enabled: true in the configuration")
        if not asker.client:
            raise PermissionDenied("faults are injected with an administrator's key only: set security.api_key")
        self._check(asker)
        return await self._operations.inject(request)

    def _check(self, asker: Asker) -> None:
        if not self._may_operate(asker.client):
            raise PermissionDenied("this key is no administrator's: name its holder in security.administrators")


async def _write_all(events: AsyncIterator[pb.OperationEvent], context: Context) -> None:
    async with aclosing(events) as each:  # type: ignore[type-var]  # they are generators
        async for event in each:
            await context.write(event)
