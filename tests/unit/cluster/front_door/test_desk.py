"""The desk: from a call to sequences and back, without a network."""

from __future__ import annotations

import asyncio

import pytest

from cluster.front_door.call import Call, Chunk, Message, SamplingOptions, Usage
from cluster.front_door.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestError,
    RequestNotFound,
    Unavailable,
)
from cluster.front_door.limits import Limits
from cluster.front_door.output import ChoiceOutput
from protos.shoal.v1 import session_pb2 as pb
from scheduler.plan import FinishReason
from tests.fakes import BOS, EOS
from tests.unit.cluster.front_door.support import Bench, bench, turns

ONE = ("engine/0",)


def _call(text: str = "hi", **options: object) -> Call:
    return Call(text=text, request_id="r", sampling=SamplingOptions(**options))  # type: ignore[arg-type]


def _text(chunks: list[Chunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


async def test_a_call_from_end_to_end() -> None:
    it = bench(ONE)
    task, (submit,) = await it.begin(_call("hi", max_tokens=5, seed=3))
    assert list(submit.prompt_token_ids) == [BOS, *b"hi"]
    assert (submit.sampling.max_tokens, submit.sampling.seed, submit.request_id) == (5, 3, "r")
    assert list(submit.eos_token_ids) == [EOS]
    assert not submit.HasField("timeout_s")
    it.link().answer(submit, "ab")
    await turns()
    it.link().answer(submit, "cde", finish=pb.FINISH_LENGTH)
    first, last = await task
    assert (first.text, first.usage, first.prompt_token_ids) == ("ab", None, (BOS, *b"hi"))
    assert (last.text, last.position, last.finish) == ("cde", 2, FinishReason.LENGTH)
    assert last.usage == Usage(3, 5, 0)
    assert it.desk.num_open == 0
    assert it.link().cancels == []
    assert it.link().outstanding_tokens == 0


async def test_a_chat_goes_through_the_template() -> None:
    it = bench(ONE)
    task, (submit,) = await it.begin(Call(messages=(Message("user", "hi"),)))
    assert bytes(submit.prompt_token_ids) == b"user: hi\nassistant: "
    task.cancel()


async def test_each_choice_is_a_sequence_with_its_own_seed() -> None:
    it = bench()
    task, submits = await it.begin(_call(n=3, seed=5, max_tokens=2))
    assert len({submit.sampling.seed for submit in submits}) == 3
    assert {len(link.submits) for link in it.made.values()} == {1, 2}
    by_seed = {submit.sampling.seed: (link, submit) for link in it.made.values() for submit in link.submits}
    for at, (link, submit) in enumerate(by_seed.values()):
        link.answer(submit, "xyz"[at] * 2, finish=pb.FINISH_LENGTH)
    chunks = await task
    assert {_text(chunks, index) for index in range(3)} == {"xx", "yy", "zz"}
    assert [chunk.usage for chunk in chunks][:-1] == [None, None]
    assert chunks[-1].usage == Usage(3, 6, 0)


async def test_a_busy_reader_gets_what_has_come_as_one_chunk() -> None:
    it = bench(ONE)
    chunks = it.desk.open(_call(max_tokens=100))
    reading = asyncio.ensure_future(anext(chunks))
    await turns()
    (submit,) = it.link().submits
    it.link().answer(submit, "a")
    assert (await reading).text == "a"
    for letter in "bcdef":
        it.link().answer(submit, letter)
    chunk = await anext(chunks)
    assert (chunk.text, chunk.position, len(chunk.token_ids)) == ("bcdef", 1, 5)
    await chunks.aclose()


async def test_a_stop_string_ends_the_sequence_in_the_engine_at_once() -> None:
    it = bench(ONE)
    task, (submit,) = await it.begin(_call(stop=("lo w",)))
    it.link().answer(submit, "hello")
    it.link().answer(submit, " world")
    assert it.link().cancels == [submit.sequence_id]
    chunks = await task
    assert _text(chunks) == "hel"
    assert (chunks[-1].stop_string, chunks[-1].usage) == ("lo w", Usage(3, 7, 0))


async def test_closing_the_iterator_ends_all_work() -> None:
    it = bench()
    chunks = it.desk.open(_call(n=4))
    reading = asyncio.ensure_future(anext(chunks))
    await turns()
    first = it.link(0).submits[0]
    it.link(0).answer(first, "a")
    await reading
    await chunks.aclose()
    assert len(it.link(0).cancels) + len(it.link(1).cancels) == 4
    assert it.desk.num_open == 0
    assert it.value("shoal_requests_total", door="direct", code="disconnected") == 1


async def test_cancelling_the_reader_ends_all_work() -> None:
    it = bench(ONE)
    task, (submit,) = await it.begin(_call())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert it.link().cancels == [submit.sequence_id]
    assert it.desk.num_open == 0


async def test_cancel_by_id_gives_the_reader_what_there_is() -> None:
    it = bench(ONE)
    task, (submit,) = await it.begin(_call())
    it.link().answer(submit, "part")
    assert not it.desk.cancel("r", client="somebody else")
    assert it.desk.cancel("r")
    chunks = await task
    assert _text(chunks) == "part"
    assert (chunks[-1].finish, chunks[-1].usage) == (FinishReason.CANCELLED, Usage(3, 4, 0))
    assert it.link().cancels == [submit.sequence_id]
    assert not it.desk.cancel("r")


async def test_a_request_id_is_taken_while_open_and_each_clients_own() -> None:
    it = bench(ONE)
    task, _ = await it.begin(_call())
    with pytest.raises(AlreadyExists):
        await anext(it.desk.open(_call()))
    other, (submit,) = await it.begin(Call(text="x", request_id="r", client="ann"))
    assert submit.request_id == "r"
    for each in (task, other):
        each.cancel()


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (Call(text="x", model="other"), ModelNotFound),
        (Call(text="x", sampling=SamplingOptions(n=99)), InvalidRequest),
        (Call(text="x" * 600), InvalidRequest),
        (Call(messages=(Message("robot", "x"),)), InvalidRequest),
        (Call(text="x", timeout_s=0.0), DeadlineExceeded),
        (Call(text="x", timeout_s=-1.0), DeadlineExceeded),
    ],
)
async def test_a_bad_call_reaches_no_engine_and_leaves_nothing(call: Call, kind: type[RequestError]) -> None:
    it = bench(ONE)
    with pytest.raises(kind):
        await anext(it.desk.open(call))
    assert it.link().submits == []
    assert it.desk.num_open == 0
    assert it.metrics.num_open == 0
    task, (submit,) = await it.begin(_call(max_tokens=1))
    it.link().answer(submit, "a", finish=pb.FINISH_LENGTH)
    assert _text(await task) == "a"


