"""Every node of a Ray cluster, asked by an actor on each; a node that does not answer is a finding, never a wait."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor.checks import CHECKS, Check, examine, links
from cluster.doctor.facts import Link, NodeFacts, Wanted
from cluster.doctor.finding import Finding, failure
from cluster.doctor.link_process import LinkProblem
from cluster.doctor.node_actor import NodeActor

__all__ = ["examine_cluster", "living_nodes", "rounds"]

log = logging.getLogger(__name__)

_CLOCK_TRIES = 3
_REACH_S = 3.0  # a lost packet is sent again after one second
_SLACK_S = 10.0  # for an actor to say that its own time is over


@dataclass(frozen=True, slots=True)
class _Asked:
    name: str
    address: str
    actor: Any


def examine_cluster(
    wanted: Wanted,
    *,
    checks: Sequence[Check] = CHECKS,
    with_links: bool = True,
    timeout_s: float = 30.0,
    limit_s: float = math.inf,
) -> tuple[Finding, ...]:
    """Of the cluster that this process has joined. A node may take `timeout_s` to answer, and so may every link. Links
    whose turn does not come in `limit_s`, all in all, are not measured; who cannot connect is found before."""
    give_up_s = time.monotonic() + limit_s
    living = living_nodes(ray.nodes())
    asked = [_ask(node, name, wanted) for node, name in zip(living, _names(living), strict=True)]
    try:
        facts, silent = _facts(asked, timeout_s)
        answering = [node for node in asked if node.name in facts]
        findings = [*_lost(living), *silent, *examine([facts[node.name] for node in answering], wanted, checks)]
        if with_links:
            cut = _cut(answering)
            known = {(one.first, one.second) for one in cut}
            hurried = bool(cut) and math.isfinite(limit_s)  # that is reason enough
            findings += links([*cut, *(() if hurried else _measure(answering, known, timeout_s, give_up_s))])
    finally:
        for node in asked:
            ray.kill(node.actor)
    return tuple(findings)


def living_nodes(nodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of Ray's `nodes`, by their machines' names.

    Ray takes seconds to notice that a node has ended. Where it has begun again meanwhile, two nodes have one address:
    who does not listen there is the one that has ended.
    """
    alive = sorted((node for node in nodes if node["Alive"]), key=lambda node: str(node["NodeManagerHostname"]))
    count = Counter(node["NodeManagerAddress"] for node in alive)
    return [node for node in alive if count[node["NodeManagerAddress"]] == 1 or _listens(node)]


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of `count` once, in rounds in which nobody appears twice."""
    places: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    half = len(places) // 2
    for _ in range(len(places) - 1):
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        places[1:] = [places[-1], *places[1:-1]]


def _listens(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_REACH_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True  # out of reach, which is a finding of its own
    return True


def _names(nodes: Sequence[dict[str, Any]]) -> list[str]:
    """The machines' own names, with their addresses where two have the same."""
    count = Counter(node["NodeManagerHostname"] for node in nodes)
    return [
        name if count[name := node["NodeManagerHostname"]] == 1 else f"{name} ({node['NodeManagerAddress']})"
        for node in nodes
    ]


def _ask(node: dict[str, Any], name: str, wanted: Wanted) -> _Asked:
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    actor = ray.remote(NodeActor).options(num_cpus=0, scheduling_strategy=place).remote(wanted)
    return _Asked(name, node["NodeManagerAddress"], actor)


