"""Guided sequences over a DP group's stream: replayed, preempted, cancelled, refused; real loop, real sampler."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from protos.shoal.v1 import inference_pb2, session_pb2
from scheduler.batcher import Batcher, BatcherSettings
from scheduler.plan import StepPlan, StepResult
from tests.integration.front_door_stream import FrontDoorStream, sampling
from tests.integration.rank_process import SECRET
from tests.unit.cluster.tiny_tokenizers import byte_level
from tests.unit.workers.guided.support import EOS, VOCAB, encode, text_of
from tests.unit.workers.stage_threads import StageThreads, noise
from workers.guided import GrammarCompiler
from workers.loop import StepLoop
from workers.pipelined_loop import PipelinedLoop
from workers.records import Records
from workers.sampler import Sampler
from workers.session import SessionServer

SENTENCE = inference_pb2.GuidedDecoding(regex=r"([a-z]{1,7} ){3,6}[0-9]{1,4}!")
PROMPT = list(range(5, 17))


class Group:
    """A first rank's loop and session, whose model is noise that depends on the history."""

    def __init__(self, *, num_blocks: int = 64, overlap: bool = False, num_stages: int = 1) -> None:
        self.compiler = GrammarCompiler(byte_level().to_str(), VOCAB)
        self._sampler = Sampler()
        settings = BatcherSettings(
            max_batch_size=8,
            max_batch_tokens=8,
            max_model_len=128,
            block_size=4,
            num_blocks=num_blocks,
            max_waiting=64,
        )
        self.batcher = Batcher(settings, clock=time.monotonic, generation=1, num_flights=num_stages)
        self.stages: StageThreads | None = None
        if num_stages == 1:
            self.loop = StepLoop(self.batcher, self._run, rank=0, clock=time.monotonic, overlap=overlap)
        else:
            self.stages = StageThreads(num_stages, block_size=4, vocab_size=VOCAB)
            self.loop = PipelinedLoop(self.batcher, self.stages.first, rank=0, clock=time.monotonic)
            self.stages.start(self.loop.wake, self.loop.fail)
        self.session = SessionServer(
            self.loop,
            host="127.0.0.1",
            secret=SECRET.encode(),
            generation=1,
            info=session_pb2.GroupInfo(engine="e"),
            vocab_size=VOCAB,
            records=Records(time.monotonic, keep_s=60.0),
            grammars=self.compiler,
        )
        self.address = f"127.0.0.1:{self.session.start()}"
        self.loop.start()

    def _run(self, plan: StepPlan, _: str) -> StepResult:
        rows = []
        for one in plan.sequences:
            known = array("q", one.history[: one.num_computed + one.num_tokens])
            rows += [noise(known, VOCAB)] * one.num_logits
        return self._sampler.sample(torch.stack(rows) if rows else torch.empty(0, VOCAB), plan)

    def close(self) -> None:
        self.loop.stop(5)
        if self.stages is not None:
            self.stages.close()
        self.session.stop()
        self.compiler.close()


@pytest.fixture(params=[{}, {"overlap": True}, {"num_stages": 3}], ids=["plain", "overlapped", "pipelined"])
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """All of them promise the same."""
    return dict(request.param)


@pytest.fixture
def group(kind: dict[str, Any]) -> Iterator[Group]:
    group = Group(**kind)
    yield group
    group.close()


def submit(
    number: int, guided: inference_pb2.GuidedDecoding | None, *output: int, **fields: object
) -> session_pb2.Submit:
    params = {"temperature": 1.0, "seed": number, "ignore_eos": False, "guided": guided, **fields}
    return session_pb2.Submit(
        sequence_id=number,
        prompt_token_ids=PROMPT,
        output_token_ids=output,
        sampling=sampling(params.pop("max_tokens", 80), **params),  # type: ignore[arg-type]
        eos_token_ids=[EOS],
    )


async def outputs(group: Group, *submits: session_pb2.Submit) -> dict[int, list[int]]:
    async with FrontDoorStream(group.address) as stream:
        for one in submits:
            await stream.send(one)
        await stream.until(lambda: len(stream.finishes) == len(submits))
        assert set(stream.finishes.values()) == {session_pb2.FINISH_STOP}, stream.errors
        return {one.sequence_id: stream.tokens[one.sequence_id] for one in submits}


