"""The HTTP server of a front door, inside an event loop that is not its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from cluster.front_door.tls import Certificates

__all__ = ["HttpServer"]

_GRACE_S = 2
_CLOSE = (b"connection", b"close")


class HttpServer:
    """Serves an ASGI app on one port, which several front doors on a node may share."""

    def __init__(self, app: ASGIApp, certificates: Certificates | None = None) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        if certificates is not None:
            config.load()
            config.ssl = certificates.for_http()
        self._server = _Server(config)
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Returns the port, which matters where 0 was asked for. Raises OSError where it cannot be had."""
        self._socket = _listener(host, port)
        bound: int = self._socket.getsockname()[1]
        self._task = asyncio.get_running_loop().create_task(self._server.serve([self._socket]), name="HTTP door")
        up = asyncio.get_running_loop().create_task(self._server.up.wait())
        await asyncio.wait((self._task, up), return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            up.cancel()
            await self._task
            raise OSError(f"the HTTP server on port {port} ended at its start")
        return bound

    def leave(self) -> None:
        """Takes no new connection; those that are open are closed behind their next answer, which says so."""
        for server in self._server.servers:
            server.close()
        state, config = self._server.server_state, self._server.config
        config.encoded_headers.append(_CLOSE)  # of which uvicorn makes those of the state again and again
        state.default_headers = [*state.default_headers, _CLOSE]

    def hang_up(self) -> None:
        """Closes connections over which nothing is asked; the others behind their answer."""
        for connection in list(self._server.server_state.connections):
            connection.shutdown()

    async def stop(self) -> None:
        """Closes the port and, after a short grace, what is still open."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        if self._socket is not None:
            self._socket.close()


class _Server(uvicorn.Server):
    """Leaves signals to the process that it is a guest in."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.up.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"HTTP port {port} on {host} cannot be opened: {error.strerror}") from error
    return listener
