"""A small scenario against a running server: the same seeded work through each door, one door after the other.

    python -m loadtest.scenario --address 127.0.0.1:9000 --http http://127.0.0.1:8000

Ends with status 1 where a request failed or the server could not be asked.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from loadtest.arrivals import Arrivals, parse_arrivals, take
from loadtest.client import Door, DoorError, ModelFacts, open_loop
from loadtest.grpc_door import GrpcDoor
from loadtest.html_report import render
from loadtest.http_door import HttpDoor
from loadtest.record import RequestRecord
from loadtest.report import as_json, print_summaries
from loadtest.stats import Summary, summarize
from loadtest.workload import LengthModel, TextPrompts, TokenPrompts, Workload, parse_lengths

__all__ = ["Scenario", "ScenarioResult", "main", "run_scenario"]

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """What to ask whom. An empty `address` or `http_url` leaves that door out."""

    address: str
    http_url: str
    arrivals: Arrivals
    lengths: LengthModel
    num_requests: int
    duration_s: float | None = None
    model: str = ""
    api_key: str = ""
    seed: int = 0
    vocab_size: int | None = None
    prompt_file: Path | None = None
    num_warmup: int = 2
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not self.address and not self.http_url:
            raise ValueError("neither a gRPC address nor an HTTP URL was given")
        if self.num_requests < 1:
            raise ValueError(f"num_requests must be at least 1, not {self.num_requests}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenarioResult:
    """Records and summaries by door."""

    model: ModelFacts
    records: Mapping[str, Sequence[RequestRecord]]
    summaries: Mapping[str, Summary]

    @property
    def num_errors(self) -> int:
        return sum(summary.num_errors for summary in self.summaries.values())


async def run_scenario(scenario: Scenario, tell: Tell = lambda door, done, num: None) -> ScenarioResult:
    """`tell` hears of each door's requests: how many have ended, of how many. Raises DoorError where a door does not
    answer, ValueError where the work cannot be made."""
    async with AsyncExitStack() as stack:
        doors = [await stack.enter_async_context(aclosing(door)) for door in _doors(scenario)]
        facts = [await door.model() for door in doors]
        workload = _workload(scenario, facts[0])
        offsets_s = take(scenario.arrivals, count=scenario.num_requests, duration_s=scenario.duration_s)
        records = {}
        for door in doors:
            tell(door.name, 0, len(offsets_s))
            own = replace(workload, asked=door.name)
            await _warm_up(door, own, scenario.num_warmup)
            records[door.name] = await open_loop(
                door.generate,
                own.requests(),
                offsets_s,
                on_record=_counted(partial(tell, door.name), len(offsets_s)),
            )
    return ScenarioResult(
        model=facts[0], records=records, summaries={door: summarize(run) for door, run in records.items()}
    )


def _doors(scenario: Scenario) -> list[Door]:
    doors: list[Door] = []
    if scenario.address:
        doors.append(
            GrpcDoor(scenario.address, model=scenario.model, api_key=scenario.api_key, timeout_s=scenario.timeout_s)
        )
    if scenario.http_url:
        doors.append(
            HttpDoor(scenario.http_url, model=scenario.model, api_key=scenario.api_key, timeout_s=scenario.timeout_s)
        )
    return doors


def _workload(scenario: Scenario, facts: ModelFacts) -> Workload:
    vocab_size = scenario.vocab_size or facts.vocab_size
    if scenario.prompt_file is None and not vocab_size:
        raise ValueError("the HTTP door does not tell the vocabulary's size: give --vocab-size or --prompt-file")
    return Workload(
        lengths=scenario.lengths,
        prompts=TextPrompts.from_file(scenario.prompt_file) if scenario.prompt_file else TokenPrompts(vocab_size),
        seed=scenario.seed,
        max_model_len=facts.max_model_len or None,
    )


def _counted(tell: Callable[[int, int], None], num: int) -> Callable[[RequestRecord], None]:
    ended = itertools.count(1)
    return lambda record: tell(next(ended), num)


async def _warm_up(door: Door, workload: Workload, count: int) -> None:
    """Connects and lets the server reach its stride, with work of its own that is not reported."""
    for work in islice(replace(workload, seed=workload.seed + 1).requests(), count):
        record = await door.generate(work, time.perf_counter())
        if record.error:
            raise DoorError(f"warm-up through {door.name}: {record.error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.scenario", description=__doc__.partition("\n")[0])
    parser.add_argument("--address", default="127.0.0.1:9000", help="gRPC door; empty leaves it out")
    parser.add_argument("--http", default="http://127.0.0.1:8000", help="HTTP door; empty leaves it out")
    parser.add_argument("--model", default="", help="default: the only model served")
    parser.add_argument("--api-key-file", type=Path, help="file that holds the key")
    parser.add_argument("--requests", type=int, default=20, help="through each door")
    parser.add_argument("--duration", type=float, help="seconds after which no request is sent any more")
    parser.add_argument(
        "--arrivals", default="poisson:1", help="poisson:R constant:R gamma:R:VARIATION trace:FILE at-once"
    )
    parser.add_argument(
        "--lengths", default="uniform:16-128:16-48", help="fixed:IN:OUT uniform:LO-HI:LO-HI lognormal:M~S:M~S sharegpt"
    )
    parser.add_argument("--prompt-file", type=Path, help="text, one prompt a line, instead of random token ids")
    parser.add_argument("--vocab-size", type=int, help="where no gRPC door tells it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one request")
    parser.add_argument("--json", type=Path, help="write the summaries here")
    parser.add_argument("--html", type=Path, help="write a report here")
    return parser


def _scenario(options: argparse.Namespace) -> Scenario:
    key_file: Path | None = options.api_key_file
    return Scenario(
        address=options.address,
        http_url=options.http,
        arrivals=parse_arrivals(options.arrivals, seed=options.seed),
        lengths=parse_lengths(options.lengths),
        num_requests=options.requests,
        duration_s=options.duration,
        model=options.model,
        api_key=key_file.read_text(encoding="utf-8").strip() if key_file else "",
        seed=options.seed,
        vocab_size=options.vocab_size,
        prompt_file=options.prompt_file,
        timeout_s=options.timeout,
    )


@contextmanager
def _progress() -> Iterator[Tell]:
    """A bar for each door on a terminal; elsewhere a line at the beginning and for each quarter of its requests."""
    console = Console(stderr=True, highlight=False)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(door: str, done: int, num: int) -> None:
            if door not in tasks:
                tasks[door] = bars.add_task(f"{door} requests", total=num)
            bars.update(tasks[door], completed=done)
            if bars.disable and 4 * done // num != 4 * (done - 1) // num:
                console.print(f"{door}: {done} of {num} requests")

        yield tell


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with _progress() as tell:
            result = asyncio.run(run_scenario(_scenario(options), tell))
    except (DoorError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    facts = {
        "model": result.model.name,
        "arrivals": options.arrivals,
        "lengths": options.lengths,
        "seed": options.seed,
    }
    print_summaries(result.summaries, Console())
    if options.json:
        options.json.write_text(as_json(result.summaries, facts) + "\n", encoding="utf-8")
    if options.html:
        options.html.write_text(render(result.records, result.summaries, facts), encoding="utf-8")
    return 1 if result.num_errors else 0


if __name__ == "__main__":
    sys.exit(main())
