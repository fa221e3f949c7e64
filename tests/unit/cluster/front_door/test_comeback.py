"""A request that another front door took in: from what groups remember, or from what the client brings along."""

from __future__ import annotations

import asyncio
import random

import pytest

from cluster.front_door.call import Call, Chunk, SamplingOptions
from cluster.front_door.claims import complete
from cluster.front_door.comeback import Held
from cluster.front_door.errors import AlreadyExists, Cancelled, InvalidRequest, RequestNotFound
from protos.shoal.v1 import session_pb2 as pb
from tests.unit.cluster.front_door.support import Bench, bench, read, turns
from workers.records import Record


def _call(**options: object) -> Call:
    return Call(text="hi", request_id="r", client="alice", sampling=SamplingOptions(**options))  # type: ignore[arg-type]


def _records(it: Bench, *outputs: tuple[pb.Submit, bytes]) -> list[pb.SequenceRecord]:
    """As the group keeps what it was asked and what it said."""
    found = []
    for submit, text in outputs:
        copy = pb.Submit()
        copy.CopyFrom(submit)
        record = Record(copy, (1, submit.sequence_id))
        if text:
            asked = submit.sampling.HasField("logprobs")
            logprobs = [pb.Logprobs(token_id=token, logprob=-0.25, rank=1) for token in text] if asked else []
            record.see(pb.SequenceOutput(token_ids=text, logprobs=logprobs, num_cached_tokens=1))
        found.append(record.message())
    return found


async def _resume(it: Bench, positions: list[int], held: Held | None = None) -> asyncio.Task[list[Chunk]]:
    async def run() -> list[Chunk]:
        return [chunk async for chunk in it.desk.resume("r", positions, client="alice", held=held)]

    task = asyncio.create_task(run())
    await turns()
    return task


async def _begun(text: bytes, **options: object) -> tuple[pb.Submit, pb.SequenceRecord]:
    """A request as one front door begins it, and what a group keeps of it after `text`."""
    first = bench(("engine/0",))
    task, (submit,) = await first.begin(_call(**options))
    (record,) = _records(first, (submit, text))
    task.cancel()
    return submit, record


async def test_another_front_door_goes_on_from_the_position() -> None:
    _, record = await _begun(b"abcd", seed=5, max_tokens=8)
    it = bench()
    it.link(1).records = [record]
    task = await _resume(it, [2])
    (submit,) = it.link(0).submits + it.link(1).submits
    assert bytes(submit.output_token_ids) == b"abcd"
    assert (submit.sampling.seed, submit.sampling.max_tokens, submit.origin.attempt) == (5, 8, 2)
    link = next(link for link in it.made.values() if submit in link.submits)
    link.answer(submit, "efgh", finish=pb.FINISH_LENGTH)
    chunks = await task
    assert [(chunk.position, chunk.text) for chunk in chunks] == [(2, "cd"), (4, "efgh")]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert it.metrics.num_open == 0


async def test_stop_strings_and_logprobs_are_taken_over() -> None:
    _, record = await _begun(b"ab", stop=("bcd",), logprobs=0)
    it = bench(("engine/0",))
    it.link().records = [record]
    task = await _resume(it, [1])
    (submit,) = it.link().submits
    assert [entry.token_id for entry in submit.origin.output_logprobs] == list(b"ab")
    it.link().say(
        pb.SequenceOutput(
            sequence_id=submit.sequence_id,
            position=2,
            token_ids=b"cde",
            logprobs=[pb.Logprobs(token_id=token, logprob=-1.0, rank=1) for token in b"cde"],
        )
    )
    chunks = await task
    assert "".join(chunk.text for chunk in chunks) == "", "the stop string began before the front door died"
    assert chunks[-1].stop_string == "bcd"
    assert [entry.token_id for chunk in chunks for entry in chunk.logprobs] == list(b"bcd")


async def test_a_sequence_that_is_claimed_ends_its_first_reader() -> None:
    it = bench(("engine/0",))
    task, (submit,) = await it.begin(_call())
    it.link().end(submit, pb.FINISH_MOVED)
    with pytest.raises(Cancelled, match="another call"):
        await task


async def test_who_comes_back_after_it_went_on_elsewhere_gets_the_newer_state() -> None:
    it = bench(("engine/0",))
    task, (submit,) = await it.begin(_call())
    it.link().answer(submit, "ab")
    await turns()
    task.cancel()
    await turns()
    assert it.link().cancels == [submit.sequence_id]
    it.link().records = _records(it, (submit, b"cdef"))  # another front door replayed it from "ab"
    resumed = await _resume(it, [5])
    again = it.link().submits[-1]
    assert bytes(again.output_token_ids) == b"abcdef"
    it.link().answer(again, "g", finish=pb.FINISH_LENGTH)
    assert "".join(chunk.text for chunk in await resumed) == "fg"


