"""An order to a running cluster, and how it goes: `shoal drain`, `scale` and `rollout`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import cast

import grpc

from cluster.cli.connection import Tls
from cluster.cli.failure import fail
from protos.shoal.v1 import admin_pb2, admin_pb2_grpc

__all__ = ["give"]

Ask = Callable[[admin_pb2_grpc.AdminStub, tuple[tuple[str, str], ...]], Iterable[admin_pb2.OperationEvent]]


def give(target: str, api_key: str | None, ask: Ask) -> None:
    """Prints each line of news; ends with 1 where the order failed."""
    metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    began_s = time.monotonic()
    last = admin_pb2.OperationEvent()
    with Tls.from_environment().channel(target) as channel:
        try:
            for last in ask(admin_pb2_grpc.AdminStub(channel), metadata):
                if last.state != admin_pb2.OperationEvent.STATE_FAILED:
                    print(f"{time.monotonic() - began_s:6.1f} s  {last.line}", flush=True)
        except grpc.RpcError as error:
            failed = cast("grpc.Call", error)
            begun = " (what was begun goes on: look at `shoal status`)" if last.line else ""
            fail(f"{target}: {failed.details() or failed.code().name}{begun}")
    if last.state == admin_pb2.OperationEvent.STATE_FAILED:
        fail(last.line)
