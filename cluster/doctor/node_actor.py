"""The doctor's hands on a node: a Ray actor that looks, tells the time, and is one end of measurements."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

import ray

from cluster.config.network import NetworkSettings, rank_address
from cluster.doctor.facts import NodeFacts, Wanted
from cluster.doctor.gather import gather
from cluster.doctor.link_process import LinkProblem, LinkProcess
from workers.parallel.reach import out_of_reach
from workers.report import RankAddress

__all__ = ["NodeActor"]


class NodeActor:
    """One a node. Links are measured one after the other."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._link: LinkProcess | None = None
        self._ear: socket.socket | None = None

    def facts(self) -> NodeFacts:
        return gather(self._wanted, address=ray.util.get_node_ip_address())

    def clock(self) -> float:
        return time.time()

    def listen(self) -> tuple[str, int]:
        """Where others try to reach this node. Raises LinkProblem."""
        host = self._host()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._ear = socket.create_server((host, 0), family=family)
        return host, int(self._ear.getsockname()[1])

    def out_of_reach(self, others: Sequence[tuple[str, int]], timeout_s: float) -> list[int]:
        """Those to which no connection can be made in time, by their places in `others`."""
        addresses = [RankAddress(place, host, port, 0) for place, (host, port) in enumerate(others)]
        return out_of_reach(addresses, timeout_s)

    def open_link(self, timeout_s: float) -> tuple[str, int]:
        """Becomes the first end; where the second one finds it. Raises LinkProblem."""
        host = self._host()
        self._start(first=True, host=host, first_host=host, port=0, timeout_s=timeout_s)
        assert self._link is not None
        return host, self._link.port()

    def join_link(self, first_host: str, port: int, timeout_s: float) -> tuple[str, float, float]:
        """Becomes the second end; kind, latency in seconds and bytes a second. Raises LinkProblem."""
        self._start(first=False, host=self._host(), first_host=first_host, port=port, timeout_s=timeout_s)
        assert self._link is not None
        try:
            figures = self._link.figures()
        finally:
            self.close_link()
        return figures.kind, figures.latency_s, figures.bytes_per_s

    def close_link(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _host(self) -> str:
        try:
            return rank_address(NetworkSettings(interface=self._wanted.interface), ray.util.get_node_ip_address())
        except ValueError as error:
            raise LinkProblem(str(error)) from None

    def _start(self, *, first: bool, host: str, first_host: str, port: int, timeout_s: float) -> None:
        from workers.parallel.link_probe import ProbeOrder

        self.close_link()
        self._link = LinkProcess(
            ProbeOrder(
                first=first,
                host=host,
                first_host=first_host,
                port=port,
                device=self._wanted.device,
                timeout_s=timeout_s,
            )
        )