async def test_the_deadline_is_carried_and_kept() -> None:
    it = bench(ONE)
    chunks = it.desk.open(Call(text="hi", timeout_s=5.0))
    reading = asyncio.ensure_future(anext(chunks))
    await turns()
    (submit,) = it.link().submits
    assert submit.timeout_s == 5.0
    it.link().answer(submit, "a")
    assert (await reading).text == "a"
    it.clock.advance(4.9)
    it.link().answer(submit, "b")
    it.clock.advance(0.2)
    assert (await anext(chunks)).text == "b", "what came in time is given before the error"
    with pytest.raises(DeadlineExceeded):
        await anext(chunks)
    assert it.link().cancels == [submit.sequence_id]


async def test_a_deadline_that_the_group_finds_over() -> None:
    it = bench(ONE)
    task, (submit,) = await it.begin(Call(text="hi", timeout_s=5.0))
    it.link().end(submit, pb.FINISH_DEADLINE)
    with pytest.raises(DeadlineExceeded):
        await task


async def test_admission_counts_requests_and_tokens() -> None:
    it = bench(ONE, limits=Limits(max_open_requests=1, max_open_tokens=1000))
    task, _ = await it.begin(_call(max_tokens=10))
    with pytest.raises(Overloaded) as caught:
        await anext(it.desk.open(Call(text="x")))
    assert caught.value.retry_after_s
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    with pytest.raises(InvalidRequest, match="may need 1536 tokens"):
        await anext(it.desk.open(_call(n=3)))
    task, submits = await it.begin(_call(n=3, max_tokens=10))
    assert len(submits) == 3
    task.cancel()


