"""One front door's gRPC port without a cluster, before DP groups that are named: what the front door itself costs.

    python -m cluster.front_door.alone --model-path DIR --group HOST:PORT

Prints "ready ADDRESS" and serves on loopback until its input ends. The groups must ask for no secret.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

import uvloop

from cluster.front_door.groups import GroupAddress
from cluster.front_door.model_card import ModelCard
from cluster.front_door.server import FrontDoorServer, FrontDoorSettings

__all__ = ["main"]


async def _serve(model_path: str, groups: Sequence[GroupAddress]) -> None:
    settings = FrontDoorSettings(front_door_id="alone", secret="", grpc_port=0, http_port=None)
    server = FrontDoorServer.from_folder(settings, model_path, ModelCard.from_folder(model_path, name="alone"))
    ready = asyncio.Event()
    server.desk.on_ready_change(lambda: ready.set() if server.ready() else ready.clear())
    server.set_groups(groups)
    await server.start()
    try:
        await ready.wait()
        sys.stdout.write(f"ready {settings.host}:{server.grpc_port}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await server.stop()


def _group(number: int, target: str) -> GroupAddress:
    host, _, port = target.rpartition(":")
    return GroupAddress(key=target, engine="alone", dp_group=number, host=host, port=int(port))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", required=True, help="for the tokenizer; no weights are read")
    parser.add_argument("--group", action="append", required=True, metavar="HOST:PORT", help="may be repeated")
    options = parser.parse_args()
    groups = [_group(number, target) for number, target in enumerate(options.group)]
    uvloop.run(_serve(options.model_path, groups))


if __name__ == "__main__":
    main()
