"""The percentiles of the small scenario (`make load`) against a freshly started `make serve`.

python -m loadtest.peers.latency
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from loadtest.arrivals import PoissonArrivals
from loadtest.peers.comparison import Figure, Findings, begin, deliver
from loadtest.peers.server import DEFAULT_MODEL, serving
from loadtest.scenario import Scenario, ScenarioResult, run_scenario
from loadtest.stats import LATENCIES, Distribution
from loadtest.workload import UniformLengths

__all__ = ["findings_of"]

_PERCENTILES = ("p50", "p90", "p99")


def findings_of(result: ScenarioResult, facts: dict[str, str]) -> Findings:
    """Raises RuntimeError where a request failed: latencies of those that did not would flatter the server."""
    figures = []
    for door, summary in result.summaries.items():
        if summary.num_errors:
            raise RuntimeError(f"{summary.num_errors} requests through {door} failed: {summary.errors}")
        figures.append(Figure(what=f"{door}: output throughput", unit="tokens/s", ours=(summary.output_tokens_per_s,)))
        for name, words in LATENCIES.items():
            distribution: Distribution | None = getattr(summary, name)
            if distribution is not None:
                figures += [
                    Figure(what=f"{door}: {words}, {percent}", unit="ms", ours=(getattr(distribution, percent) * 1e3,))
                    for percent in _PERCENTILES
                ]
    return Findings(title="Latency under a small open load", peer="", figures=tuple(figures), facts=facts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", default=str(DEFAULT_MODEL))
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--requests", type=int, default=60, help="through each door")
    options = begin(parser)
    lengths = UniformLengths((16, 128), (16, 48))
    with serving("--model-path", options.model_path) as server:
        scenario = Scenario(
            address=server.address,
            http_url=server.http_url,
            arrivals=PoissonArrivals(options.rate),
            lengths=lengths,
            num_requests=options.requests,
        )
        result = asyncio.run(run_scenario(scenario))
    facts = {
        "server": f"`{server.command}`",
        "work": f"{options.requests} requests a door, Poisson at {options.rate:g}/s, {lengths}",
    }
    deliver(findings_of(result, facts), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