async def test_without_a_group_a_call_is_refused_but_waits_for_one_that_was_there() -> None:
    it = bench(ONE, up=False)
    assert not it.desk.ready()
    with pytest.raises(Unavailable, match="no engine is ready"):
        await anext(it.desk.open(_call()))
    it.link().up()
    assert it.desk.ready()
    it.link().down()
    task, submits = await it.begin(_call(max_tokens=1))
    assert submits == []
    it.link().up()
    (submit,) = it.link().submits
    it.link().answer(submit, "a", finish=pb.FINISH_LENGTH)
    assert _text(await task) == "a"


async def test_a_wait_that_is_too_long_ends() -> None:
    it = bench(ONE)
    it.link().down()
    task, _ = await it.begin(_call())
    it.clock.advance(61)
    with pytest.raises(Unavailable):
        await task
    with pytest.raises(Unavailable):
        await anext(it.desk.open(_call()))


async def test_a_bug_in_our_code_is_an_incident_for_one_call_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    it = bench(ONE)
    task, (submit,) = await it.begin(_call())
    other, (spared,) = await it.begin(Call(text="x"))

    def explode(output: ChoiceOutput, said: pb.SequenceOutput) -> int:
        raise ZeroDivisionError("private")

    with monkeypatch.context() as patch:
        patch.setattr(ChoiceOutput, "accept", explode)
        it.link().answer(submit, "a")
    with pytest.raises(InternalError) as caught:
        await task
    assert "private" not in caught.value.message
    assert "ZeroDivisionError: private" in caplog.text
    assert it.link().cancels == [submit.sequence_id]
    it.link().answer(spared, "b", finish=pb.FINISH_LENGTH)
    assert _text(await other) == "b"


async def test_drain_lets_open_calls_finish_and_takes_those_that_could_not_know() -> None:
    it = bench(ONE)
    task, (submit,) = await it.begin(_call())
    draining = asyncio.create_task(it.desk.drain(10))
    await turns()
    assert not it.desk.ready()
    late, (late_submit,) = await it.begin(Call(text="x"))
    it.link().answer(submit, "done", finish=pb.FINISH_LENGTH)
    assert _text(await task) == "done"
    assert not draining.done()
    it.link().answer(late_submit, "too", finish=pb.FINISH_LENGTH)
    assert _text(await late) == "too"
    await draining
    with pytest.raises(Unavailable, match="shutting down"):
        await anext(it.desk.open(Call(text="x")))


async def test_drain_ends_what_takes_too_long() -> None:
    it = bench(ONE)
    task, (submit,) = await it.begin(_call())
    await it.desk.drain(0)
    with pytest.raises(Unavailable, match="shutting down"):
        await task
    assert it.link().cancels == [submit.sequence_id]


async def test_tokenize_and_detokenize() -> None:
    it = bench(ONE)
    assert await it.desk.tokenize(text="hi") == [BOS, *b"hi"]
    assert await it.desk.tokenize(text="hi", add_special_tokens=False) == [*b"hi"]
    assert await it.desk.tokenize(text="x" * 5000, add_special_tokens=False) == [*b"x" * 5000]
    assert bytes(await it.desk.tokenize(messages=[Message("user", "a")])) == b"user: a\nassistant: "
    assert await it.desk.detokenize([*b"hi", EOS], skip_special_tokens=True) == "hi"
    with pytest.raises(InvalidRequest, match=r"token_ids\[1\] is 260"):
        await it.desk.detokenize([1, 260])
    with pytest.raises(ModelNotFound):
        await it.desk.tokenize(model="other", text="hi")
    with pytest.raises(InvalidRequest, match="exactly one"):
        await it.desk.tokenize()


