"""The front doors of a campaign: connections to them in turn, and what they say of the cluster."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

import grpc

from cluster.client.held import CHANNEL_OPTIONS
from protos.shoal.v1 import admin_pb2, admin_pb2_grpc

__all__ = ["FATAL", "ChaosError", "Doors"]

FATAL = (
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
)
"""What asking again does not change."""

_CALL_S = 3.0
_PAUSE_S = 0.2
_TRIES = 30


class ChaosError(Exception):
    """The campaign cannot go on; the message is for the user."""


class Doors:
    """`addresses` with a front door, or where one may come: one that is not there is passed over. `credentials` are
    for TLS."""

    def __init__(
        self, addresses: Sequence[str], api_key: str, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        self._credentials = credentials
        self.addresses = tuple(addresses)
        self.metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._turns = itertools.cycle(self.addresses)

    def connect(self) -> grpc.aio.Channel:
        """To the next one; never a connection that is open already."""
        return self._open(next(self._turns))

    def turns(self) -> Callable[[], grpc.aio.Channel]:
        """The same for one client, in turns of its own: clients that share theirs keep each other from the living."""
        addresses = itertools.cycle(self.addresses)
        return lambda: self._open(next(addresses))

    def _open(self, address: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(address, self._credentials, options=CHANNEL_OPTIONS)

    async def status(self, *, tries: int = _TRIES) -> admin_pb2.StatusResponse:
        """From any that answers; each try is a round. Raises ChaosError."""
        failure = ""
        for _ in range(tries):
            for _ in self.addresses:
                async with self.connect() as channel:
                    try:
                        return await admin_pb2_grpc.AdminStub(channel).Status(
                            admin_pb2.StatusRequest(), metadata=self.metadata, timeout=_CALL_S
                        )
                    except grpc.aio.AioRpcError as error:
                        failure = f"{', '.join(self.addresses)}: {error.details()}"
                        if error.code() in FATAL:
                            raise ChaosError(failure) from None
            await asyncio.sleep(_PAUSE_S)
        raise ChaosError(failure)
