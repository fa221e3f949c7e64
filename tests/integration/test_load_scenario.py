"""The scenario, over real connections, against a server that can be made to err."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from loadtest.arrivals import AtOnce
from loadtest.client import DoorError
from loadtest.scenario import Scenario, main, run_scenario
from loadtest.workload import FixedLengths
from tests.loop_thread import loop_thread
from tests.unit.loadtest.fake_server import FakeServer, Faults, serving


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """In a loop of its own, so that the command under test can have one too."""
    stack = AsyncExitStack()
    with loop_thread() as loop:
        try:
            yield asyncio.run_coroutine_threadsafe(stack.enter_async_context(serving()), loop).result(10)
        finally:
            asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result(10)


def _arguments(server: FakeServer, *more: str) -> list[str]:
    doors = ["--address", server.address, "--http", server.http_url]
    return [*doors, "--requests", "6", "--arrivals", "constant:100", "--lengths", "uniform:4-8:2-9", *more]


def test_both_doors_are_measured(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(_arguments(server, "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")))
    printed, told = capsys.readouterr()
    assert "grpc: 0 of" in told
    assert "http: " in told
    assert status == 0, printed
    for words in ("time to first token", "time per output token", "inter-token latency", "end to end"):
        assert printed.count(words) == 2
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["model"] == "fake"
    grpc, http = report["doors"]["grpc"], report["doors"]["http"]
    assert grpc["num_requests"] == http["num_requests"] == 6
    assert grpc["num_output_tokens"] == http["num_output_tokens"] > 12, "the same work through both doors"
    assert "<svg" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (Faults(repeat_at=1), "1 repeated, 0 skipped"),
        (Faults(skip_at=1), "0 repeated, 1 skipped"),
        (Faults(break_at=1), "UNAVAILABLE"),
        (Faults(end_at=2), "2 tokens came where 4 were asked for"),
    ],
)
async def test_every_fault_of_the_grpc_stream_is_an_error(faults: Faults, message: str) -> None:
    async with serving() as server:
        scenario = _scenario(address=server.address, num_warmup=0)
        assert (await run_scenario(scenario)).num_errors == 0
        _set(server.faults, faults)
        summary = (await run_scenario(scenario)).summaries["grpc"]
    assert summary.num_errors == 3
    assert message in summary.errors[0][0]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (Faults(skip_at=1), "3 token ids came where usage says 4"),
        (Faults(break_at=1), "broken on request"),
        (Faults(end_at=2), "2 tokens came where 4 were asked for"),
    ],
)
async def test_every_fault_of_the_http_stream_is_an_error(faults: Faults, message: str) -> None:
    async with serving() as server:
        scenario = _scenario(http_url=server.http_url, vocab_size=1000, num_warmup=0)
        assert (await run_scenario(scenario)).num_errors == 0
        _set(server.faults, faults)
        summary = (await run_scenario(scenario)).summaries["http"]
    assert summary.num_errors == 3
    assert message in summary.errors[0][0]


def _scenario(*, address: str = "", http_url: str = "", vocab_size: int | None = None, num_warmup: int) -> Scenario:
    return Scenario(
        address=address,
        http_url=http_url,
        arrivals=AtOnce(),
        lengths=FixedLengths(5, 4),
        num_requests=3,
        vocab_size=vocab_size,
        num_warmup=num_warmup,
    )


def _set(faults: Faults, other: Faults) -> None:
    for name in Faults.__slots__:
        setattr(faults, name, getattr(other, name))


def test_a_fault_ends_the_command_with_status_1(server: FakeServer) -> None:
    server.faults.repeat_at = 1
    assert main(_arguments(server)) == 1


def test_a_model_that_is_not_served_is_said_in_one_line(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_arguments(server, "--model", "other")) == 1
    assert capsys.readouterr().err == f"error: gRPC server at {server.address} does not serve other\n"


def test_no_server_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--address", "", "--http", "http://127.0.0.1:9", "--vocab-size", "9"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: HTTP server at http://127.0.0.1:9: ")
    assert error.count("\n") == 1


async def test_a_failing_warm_up_is_not_passed_over() -> None:
    async with serving() as server:
        server.faults.break_at = 0
        with pytest.raises(DoorError, match="warm-up through grpc"):
            await run_scenario(_scenario(address=server.address, num_warmup=1))
