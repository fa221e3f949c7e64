"""Two policies on the running engine, with a real model, each against the plain one, turn by turn.

    python -m loadtest.peers.scheduler_engine

While several streams decode, a prompt of about 8,000 tokens arrives: the worst gap between two tokens of the others,
with steps that keep to a target time and without. And conversations of several turns over two engines: what of their
prompts the prefix caches held, and the time to their first tokens, with prefix routing and with round-robin.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import grpc

from loadtest.peers.comparison import Figure, Findings, begin, deliver, progress
from loadtest.peers.server import DEFAULT_MODEL, serving
from loadtest.stats import percentile
from protos.shoal.v1 import inference_pb2 as pb
from protos.shoal.v1 import inference_pb2_grpc as rpc

__all__ = ["Answer", "findings_of", "worst_gap_s"]

_NUM_DECODING, _DECODE_TOKENS, _LONG_TOKENS = 6, 2000, 8000
_SYSTEM_TOKENS, _TURN_TOKENS, _ANSWER_TOKENS, _NUM_TURNS = 192, 64, 16, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One stream: when each message with tokens came, and what its last one said of the prompt."""

    sent_s: float
    times_s: tuple[float, ...]
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversations:
    hit_rate: float
    ttft_p50_s: float
    ttft_p99_s: float


def worst_gap_s(times_s: Sequence[float], from_s: float, to_s: float) -> float:
    """The longest time between two messages of which one lies in the window."""
    pairs = itertools.pairwise(times_s)
    return max((later - earlier for earlier, later in pairs if later >= from_s and earlier <= to_s), default=0.0)


async def _ask(
    stub: rpc.InferenceAsyncStub, prompt: Sequence[int], max_tokens: int, times_s: list[float] | None = None
) -> Answer:
    """`times_s` grows while the answer comes."""
    request = pb.GenerateRequest(sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0))
    request.token_ids.ids.extend(prompt)
    sent_s = time.perf_counter()
    times_s = [] if times_s is None else times_s
    token_ids: list[int] = []
    usage = pb.Usage()
    async for chunk in stub.Generate(request):
        if chunk.token_ids:
            times_s.append(time.perf_counter())
            token_ids.extend(chunk.token_ids)
        if chunk.HasField("usage"):
            usage = chunk.usage
    return Answer(
        sent_s=sent_s,
        times_s=tuple(times_s),
        token_ids=tuple(token_ids),
        num_prompt_tokens=usage.prompt_tokens,
        num_cached_tokens=usage.cached_tokens,
    )


