"""The plan of the house: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("protos", "scheduler", "workers", "cluster", "loadtest")
MAY_IMPORT = {
    "protos": {"protos"},
    "scheduler": {"scheduler"},
    "workers": {"workers", "scheduler", "protos"},
    "cluster": {"cluster", "workers", "scheduler", "protos"},
    "loadtest": {"loadtest", "protos"},
}
ONLY_IN = {"torch": {"workers"}, "deepspeed": {"workers"}, "ray": {"cluster"}}
NEVER_IN = {"scheduler": {"torch", "ray", "grpc", "opentelemetry"}}
# Comparisons run a peer on the same work, so they may import what the serving path does not.
PEERS = ("loadtest/peers/",)


def _sources(room: str) -> list[Path]:
    return [path for path in sorted((ROOT / room).rglob("*.py")) if not path.stem.endswith(("_pb2", "_pb2_grpc"))]


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_plan(room: str) -> None:
    sources = _sources(room)
    assert sources
    for path in sources:
        relative = str(path.relative_to(ROOT))
        for module in _imports(path):
            top = module.partition(".")[0]
            if top in ROOMS:
                assert top in MAY_IMPORT[room], f"{relative} imports {module}"
            if relative.startswith(PEERS):
                continue
            assert room in ONLY_IN.get(top, {room}), f"{relative} imports {module}"
            assert top not in NEVER_IN.get(room, set()), f"{relative} imports {module}"
            adopts = relative.startswith("workers/autotp/")
            assert adopts or top != "transformers", f"{relative}: only what adopts foreign models imports transformers"


@pytest.mark.parametrize("room", ["scheduler", "workers", "protos"])
def test_the_environment_is_read_in_cluster_only(room: str) -> None:
    for path in _sources(room):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in {"environ", "getenv"}, f"{path.relative_to(ROOT)}:{node.lineno}"
