"""A cluster of numbers: engines come up after a while, sequences end after a while, front doors report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import cast

from cluster.app.spec import ClusterSpec
from cluster.operations.world import OperationFailed
from cluster.roster import EngineReport, FrontDoorReport, GroupTraffic
from protos.shoal.v1 import admin_pb2

__all__ = ["FakeWorld", "spec"]

START_S = 3.0


@dataclass(frozen=True)
class _Spec:
    engines: int
    version: str
    drain_timeout_s: float
    settings: SimpleNamespace


def spec(*, engines: int = 2, version: str = "1") -> ClusterSpec:
    """What operations read of a spec."""
    return cast("ClusterSpec", _Spec(engines, version, 30.0, SimpleNamespace(load_timeout_s=60.0)))


@dataclass
class _Engine:
    version: str
    started_s: float
    num_open: int = 4
    counts: GroupTraffic = field(default_factory=lambda: GroupTraffic(key="", engine="", version="", num_open=0))


class FakeWorld:
    """Time moves by `wait` alone. `log` has what was done, `doomed` the versions that never become ready.

    Each second `rate` sequences begin, shared out by version as the weights say; of a version `errors` is the share
    that fails, `first_token_s` the time to its first token.
    """

    def __init__(self, first: ClusterSpec) -> None:
        self.time_s = 100.0
        self.engines = {f"engine-{i}": _Engine(first.version, 0.0) for i in range(first.engines)}
        self.left: dict[str, float] = {}  # groups that get nothing new, and since when
        self.weights: dict[str, float] = {}
        self.doors = ["10.0.0.0", "10.0.0.1"]
        self.closed: dict[str, float] = {}  # nodes whose front doors take nothing new, and since when
        self.log: list[str] = []
        self.doomed: set[str] = set()
        self.errors: dict[str, float] = {}
        self.first_token_s: dict[str, float] = {}
        self.rate = 20.0
        self.room = 99
        self.linger_s = 5.0  # how long sequences run
        self.least_serving = len(self.engines)

    def overview(self) -> tuple[Sequence[EngineReport], Sequence[FrontDoorReport]]:
        reports = [self._report(name, engine) for name, engine in self.engines.items()]
        keys = tuple(
            f"{report.engine}/0"
            for report in reports
            if report.status.state == "ready" and f"{report.engine}/0" not in self.left
        )
        traffic = tuple(self._traffic(name, engine) for name, engine in self.engines.items())
        doors = [
            FrontDoorReport(
                id=node,
                node=node,
                dp_groups=keys,
                traffic=traffic,
                ready=node not in self.closed,
                drained=self._over(node),
            )
            for node in self.doors
        ]
        return reports, doors

    def start_engine(self, name: str, spec: ClusterSpec) -> None:
        assert name not in self.engines
        if len(self.engines) >= self.room:
            raise OperationFailed("no room")
        self.log.append(f"start {name}")
        self.engines[name] = _Engine(spec.version, self.time_s, num_open=0)

    def stop_engine(self, name: str) -> None:
        key = f"{name}/0"
        engine = self.engines.pop(name)
        assert self._open(name, engine) == 0, "an engine ends with nothing on it"
        assert key in self.left or not self._is_ready(engine)
        self.log.append(f"stop {name}")

    def leave(self, keys: Sequence[str], timeout_s: float) -> None:
        for key in keys:
            self.left[key] = self.time_s

    def stay(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.left.pop(key, None)

    def close_doors(self, node: str, timeout_s: float) -> None:
        self.log.append(f"close {node}")
        self.closed[node] = self.time_s

    def open_doors(self, node: str) -> None:
        del self.closed[node]

    def _over(self, node: str) -> bool:
        return node in self.closed and self.time_s - self.closed[node] >= self.linger_s

    def weigh(self, weights: Sequence[tuple[str, float]]) -> None:
        self.weights = dict(weights)

    def now_s(self) -> float:
        return self.time_s

    def wait(self, seconds: float) -> None:
        self.time_s += seconds
        serving = self._serving()
        self.least_serving = min(self.least_serving, len(serving))
        assert serving, "requests have nowhere to go"
        shares = {name: max(0.0, self.weights.get(engine.version, 1.0)) for name, engine in serving.items()}
        total = sum(shares.values())
        for name, engine in serving.items():
            begun = round(seconds * self.rate * (shares[name] / total if total else 1 / len(serving)))
            failed = round(begun * self.errors.get(engine.version, 0.0))
            counts = engine.counts
            engine.counts = replace(
                counts,
                num_begun=counts.num_begun + begun,
                num_failed=counts.num_failed + failed,
                num_first_tokens=counts.num_first_tokens + begun,
                first_tokens_s=counts.first_tokens_s + begun * self.first_token_s.get(engine.version, 0.1),
            )
            engine.num_open = 4

    def _serving(self) -> dict[str, _Engine]:
        return {
            name: engine
            for name, engine in self.engines.items()
            if self._is_ready(engine) and f"{name}/0" not in self.left
        }

    def _is_ready(self, engine: _Engine) -> bool:
        return engine.version not in self.doomed and self.time_s - engine.started_s >= START_S

    def _open(self, name: str, engine: _Engine) -> int:
        left_s = self.left.get(f"{name}/0")
        return 0 if left_s is not None and self.time_s - left_s >= self.linger_s else engine.num_open

    def _report(self, name: str, engine: _Engine) -> EngineReport:
        status = admin_pb2.EngineStatus(name=name)
        status.dp_groups.add(index=0)
        status.ranks.add(rank=0, node=f"10.0.0.{name[-1]}")
        if engine.version in self.doomed and self.time_s - engine.started_s >= START_S:
            status.state = "failed"
        else:
            status.state = "ready" if self._is_ready(engine) else "loading"
        error = "no such weights" if status.state == "failed" else ""
        return EngineReport(engine=name, leader="l", version=engine.version, status=status, error=error)

    def _traffic(self, name: str, engine: _Engine) -> GroupTraffic:
        open_here = self._open(name, engine)
        return replace(
            engine.counts, key=f"{name}/0", engine=name, version=engine.version, num_open=open_here, num_blocks=100
        )
