"""`shoal chaos`, `drain`, `scale` and `rollout`: their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.failure import USAGE, fail

__all__ = ["chaos", "drain", "rollout", "scale"]

DoorOption = Annotated[str, typer.Option(help="A front door's gRPC address.")]
KeyOption = Annotated[
    str | None, typer.Option(envvar="SHOAL_API_KEY", help="An administrator's key.", show_default=False)
]


def chaos(
    address: Annotated[str, typer.Option(help="Front doors' gRPC addresses, with commas.")] = "127.0.0.1:9000",
    api_key: KeyOption = None,
    faults: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the faults and of the load.")] = 0,
    roles: Annotated[
        str, typer.Option(help="Whom: rank, leader, front-door, controller, roster, engine, node; rank=3 is a weight.")
    ] = "rank=3,leader,front-door,controller,roster",
    kinds: Annotated[str, typer.Option(help="What: kill, freeze, slow, partition, with weights likewise.")] = "kill",
    double: Annotated[float, typer.Option(min=0, max=1, help="The share of faults that hit two at once.")] = 0.0,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="The share of faults after which the next comes before all is whole.")
    ] = 0.0,
    streams: Annotated[int, typer.Option(min=1, help="Streams that are open all the while.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Of the longest answer.")] = 200,
    requests: Annotated[int, typer.Option(min=1, help="Different requests.")] = 16,
    verify: Annotated[
        bool, typer.Option(help="Compare every answer with the undisturbed one; needs inference.deterministic.")
    ] = False,
    freeze_s: Annotated[float, typer.Option(min=0.1, help="How long one is frozen, slow or cut off.")] = 6.0,
    gap_s: Annotated[float, typer.Option(min=0, help="The longest wait between two faults.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="Write OUT.html and OUT.json.", show_default=False)] = None,
) -> None:
    """Kill, freeze, slow down or cut off parts of a running cluster under load, and report what clients saw.

    Only with `chaos.enabled: true` in the configuration and an administrator's key. Of a node, Shoal's processes are
    hit, or its network to the other nodes. A partition takes nftables and CAP_NET_ADMIN where the target runs.
    """
    from cluster.chaos.campaign import Campaign, works
    from cluster.chaos.schedule import FAULTS, ROLES, Plan, crossed, parse_weights
    from cluster.cli.chaos import harm
    from cluster.cli.connection import Tls

    try:
        plan = Plan(
            weights=crossed(parse_weights(roles, ROLES, "--roles"), parse_weights(kinds, FAULTS, "--kinds")),
            lasting_s=dict.fromkeys(("freeze", "slow", "partition"), freeze_s),
            double=double,
            overlap=overlap,
        )
    except ValueError as error:
        fail(error, USAGE)
    harm(
        Campaign(
            addresses=[one.strip() for one in address.split(",")],
            api_key=api_key or "",
            plan=plan,
            num_faults=faults,
            seed=seed,
            num_streams=streams,
            works=works(requests, tokens, seed),
            gap_s=(min(0.5, gap_s), gap_s),
            verify=verify,
            credentials=Tls.from_environment().credentials(),
        ),
        out,
    )


def drain(
    target: Annotated[str, typer.Argument(help="engine-0, engine-0/rank-2, or a node's address.", show_default=False)],
    address: DoorOption = "127.0.0.1:9000",
    api_key: KeyOption = None,
    timeout_s: Annotated[
        float | None, typer.Option(min=0, help="Then what still runs goes on elsewhere.", show_default=False)
    ] = None,
    undo: Annotated[bool, typer.Option(help="Let it take requests again.")] = False,
    force: Annotated[bool, typer.Option(help="Also where nothing else takes requests.")] = False,
) -> None:
    """Take an engine, a rank's group or a node's engines out of service; no request fails."""
    from cluster.cli.order import give
    from protos.shoal.v1 import admin_pb2

    request = admin_pb2.DrainRequest(target=target, timeout_s=timeout_s, undo=undo, force=force)
    give(address, api_key, lambda stub, metadata: stub.Drain(request, metadata=metadata))


def scale(
    engines: Annotated[int, typer.Argument(min=1, help="How many there should be.", show_default=False)],
    address: DoorOption = "127.0.0.1:9000",
    api_key: KeyOption = None,
) -> None:
    """Start engines, or drain and end the newest ones."""
    from cluster.cli.order import give
    from protos.shoal.v1 import admin_pb2

    request = admin_pb2.ScaleRequest(engines=engines)
    give(address, api_key, lambda stub, metadata: stub.Scale(request, metadata=metadata))


def rollout(
    config: Annotated[Path, typer.Argument(help="The new engines' configuration file.", show_default=False)],
    version: Annotated[str, typer.Option(help="What the new engines are called.", show_default=False)],
    strategy: Annotated[str, typer.Option(help="rolling, blue-green or canary.")] = "rolling",
    weight: Annotated[float, typer.Option(help="Canary: its share of the requests.")] = 0.1,
    watch_s: Annotated[float, typer.Option(min=0, help="How long the new version is watched.")] = 10.0,
    max_error_rate: Annotated[float, typer.Option(min=0, help="Above it the new version is taken back.")] = 0.02,
    max_slowdown: Annotated[float, typer.Option(min=0, help="The same, for the time to the first token.")] = 2.0,
    address: DoorOption = "127.0.0.1:9000",
    api_key: KeyOption = None,
) -> None:
    """Replace the engines by ones of another configuration; take it back if they fail more or are slower."""
    from cluster.cli.order import give
    from protos.shoal.v1 import admin_pb2

    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{config}: {error}", USAGE)
    request = admin_pb2.RolloutRequest(
        config=text,
        strategy=strategy,
        version=version,
        weight=weight,
        watch_s=watch_s,
        max_error_rate=max_error_rate,
        max_slowdown=max_slowdown,
    )
    give(address, api_key, lambda stub, metadata: stub.Rollout(request, metadata=metadata))