async def _ids(stub: rpc.InferenceAsyncStub) -> range:
    """Token ids to draw from: those in the middle of the vocabulary, where no special ones are."""
    (model,) = (await stub.ListModels(pb.ListModelsRequest(), timeout=20.0)).models
    return range(model.vocab_size // 10, model.vocab_size - model.vocab_size // 10)


async def _gap(address: str) -> tuple[float, float]:
    """The others' worst gap while the long prompt is prefilled, and its time to first token; seconds."""
    rng = random.Random(5)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rpc.InferenceStub(channel)
        ids = await _ids(stub)
        for length in (16, 64, 128, 256, 512, 1024):  # the engine learns what steps of many sizes take
            await _ask(stub, rng.choices(ids, k=length), 4)
        seen: list[list[float]] = [[] for _ in range(_NUM_DECODING)]
        others = [asyncio.create_task(_ask(stub, rng.choices(ids, k=64), _DECODE_TOKENS, times_s)) for times_s in seen]
        await asyncio.sleep(3.0)
        long = await _ask(stub, rng.choices(ids, k=_LONG_TOKENS), 2)
        if any(task.done() for task in others):
            raise RuntimeError("another stream ended before the long prompt was prefilled")
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return max(worst_gap_s(times_s, long.sent_s, long.times_s[0]) for times_s in seen), long.ttft_s


async def _conversation(stub: rpc.InferenceAsyncStub, rng: random.Random, ids: range) -> list[Answer]:
    """Every turn repeats all that was said."""
    history, answers = rng.choices(ids, k=_SYSTEM_TOKENS), []
    for _ in range(_NUM_TURNS):
        await asyncio.sleep(rng.uniform(0.2, 1.0))
        history += rng.choices(ids, k=_TURN_TOKENS)
        answers.append(await _ask(stub, history, _ANSWER_TOKENS))
        history += answers[-1].token_ids
    return answers


async def _conversations(address: str, count: int) -> Conversations:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rpc.InferenceStub(channel)
        ids = await _ids(stub)
        turns = [_conversation(stub, random.Random(seed), ids) for seed in range(count)]
        answers = [answer for each in await asyncio.gather(*turns) for answer in each]
    ttft_s = sorted(answer.ttft_s for answer in answers)
    return Conversations(
        hit_rate=sum(one.num_cached_tokens for one in answers) / sum(one.num_prompt_tokens for one in answers),
        ttft_p50_s=median(ttft_s),
        ttft_p99_s=percentile(ttft_s, 99.0),
    )


def findings_of(
    gaps: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    talks: Sequence[tuple[Conversations, Conversations]],
    facts: dict[str, str],
) -> Findings:
    """Rounds of (ours, plain)."""
    columns = [
        ("worst gap of others, 8k prompt arrives", "ms", [(1e3 * a[0], 1e3 * b[0]) for a, b in gaps], None),
        ("that prompt's time to first token", "ms", [(1e3 * a[1], 1e3 * b[1]) for a, b in gaps], None),
        ("conversations over two engines: prefix hits", "share", [(a.hit_rate, b.hit_rate) for a, b in talks], 1.0),
        ("their time to first token, p50", "ms", [(1e3 * a.ttft_p50_s, 1e3 * b.ttft_p50_s) for a, b in talks], None),
        ("their time to first token, p99", "ms", [(1e3 * a.ttft_p99_s, 1e3 * b.ttft_p99_s) for a, b in talks], None),
    ]
    figures = tuple(
        Figure(
            what=what,
            unit=unit,
            ours=tuple(one for one, _ in rounds),
            peers=tuple(other for _, other in rounds),
            goal=goal,
        )
        for what, unit, rounds, goal in columns
        if rounds
    )
    return Findings(
        title="Policies on the running engine; the peer is the plain one", peer="plain", figures=figures, facts=facts
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", default=str(DEFAULT_MODEL))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--target", type=float, default=0.1, help="scheduling.target_step_s")
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--only", choices=("gaps", "conversations"))
    options = begin(parser)

    def gap(target_s: float) -> tuple[float, float]:
        progress(f"an 8k prompt arrives, target_step_s: {target_s:g}")
        config = f"scheduling: {{target_step_s: {target_s}}}\nresources: {{cache_size: 1GiB}}\n"
        with serving("--model-path", options.model_path, config=config) as server:
            return asyncio.run(_gap(server.address))

    def talk(routing: str) -> Conversations:
        progress(f"conversations, routing: {routing}")
        config = f"scheduling: {{routing: {routing}}}\nresources: {{cache_size: 512MiB}}\n"
        with serving("--model-path", options.model_path, "--engines", "2", config=config) as server:
            return asyncio.run(_conversations(server.address, options.conversations))

    gaps = [(gap(options.target), gap(0.0)) for _ in range(options.rounds if options.only != "conversations" else 0)]
    talks = [
        (talk("prefix-affinity"), talk("round-robin")) for _ in range(options.rounds if options.only != "gaps" else 0)
    ]
    facts = {
        "an 8k prompt": f"{_LONG_TOKENS} tokens, {_NUM_DECODING} streams decode; target_step_s: {options.target}",
        "conversations": f"{options.conversations} at once, {_NUM_TURNS} turns, two engines",
    }
    deliver(findings_of(gaps, talks, facts), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