async def test_what_nobody_remembers_is_not_found() -> None:
    it = bench()
    with pytest.raises(RequestNotFound):
        await (await _resume(it, []))
    assert it.metrics.num_open == 0


async def test_the_client_may_bring_everything_along() -> None:
    it = bench(("engine/0",))
    held = Held(call=_call(seed=3, max_tokens=4, n=2), token_ids=[b"ab", b"xy"], done=frozenset({1}))
    task = await _resume(it, [2, 2], held)
    (submit,) = it.link().submits
    assert (bytes(submit.output_token_ids), submit.sampling.seed) == (b"ab", 3)
    it.link().answer(submit, "cd", finish=pb.FINISH_LENGTH)
    chunks = await task
    assert "".join(chunk.text for chunk in chunks if chunk.index == 0) == "cd"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert it.metrics.num_open == 0


async def test_more_choices_than_were_asked_for_cannot_be_held() -> None:
    it = bench(("engine/0",))
    with pytest.raises(InvalidRequest, match="held"):
        await (await _resume(it, [1, 1], Held(call=_call(), token_ids=[b"a", b"b"])))
    assert it.metrics.num_open == 0
    assert it.desk.num_open == 0


async def test_an_idempotency_key_goes_on_with_what_runs() -> None:
    it = bench(("engine/0",))
    call = Call(text="hi", request_id="key", idempotency_key="key", client="alice")
    first, (submit,) = await it.begin(call)
    it.link().answer(submit, "ab")
    await turns()
    second, submits = await it.begin(call)
    assert not submits, "nothing is started twice"
    with pytest.raises(Cancelled):
        await first
    it.link().answer(submit, "c", finish=pb.FINISH_LENGTH)
    assert "".join(chunk.text for chunk in await second) == "abc"
    third, submits = await it.begin(call)
    assert not submits
    assert "".join(chunk.text for chunk in await third) == "abc", "the answer is still there"


async def test_an_idempotency_key_is_known_at_another_front_door() -> None:
    call = Call(text="hi", request_id="key", idempotency_key="key", client="alice")
    first = bench(("engine/0",))
    task, (submit,) = await first.begin(call)
    records = _records(first, (submit, b"ab"))
    task.cancel()
    it = bench(("engine/0",))
    it.link().records = records
    second, (again,) = await it.begin(call)
    assert bytes(again.output_token_ids) == b"ab"
    it.link().answer(again, "c", finish=pb.FINISH_LENGTH)
    assert "".join(chunk.text for chunk in await second) == "abc"


async def test_an_idempotency_key_with_another_request_is_refused() -> None:
    it = bench(("engine/0",))
    call = Call(text="hi", request_id="key", idempotency_key="key", client="alice")
    first, _ = await it.begin(call)
    other = Call(text="ho", request_id="key", idempotency_key="key", client="alice")
    with pytest.raises(AlreadyExists, match="another request"):
        await read(it.desk, other)
    assert not first.done(), "the first goes on"
    first.cancel()


async def test_a_cancel_reaches_other_front_doors_requests() -> None:
    it = bench(("engine/0",))
    assert not await it.desk.cancel_anywhere("r", "alice")
    it.link().records = [pb.SequenceRecord()]
    assert await it.desk.cancel_anywhere("r", "alice")
    assert it.link().claims[-1] == ("alice", "r", True)


def _record(index: int, attempt: int, num_tokens: int, *, n: int = 2, opened: int = 1) -> pb.SequenceRecord:
    origin = pb.Origin(index=index, n=n, attempt=attempt, opened_unix_ns=opened)
    return pb.SequenceRecord(submit=pb.Submit(origin=origin), output=pb.SequenceOutput(token_ids=[1] * num_tokens))


def test_the_newest_attempt_of_every_choice_counts() -> None:
    newest = [_record(0, 2, 1), _record(1, 1, 4)]
    older = [_record(0, 1, 9), _record(1, 1, 3), _record(0, 7, 9, opened=0)]
    for seed in range(5):
        shuffled = random.Random(seed).sample([*newest, *older], 5)
        assert list(complete(shuffled)) == newest


def test_a_missing_choice_makes_it_nothing_unless_it_is_done() -> None:
    assert complete([_record(0, 1, 1)]) == ()
    assert len(complete([_record(0, 1, 1)], done=(1,))) == 1
    assert complete([]) == ()
