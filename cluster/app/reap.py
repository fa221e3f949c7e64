"""Takes down what is left of an engine, whoever started it."""

from __future__ import annotations

import contextlib

import ray
from ray.util import list_named_actors, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup, PlacementGroupID

from cluster.app.names import NAMESPACE, placement_name, rank_prefix

__all__ = ["placement_groups_of", "rank_names_of", "reap_engine"]


def reap_engine(engine: str) -> None:
    """Kills the engine's ranks and gives its placement group back. Safe to repeat."""
    for name in rank_names_of(engine):
        with contextlib.suppress(ValueError):  # it ended in between
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    for group in placement_groups_of(engine):
        remove_placement_group(group)


def rank_names_of(engine: str) -> list[str]:
    """The names of the engine's ranks that Ray knows to live."""
    prefix = rank_prefix(engine)
    found = (actor for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE)
    return sorted(actor["name"] for actor in found if actor["name"].startswith(prefix))


def placement_groups_of(engine: str) -> list[PlacementGroup]:
    """By the table and not by name: a name is looked up in the caller's namespace, and Serve has its own."""
    name = placement_name(engine)
    return [
        PlacementGroup(PlacementGroupID(bytes.fromhex(entry["placement_group_id"])))
        for entry in placement_group_table().values()
        if entry["name"] == name and entry["state"] != "REMOVED"
    ]
