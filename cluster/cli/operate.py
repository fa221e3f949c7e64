"""`shoal chaos`, `drain`, `scale` and `rollout`: their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.failure import USAGE, fail

__all__ = ["chaos"]

DoorOption = Annotated[str, typer.Option(help="A front door's gRPC address.")]
KeyOption = Annotated[
    str | None, typer.Option(envvar="SHOAL_API_KEY", help="An administrator's key.", show_default=False)
]


def chaos(
    address: DoorOption = "127.0.0.1:9000",
    api_key: KeyOption = None,
    faults: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the faults and of the load.")] = 0,
    roles: Annotated[
        str, typer.Option(help="Whom to hit: rank, leader, front-door, controller, roster, engine; rank=3 is a weight.")
    ] = "rank=3,leader,front-door,controller,roster",
    kinds: Annotated[str, typer.Option(help="What to do: kill, freeze, slow, with weights likewise.")] = "kill",
    double: Annotated[float, typer.Option(min=0, max=1, help="The share of faults that hit two at once.")] = 0.0,
    streams: Annotated[int, typer.Option(min=1, help="Streams that are open all the while.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Of the longest answer.")] = 200,
    requests: Annotated[int, typer.Option(min=1, help="Different requests.")] = 16,
    verify: Annotated[
        bool, typer.Option(help="Compare every answer with the undisturbed one; needs inference.deterministic.")
    ] = False,
    freeze_s: Annotated[float, typer.Option(min=0.1, help="How long a frozen process stands still.")] = 6.0,
    gap_s: Annotated[float, typer.Option(min=0, help="The longest wait between two faults.")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="Write OUT.html and OUT.json.", show_default=False)] = None,
) -> None:
    """Kill, freeze or slow down parts of a running cluster under load, and report what clients saw.

    Only with `chaos.enabled: true` in the configuration and an administrator's key.
    """
    from cluster.chaos.campaign import Campaign, works
    from cluster.chaos.schedule import FAULTS, ROLES, Plan, parse_weights
    from cluster.cli.chaos import harm

    try:
        plan = Plan(
            roles=parse_weights(roles, ROLES, "--roles"),
            kinds=parse_weights(kinds, FAULTS, "--kinds"),
            double=double,
            freeze_s=freeze_s,
        )
    except ValueError as error:
        fail(error, USAGE)
    harm(
        Campaign(
            address=address,
            api_key=api_key or "",
            plan=plan,
            num_faults=faults,
            seed=seed,
            num_streams=streams,
            works=works(requests, tokens, seed),
            gap_s=(min(0.5, gap_s), gap_s),
            verify=verify,
        ),
        out,
    )
