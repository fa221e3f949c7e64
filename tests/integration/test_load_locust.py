"""Locust as a user runs it, headless and in its own process: it patches the interpreter it lives in."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.unit.loadtest.fake_server import Faults, serving

LOADTEST = Path(__file__).parents[2] / "loadtest"


async def _locust(*arguments: str, files: tuple[str, ...] = ("locustfile.py",)) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "locust", "-f", ",".join(str(LOADTEST / file) for file in files)),
        *("--headless", "--only-summary", "--lengths", "fixed:4:5", "--vocab-size", "100", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def _rows(prefix: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Requests and failures by door and entry."""
    rows = json.loads(prefix.with_suffix(".json").read_text())
    return {(row["method"], row["name"]): (row["num_requests"], row["num_failures"]) for row in rows}


async def test_both_doors_under_locust(tmp_path: Path) -> None:
    async with serving() as server:
        status, output = await _locust(
            *("-u", "4", "-r", "4", "-t", "2s", "--arrivals", "constant:10", "--json-file", str(tmp_path / "run")),
            *("--host", f"grpc://{server.address}", "--http-host", server.http_url),
        )
    assert status == 0, output
    rows = _rows(tmp_path / "run")
    for door in ("grpc", "http"):
        num_requests, num_failures = rows[door, "e2e"]
        assert num_requests > 2, output  # of two users each, as many as the machine finds time for
        assert num_failures == 0
        assert rows[door, "ttft"][0] == num_requests
    assert rows["grpc", "itl"][0] == 4 * rows["grpc", "e2e"][0]


@pytest.mark.parametrize("faults", [Faults(repeat_at=2), Faults(break_at=3)])
async def test_faults_fail_the_run(faults: Faults, tmp_path: Path) -> None:
    async with serving() as server:
        server.faults.repeat_at, server.faults.break_at = faults.repeat_at, faults.break_at
        status, output = await _locust(
            *("-u", "1", "-t", "1s", "--arrivals", "constant:5", "--json-file", str(tmp_path / "run")),
            *("--host", f"grpc://{server.address}"),
        )
    assert status == 1, output
    rows = _rows(tmp_path / "run")
    num_requests, num_failures = rows["grpc", "e2e"]
    assert num_requests == num_failures > 0
    assert not any(door == "http" for door, _ in rows), "--host chose the gRPC users alone"


async def test_the_ramp_climbs() -> None:
    async with serving() as server:
        status, output = await _locust(
            *("-u", "3", "-r", "10", "-t", "4s", "--host", f"grpc://{server.address}"),
            files=("locustfile.py", "locust_ramp.py"),
        )
    assert status == 0, output
    for users in (1, 2, 3):
        assert f"Shape test updating to {users} users" in output


async def test_a_host_without_a_known_scheme_is_refused() -> None:
    status, output = await _locust("-t", "1s", "--host", "127.0.0.1:9000")
    assert status != 0
    assert "error: --host must be grpc://HOST:PORT or http://HOST:PORT, not '127.0.0.1:9000'" in output