async def test_a_stream_cut_at_any_position_goes_on_with_the_same_tokens(group: Group) -> None:
    (whole,) = (await outputs(group, submit(7, SENTENCE))).values()
    text = text_of(whole)
    assert text.endswith("!")
    assert len(text.split(" ")) >= 4
    for cut in range(len(whole) + 1):
        (rest,) = (await outputs(group, submit(7, SENTENCE, *whole[:cut]))).values()
        assert rest == whole


async def test_all_kinds_of_loops_say_the_same(group: Group, kind: dict[str, Any]) -> None:
    """Guided ones beside others, with what else decides about a token."""
    choice = inference_pb2.GuidedDecoding(choice=inference_pb2.GuidedDecoding.Choices(texts=["yes", "yes sir", "no"]))
    digits = inference_pb2.GuidedDecoding(regex="[0-9]*")
    submits = [
        submit(1, SENTENCE),
        submit(2, choice, temperature=0.0),
        submit(3, SENTENCE, repetition_penalty=1.3, logprobs=2),
        submit(4, None, max_tokens=20, stop_token_ids=list(range(0, VOCAB, 9))),
        submit(5, digits, min_tokens=5),
        submit(6, choice, prompt_logprobs=1, ignore_eos=True, min_tokens=30),
        submit(7, inference_pb2.GuidedDecoding(regex="one"), *encode("one")),
    ]
    plain = Group()
    try:
        expected = await outputs(plain, *submits)
    finally:
        plain.close()
    assert await outputs(group, *submits) == expected
    assert text_of(expected[2]) in ("yes", "yes sir", "no")
    assert text_of(expected[7]) == "one"
    if group.stages is not None:
        assert len({cache.num_steps for cache in group.stages.caches}) == 1


async def test_preempted_ones_go_on_as_if_nothing_had_been(group: Group, kind: dict[str, Any]) -> None:
    submits = [submit(number, SENTENCE) for number in range(1, 13)]
    tight = Group(num_blocks=20, **kind)
    try:
        crowded = await outputs(tight, *submits)
        assert tight.batcher.load().num_preemptions > 0
    finally:
        tight.close()
    for one in submits:
        assert crowded[one.sequence_id] == (await outputs(group, one))[one.sequence_id]


async def test_others_go_on_while_a_grammar_is_compiled_and_a_cancel_finds_it(group: Group) -> None:
    free = threading.Event()
    await outputs(group, submit(1, SENTENCE))
    assert group.compiler._threads is not None
    group.compiler._threads.submit(free.wait)
    try:
        async with FrontDoorStream(group.address) as stream:
            await stream.send(submit(2, inference_pb2.GuidedDecoding(regex="a+b")))
            await stream.send(submit(3, inference_pb2.GuidedDecoding(regex="a+c")))
            await stream.send(submit(4, SENTENCE))
            await stream.until(lambda: 4 in stream.finishes)
            await stream.cancel(3)
            await stream.until(lambda: 3 in stream.finishes)
            assert stream.finishes[3] == session_pb2.FINISH_CANCELLED
            assert 2 not in stream.finishes
            free.set()
            await stream.until(lambda: 2 in stream.finishes)
            assert text_of(stream.tokens[2]).endswith("b")
            assert not stream.tokens[3]
    finally:
        free.set()


async def test_a_stream_that_ends_takes_what_is_being_compiled_with_it(group: Group) -> None:
    free = threading.Event()
    await outputs(group, submit(1, SENTENCE))
    assert group.compiler._threads is not None
    group.compiler._threads.submit(free.wait)
    try:
        async with FrontDoorStream(group.address) as stream:
            await stream.send(submit(2, inference_pb2.GuidedDecoding(regex="x*")))
        async with FrontDoorStream(group.address):
            free.set()
        assert list(await outputs(group, submit(1, SENTENCE))) == [1]
        assert not group.batcher.has_work
    finally:
        free.set()


async def test_a_grammar_that_cannot_be_used_is_told_and_harms_nobody(group: Group) -> None:
    async with FrontDoorStream(group.address) as stream:
        await stream.send(submit(1, SENTENCE))
        await stream.send(submit(2, inference_pb2.GuidedDecoding(regex="a(")))
        await stream.send(submit(3, inference_pb2.GuidedDecoding(regex="abc"), *PROMPT))
        await stream.until(lambda: len(stream.finishes) == 3)
        assert stream.finishes == {
            1: session_pb2.FINISH_STOP,
            2: session_pb2.FINISH_INVALID,
            3: session_pb2.FINISH_INVALID,
        }
        assert "unclosed group" in stream.errors[2]
        assert "cannot be followed" in stream.errors[3]