class TestResume:
    async def _interrupted(self, it: Bench, max_tokens: int = 20) -> list[Chunk]:
        """A call whose client went away with some chunks in hand."""
        chunks = it.desk.open(_call(max_tokens=max_tokens))
        reading = asyncio.ensure_future(anext(chunks))
        await turns()
        (submit,) = it.link().submits
        it.link().answer(submit, "abc")
        first = await reading
        it.link().answer(submit, "def")
        await chunks.aclose()
        assert it.link().cancels == [submit.sequence_id]
        return [first]

    async def test_goes_on_behind_what_the_client_holds(self) -> None:
        it = bench(ONE)
        held = await self._interrupted(it, max_tokens=9)
        task = asyncio.create_task(_collect(it, "r", [3]))
        await turns()
        replay = it.link().submits[1]
        assert bytes(replay.output_token_ids) == b"abcdef"
        it.link().answer(replay, "ghi", finish=pb.FINISH_LENGTH)
        rest = await task
        assert _text(held) + _text(rest) == "abcdefghi"
        assert rest[0].position == 3
        assert rest[-1].usage == Usage(3, 9, 0)
        assert rest[0].prompt_token_ids == ()

    async def test_a_finished_call_can_be_read_again(self) -> None:
        it = bench(ONE)
        task, (submit,) = await it.begin(_call())
        it.link().answer(submit, "abc", finish=pb.FINISH_LENGTH)
        whole = await task
        again = await _collect(it, "r", [])
        assert _text(again) == _text(whole) == "abc"
        assert again[-1].usage == whole[-1].usage
        assert len(it.link().submits) == 1
        (end,) = await _collect(it, "r", [3])
        assert (end.text, end.finish) == ("", FinishReason.LENGTH)

    async def test_an_open_call_is_taken_over(self) -> None:
        it = bench(ONE)
        task, (submit,) = await it.begin(_call())
        it.link().answer(submit, "ab")
        await turns()
        resumed = asyncio.create_task(_collect(it, "r", [1]))
        await turns()
        with pytest.raises(Cancelled, match="resumed by another call"):
            await task
        it.link().answer(submit, "cd", finish=pb.FINISH_LENGTH)
        assert _text(await resumed) == "bcd"
        assert it.link().cancels == []
        assert it.desk.num_open == 0

    async def test_what_is_refused(self) -> None:
        it = bench(ONE)
        await self._interrupted(it)
        for request_id, client in (("unknown", ""), ("r", "somebody else")):
            with pytest.raises(RequestNotFound):
                await _collect(it, request_id, [0], client=client)
        for positions in ([7], [1, 2]):
            with pytest.raises(InvalidRequest) as caught:
                await _collect(it, "r", positions)
            assert caught.value.field == "positions"
        it.clock.advance(61)
        with pytest.raises(RequestNotFound):
            await _collect(it, "r", [0])

    async def test_memory_is_bounded(self) -> None:
        it = bench(ONE, limits=Limits(max_resumable_requests=2))
        for number in range(4):
            task, (submit,) = await it.begin(Call(text="x", request_id=str(number)))
            it.link().answer(submit, "a", finish=pb.FINISH_LENGTH)
            await task
        for number in (0, 1):
            with pytest.raises(RequestNotFound):
                await _collect(it, str(number), [])
        assert _text(await _collect(it, "3", [])) == "a"


async def _collect(it: Bench, request_id: str, positions: list[int], client: str = "") -> list[Chunk]:
    return [chunk async for chunk in it.desk.resume(request_id, positions, client=client)]