def _lost(living: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Nodes that were there, and no other has taken the address since."""
    here = {node["NodeManagerAddress"] for node in living}
    gone = {n["NodeManagerAddress"]: n["NodeManagerHostname"] for n in ray.nodes() if not n["Alive"]}
    for address, name in gone.items():
        if address not in here:
            fix = f"look at the machine and its cable, then `ray start` there again ({address})"
            yield failure("nodes", name, "Ray has lost it", fix)


def _facts(asked: Sequence[_Asked], timeout_s: float) -> tuple[dict[str, NodeFacts], list[Finding]]:
    answers = {node.name: node.actor.facts.remote() for node in asked}
    give_up_s = time.monotonic() + timeout_s
    facts: dict[str, NodeFacts] = {}
    silent: list[Finding] = []
    for node in asked:
        try:
            seen = ray.get(answers[node.name], timeout=max(0.1, give_up_s - time.monotonic()))
            ahead_s, error_s = _clock(node.actor)
        except (RayError, GetTimeoutError, ImportError, AttributeError) as error:
            silent.append(_silent(node, error, timeout_s))
        else:
            facts[node.name] = replace(seen, name=node.name, clock_ahead_s=ahead_s, clock_error_s=error_s)
    return facts, silent


def _silent(node: _Asked, error: Exception, timeout_s: float) -> Finding:
    log.info("%s (%s): %s", node.name, node.address, error)
    if isinstance(error, GetTimeoutError):
        fix = "look at its cable and firewall; `ray status` tells whether Ray still has it"
        return failure("nodes", node.name, f"{node.address} does not answer in {timeout_s:g} s", fix)
    lines = [line for line in str(error).splitlines() if line.strip()]
    fix = "install the same shoal there as here, then start Ray there again"
    return failure("nodes", node.name, f"shoal does not run there: {lines[-1] if lines else error!r}", fix)


def _clock(actor: Any) -> tuple[float, float]:
    """How far ahead of ours, and how well that is known: of several questions the quickest counts."""
    best = (0.0, float("inf"))
    for _ in range(_CLOCK_TRIES):
        asked_s = time.time()
        theirs_s = ray.get(actor.clock.remote(), timeout=_SLACK_S)
        half_s = (time.time() - asked_s) / 2
        if half_s < best[1]:
            best = (theirs_s - asked_s - half_s, half_s)
    return best


def _cut(asked: Sequence[_Asked]) -> list[Link]:
    """Those between which no connection can be made, one way or the other: all try at once."""
    places, ears = [], []
    for place, opening in enumerate([node.actor.listen.remote() for node in asked]):
        with contextlib.suppress(RayError, GetTimeoutError):  # what measures its links says why
            ears.append(ray.get(opening, timeout=_SLACK_S))
            places.append(place)
    trying = [asked[place].actor.out_of_reach.remote(ears, _REACH_S) for place in places]
    found: set[tuple[int, int]] = set()
    for place, answer in zip(places, trying, strict=True):
        with contextlib.suppress(RayError, GetTimeoutError):
            others = [places[other] for other in ray.get(answer, timeout=_REACH_S + _SLACK_S)]
            found |= {(min(place, other), max(place, other)) for other in others if other != place}
    problem = f"no connection in {_REACH_S:g} s"
    return [Link(first=asked[a].name, second=asked[b].name, problem=problem) for a, b in sorted(found)]


def _measure(
    asked: Sequence[_Asked], cut: Collection[tuple[str, str]], timeout_s: float, give_up_s: float
) -> Iterator[Link]:
    for every in rounds(len(asked)):
        pairs = [(a, b) for a, b in every if (asked[a].name, asked[b].name) not in cut]
        if time.monotonic() + timeout_s > give_up_s:
            log.warning("not all links were measured: time was short")
            return
        opened = [(asked[a], asked[b], asked[a].actor.open_link.remote(timeout_s)) for a, b in pairs]
        joined = [(first, second, _join(second, port, timeout_s)) for first, second, port in opened]
        for first, second, answer in joined:
            yield _link(first, second, answer, timeout_s)
            first.actor.close_link.remote()


def _join(second: _Asked, opened: Any, timeout_s: float) -> Any:
    """The second end's answer, or what kept the first end from opening."""
    try:
        host, port = ray.get(opened, timeout=timeout_s + _SLACK_S)
    except (RayError, GetTimeoutError) as error:
        return error
    return second.actor.join_link.remote(host, port, timeout_s)


def _link(first: _Asked, second: _Asked, answer: Any, timeout_s: float) -> Link:
    try:
        if isinstance(answer, Exception):
            raise answer
        kind, latency_s, bytes_per_s = ray.get(answer, timeout=timeout_s + _SLACK_S)
    except GetTimeoutError:
        return Link(first=first.name, second=second.name, problem=f"no handshake in {timeout_s:g} s")
    except RayTaskError as error:
        problem = str(error.cause) if isinstance(error.cause, LinkProblem) else _last_line(error)
        return Link(first=first.name, second=second.name, problem=problem)
    except RayError as error:
        return Link(first=first.name, second=second.name, problem=_last_line(error))
    return Link(first=first.name, second=second.name, kind=kind, latency_s=latency_s, bytes_per_s=bytes_per_s)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
