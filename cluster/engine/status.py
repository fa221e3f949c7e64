"""What a leader tells of its engine, for `shoal status`."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.engine.experts import ExpertWatch
from cluster.engine.history import History
from cluster.engine.members import Members
from protos.shoal.v1 import admin_pb2
from workers.report import RankStatus
from workers.settings import EngineSettings

__all__ = ["engine_status"]


def engine_status(
    settings: EngineSettings,
    state: str,
    generation: int,
    members: Members,
    reports: Sequence[RankStatus],
    experts: ExpertWatch,
    joining: Sequence[int],
    history: History,
) -> admin_pb2.EngineStatus:
    status = admin_pb2.EngineStatus(
        name=settings.engine,
        state=state,
        generation=generation,
        plan=str(settings.plan),
        plan_reasons=settings.plan_reasons,
        dtype=settings.dtype,
        quantization=settings.quantization,
    )
    for index, target in members.sessions.items():
        status.dp_groups.add(index=index, address=target)
    if reports:
        status.collectives = reports[0].collectives
        status.kernels = reports[0].kernels
        status.dispatch = reports[0].dispatch
        status.load_s = max(report.load_s for report in reports)
    carried: dict[int, float] = {}
    for stage, tokens in enumerate(experts.stage_tokens):
        ranks = (number for number in members.ranks if members.plan.place(number).stage == stage)
        carried |= zip(ranks, tokens, strict=False)
    if carried:
        status.expert_imbalance, status.expert_epoch = experts.imbalance, experts.epoch
    for report in reports:
        if report.rank in members.ranks:
            _add_rank(status, report, carried.get(report.rank, 0.0))
    if members.ranks:
        status.missing_ranks.extend(number for number in members.missing if number not in joining)
        status.joining_ranks.extend(joining)
    status.num_ranks = settings.plan.num_ranks
    history.tell(status)
    return status


def _add_rank(status: admin_pb2.EngineStatus, report: RankStatus, expert_tokens: float) -> None:
    status.ranks.add(
        rank=report.rank,
        dp_group=report.dp_group,
        node=report.host,
        pid=report.pid,
        device=report.device,
        threads=report.threads,
        weight_bytes=report.weight_bytes,
        cache_bytes=report.cache_bytes,
        expert_tokens=expert_tokens,
    )
