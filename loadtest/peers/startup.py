"""How long `make serve` takes to its first token, and how much memory everything it starts takes.

    python -m loadtest.peers.startup

Warm: the model and the environment are installed, and one start that is not counted has read both into the page
cache. Memory is sampled in a start of its own, which then answers 16 requests of 128 tokens in and out at once.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from loadtest.arrivals import AtOnce
from loadtest.peers.comparison import Figure, Findings, begin, deliver, progress
from loadtest.peers.process_tree import MemoryPeak, MemorySampler
from loadtest.peers.server import DEFAULT_MODEL, serving
from loadtest.scenario import Scenario, run_scenario
from loadtest.workload import FixedLengths

__all__ = ["measure"]

_MIB = 1 << 20


def measure(rounds: int, arguments: tuple[str, ...]) -> Findings:
    """Starts the server `rounds + 2` times."""
    first_token_s = []
    command = ""
    for number in range(rounds + 1):
        with serving(*arguments) as server:
            command = server.command
            progress(f"start {number} of {rounds}: {server.first_token_s:.2f} s to the first token")
            if number:
                first_token_s.append(server.first_token_s)
    peak = _peak_memory(arguments)
    return Findings(
        title="Start and memory",
        peer="",
        figures=(
            Figure(
                what="from `make serve` to the first token, warm",
                unit="s",
                ours=tuple(first_token_s),
                goal=25.0,
                goal_is_most=True,
            ),
            Figure(what="peak memory, PSS of the process tree", unit="MiB", ours=(peak.pss_bytes / _MIB,)),
            Figure(what="peak memory, RSS of the process tree", unit="MiB", ours=(peak.rss_bytes / _MIB,)),
        ),
        facts={"server": f"`{command}`", "processes at most": str(peak.num_processes)},
    )


def _peak_memory(arguments: tuple[str, ...]) -> MemoryPeak:
    with serving(*arguments) as server, MemorySampler(server.tree) as sampler:
        scenario = Scenario(
            address=server.address, http_url="", arrivals=AtOnce(), lengths=FixedLengths(128, 128), num_requests=16
        )
        result = asyncio.run(run_scenario(scenario))
        if result.num_errors:
            raise RuntimeError(f"the load met errors: {result.summaries['grpc'].errors}")
        sampler.sample()
        return sampler.peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model-path", default=str(DEFAULT_MODEL))
    options = begin(parser)
    deliver(measure(options.rounds, ("--model-path", options.model_path)), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
