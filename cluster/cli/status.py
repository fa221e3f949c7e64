"""`shoal status`."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.cli.connection import Tls
from cluster.cli.failure import fail
from cluster.config.sizes import show_size
from protos.shoal.v1 import admin_pb2, admin_pb2_grpc

__all__ = ["render", "show"]

_TIMEOUT_S = 10.0
_DRAINING = ", [yellow]draining[/yellow]"


def show(target: str, api_key: str | None, *, as_json: bool, tls: Tls | None = None) -> None:
    """Asks the front door at `target` and prints what it says."""
    metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    with (tls or Tls()).channel(target) as channel:
        try:
            answer = admin_pb2_grpc.AdminStub(channel).Status(
                admin_pb2.StatusRequest(), timeout=_TIMEOUT_S, metadata=metadata
            )
        except grpc.RpcError as error:
            fail(f"{target}: {_reason(error)}")
    if as_json:
        print(json.dumps(MessageToDict(answer, preserving_proto_field_name=True), indent=2))
        return
    console = Console(highlight=False)
    for part in render(answer):
        console.print(part)


def render(answer: admin_pb2.StatusResponse) -> Iterator[str | Table]:
    """What is shown, from top to bottom."""
    yield f"shoal {answer.version}, serving {answer.model}"
    for engine in answer.engines:
        yield ""
        yield from _engine(engine)
    if answer.front_doors:
        yield ""
        yield _front_doors(answer)
    for warning in answer.warnings:
        yield f"[yellow]warning:[/yellow] {warning}"


def _engine(engine: admin_pb2.EngineStatus) -> Iterator[str | Table]:
    yield f"[bold]{engine.name}[/bold]: {engine.state}, generation {engine.generation}, {_share(engine)}"
    facts = [engine.plan, engine.dtype]
    if engine.collectives:
        facts += [f"collectives: {engine.collectives}", f"kernels: {engine.kernels}"]
        facts += [f"experts: {engine.dispatch}"] * bool(engine.dispatch)
        facts += [f"loaded in {engine.load_s:.1f} s"]
    yield "  " + "; ".join(facts)
    yield from (f"  [dim]{escape(reason)}[/dim]" for reason in engine.plan_reasons)
    if engine.dp_groups:
        groups = Table("DP group", "address", "running", "waiting", "free blocks", "preemptions", box=None)
        for group in engine.dp_groups:
            blocks = f"{group.num_free_blocks} of {group.num_blocks} x {group.block_size}"
            counts = (group.num_running, group.num_waiting, blocks, group.num_preemptions)
            groups.add_row(f"{group.index}{_DRAINING * group.draining}", group.address, *map(str, counts))
        yield groups
    if engine.ranks:
        moving = engine.expert_imbalance > 0
        experts = ("expert tokens",) if moving else ()
        ranks = Table("rank", "node", "pid", "device", "threads", "weights", "cache", *experts, box=None)
        for rank in engine.ranks:
            values = [show_size(rank.weight_bytes), show_size(rank.cache_bytes)]
            if moving:
                values.append(f"{rank.expert_tokens:.0f}")
            ranks.add_row(str(rank.rank), rank.node, str(rank.pid), rank.device, str(rank.threads), *values)
        yield ranks
    if engine.missing_ranks or engine.joining_ranks:
        parts = (("missing", engine.missing_ranks), ("loading, to join", engine.joining_ranks))
        told = (f"{what}: {', '.join(map(str, ranks))}" for what, ranks in parts if ranks)
        yield "  [yellow]ranks " + "; ".join(told) + "[/yellow]"
    if engine.num_regroups:
        last = f"{engine.last_regroup_s:.2f} s, because {escape(engine.last_regroup_cause)}"
        yield f"  regrouped {engine.num_regroups} times; the last time in {last}"
    if engine.num_restarts:
        cause = escape(engine.last_restart_cause)
        yield f"  all ranks were started again {engine.num_restarts} times; the last time because {cause}"
    if engine.expert_imbalance:
        yield f"  experts: imbalance {engine.expert_imbalance:.2f} (1 is even), moved {engine.expert_epoch} times"


def _share(engine: admin_pb2.EngineStatus) -> str:
    """The version with its part of the requests."""
    told = f"version {engine.version}"
    if engine.weight < 1:
        told += f" ({engine.weight:.0%} of the requests)"
    return told + _DRAINING * engine.draining


def _front_doors(answer: admin_pb2.StatusResponse) -> Table:
    table = Table("front door", "node", "open requests", "DP groups", box=None)
    for door in answer.front_doors:
        table.add_row(
            f"{door.id}{_DRAINING * door.draining}", door.node, str(door.open_requests), ", ".join(door.dp_groups)
        )
    return table


def _reason(error: grpc.RpcError) -> str:
    code = error.code() if isinstance(error, grpc.Call) else None
    if code is grpc.StatusCode.UNAVAILABLE:
        return "no front door answers"
    return str(error.details()) if isinstance(error, grpc.Call) else str(error)
