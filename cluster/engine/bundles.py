"""How an engine's ranks are bundled for Ray, which never tears a bundle over two nodes."""

from __future__ import annotations

from dataclasses import dataclass

from workers.settings import EngineSettings

__all__ = ["Bundles", "bundle_ranks", "bundles_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundles:
    """`count` bundles of `ranks` neighbouring ranks, each of which takes `each` of `resource`."""

    resource: str
    each: int
    ranks: int
    count: int

    @property
    def bundle(self) -> dict[str, int]:
        return {self.resource: self.each * self.ranks}

    def index(self, rank: int) -> int:
        """The bundle of a rank."""
        return rank // self.ranks

    def __str__(self) -> str:
        return f"{self.count} x {self.bundle}"


def bundle_ranks(settings: EngineSettings, largest_node: float) -> Bundles:
    """Tensor-parallel ranks sum after every layer, so they stay together on a node, where one has room for them.

    `largest_node` is what the largest node has of the resource, used or not.
    """
    plan = settings.plan
    _, each = _share(settings)
    together = plan.tensor if each * plan.tensor <= largest_node else 1
    return bundles_of(settings, plan.num_ranks // together)


def bundles_of(settings: EngineSettings, count: int) -> Bundles:
    """What ranks that were placed before were bundled in."""
    resource, each = _share(settings)
    return Bundles(resource=resource, each=each, ranks=settings.plan.num_ranks // count, count=count)


def _share(settings: EngineSettings) -> tuple[str, int]:
    return ("GPU", 1) if settings.device == "cuda" else ("CPU", settings.num_threads)
