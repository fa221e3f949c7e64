"""What the front door costs: streamed tokens/s against Ray Serve's own gRPC proxy, and added time to first token.

    python -m loadtest.peers.serve_proxy

Behind both stand sources whose tokens cost nothing: a DP group's stream behind ours (which the front door routes to,
and whose tokens it turns into text), a Serve deployment that yields one message a token behind Serve's proxy (Serve
as it comes, one replica). Tokens that come faster than a message costs share one at the front door, so messages are
counted beside them. One client reads both, in turns, in one run. Added time to first token is what a client
measures through the front door, less what it measures on the DP group's stream itself, of prompts of 128 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from statistics import median

import uvloop

from loadtest.peers.child import child
from loadtest.peers.comparison import Figure, Findings, begin, deliver, progress
from loadtest.peers.group_stream import GroupStream
from loadtest.peers.others import OtherCpu, own_tree
from loadtest.peers.raw_stream import Burst, RawStreams
from loadtest.peers.server import DEFAULT_MODEL
from loadtest.workload import Work

__all__ = ["measure"]

_FRONT_DOOR = "cluster.front_door.alone"
_PROMPT = tuple(range(100, 228))
_PROBES = 200
# What the last turn left behind (ends of calls, records of them) is cleared up before the next one begins.
_SETTLE_S = 1.0


async def _bursts(
    front_door: str, serve_proxy: str, work: Work, num_streams: int, rounds: int
) -> tuple[list[Burst], list[Burst]]:
    """Of both, turn by turn; the first turn of each warms up and does not count."""
    sides = RawStreams(front_door), RawStreams(serve_proxy)
    bursts: tuple[list[Burst], list[Burst]] = [], []
    try:
        for number in range(rounds + 1):
            progress(f"round {number} of {rounds}")
            for side, taken in zip(sides, bursts, strict=True):
                await asyncio.sleep(_SETTLE_S)
                taken.append(await side.burst(work, num_streams))
    finally:
        for side in sides:
            await side.close()
    return bursts[0][1:], bursts[1][1:]


async def _added_ttft_s(front_door: str, group: str, rounds: int) -> tuple[float, ...]:
    """Of each round, the difference of the two medians; a probe of each in turn."""
    through, direct = RawStreams(front_door), GroupStream(group)
    await direct.open()
    work = Work(prompt=_PROMPT, num_output_tokens=1)
    added_s = []
    try:
        for _ in range(rounds + 1):
            pairs = [((await through.burst(work, 1)).first_s[0], await direct.ttft_s(_PROMPT)) for _ in range(_PROBES)]
            added_s.append(median(pair[0] for pair in pairs) - median(pair[1] for pair in pairs))
    finally:
        await through.close()
        await direct.close()
    return tuple(added_s[1:])


def measure(folder: Path, num_streams: int, num_tokens: int, rounds: int) -> Findings:
    """Starts everything, measures, ends everything. Raises RuntimeError where a stream was not whole."""
    work = Work(prompt=_PROMPT, num_output_tokens=num_tokens)
    with (
        child("loadtest.peers.synthetic_group") as group,
        child(_FRONT_DOOR, "--model-path", str(folder), "--group", group) as front_door,
    ):
        # First, while Ray does not run: its idle processes would take the cores from a figure in milliseconds.
        added_s = uvloop.run(_added_ttft_s(front_door, group, rounds))
        with child("loadtest.peers.serve_app") as serve_proxy:
            others = OtherCpu(own_tree())
            ours, peers = uvloop.run(_bursts(front_door, serve_proxy, work, num_streams, rounds))
            other_cores = others.cores()
    return Findings(
        title="The front door alone, before a source whose tokens cost nothing",
        peer="Ray Serve's gRPC proxy",
        figures=(
            Figure(
                what="streamed tokens",
                unit="tokens/s",
                ours=tuple(burst.num_tokens / burst.duration_s for burst in ours),
                peers=tuple(burst.num_tokens / burst.duration_s for burst in peers),
                goal=10.0,
            ),
            Figure(
                what="messages that carried them",
                unit="messages/s",
                ours=tuple(burst.num_messages / burst.duration_s for burst in ours),
                peers=tuple(burst.num_messages / burst.duration_s for burst in peers),
            ),
            Figure(
                what="what the front door adds to time to first token, p50",
                unit="ms",
                ours=tuple(added * 1e3 for added in added_s),
                goal=3.0,
                goal_is_most=True,
            ),
        ),
        facts={
            "streams": f"{num_streams} at once, {num_tokens} tokens each",
            "time to first token": f"{_PROBES} pairs of requests a round, one after the other",
            "cores that processes of neither side kept busy": f"{other_cores:.2f}",
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", type=Path, default=DEFAULT_MODEL, help="whose tokenizer the front door uses")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="in each stream")
    parser.add_argument("--rounds", type=int, default=5)
    options = begin(parser)
    deliver(measure(options.model_path, options.streams, options.tokens, options.rounds), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
