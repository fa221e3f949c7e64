"""What a client sees when DP groups fail: a pause, never a repeated or a missing token."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.front_door.call import Call, Chunk, SamplingOptions
from cluster.front_door.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from cluster.front_door.limits import Limits
from cluster.front_door.validate import choice_seed
from protos.shoal.v1 import session_pb2 as pb
from tests.fakes import BOS, hashed
from tests.unit.cluster.front_door.support import Bench, ScriptedLink, address, bench, turns

NUM_TOKENS = 12


def _call(**options: object) -> Call:
    return Call(text="hi", request_id="r", sampling=SamplingOptions(**options))  # type: ignore[arg-type]


def _text(chunks: list[Chunk]) -> str:
    position = 0
    for chunk in chunks:
        assert chunk.position == position
        position += len(chunk.token_ids)
    return "".join(chunk.text for chunk in chunks)


def _where(it: Bench, submit: pb.Submit) -> int:
    return next(at for at in range(len(it.made)) if submit in it.link(at).submits)


async def test_a_lost_stream_is_replayed_on_another_group() -> None:
    it = bench()
    task, (submit,) = await it.begin(_call(max_tokens=6, prompt_logprobs=1))
    at = _where(it, submit)
    it.link(at).answer(submit, "abc")
    it.link(at).down()
    (replay,) = it.link(1 - at).submits
    assert bytes(replay.output_token_ids) == b"abc"
    assert not replay.sampling.HasField("prompt_logprobs")
    assert replay.sampling.max_tokens == 6
    it.link(1 - at).answer(replay, "def", finish=pb.FINISH_LENGTH)
    assert _text(await task) == "abcdef"
    assert it.value("shoal_replays_total") == 1


async def test_without_another_group_the_choice_waits_for_one() -> None:
    it = bench(("engine/0",))
    task, (submit,) = await it.begin(_call())
    it.link().answer(submit, "abc")
    it.link().down()
    it.clock.advance(30)
    it.link().up()
    (replay,) = it.link().submits
    it.link().answer(replay, "d", finish=pb.FINISH_LENGTH)
    assert _text(await task) == "abcd"


async def test_a_choice_does_not_wait_for_ever() -> None:
    it = bench(("engine/0",))
    task, (submit,) = await it.begin(_call())
    it.link().answer(submit, "abc")
    it.link().down()
    it.clock.advance(61)
    with pytest.raises(Unavailable):
        await task


async def test_the_deadline_goes_on_while_a_choice_waits() -> None:
    it = bench(("engine/0",))
    _, (submit,) = await it.begin(Call(text="hi", timeout_s=10))
    assert submit.timeout_s == 10
    it.link().down()
    it.clock.advance(4)
    it.link().up()
    (replay,) = it.link().submits
    assert replay.timeout_s == 6
    it.clock.advance(7)
    assert it.link().cancels == [replay.sequence_id]


async def test_failures_are_replayed_with_pauses_and_not_for_ever() -> None:
    it = bench(limits=Limits(max_replays=3))
    task, (submit,) = await it.begin(_call())
    for attempt in range(4):
        assert not task.done()
        at = _where(it, submit)
        before = [len(it.link(i).submits) for i in range(2)]
        it.link(at).end(submit, pb.FINISH_FAILED, "a rank died")
        if attempt == 3:
            break
        if attempt:
            assert [len(it.link(i).submits) for i in range(2)] == before, "a pause comes first"
        it.clock.advance(5)
        submit = next(it.link(i).submits[-1] for i in range(2) if len(it.link(i).submits) > before[i])
        if not attempt:
            assert _where(it, submit) != at
    with pytest.raises(Unavailable, match="too often"):
        await task


async def test_what_a_bad_version_fails_the_old_one_finishes() -> None:
    it = bench()
    versions = [replace(address(f"engine/{at}", port=at + 1), version=str(at + 1)) for at in range(2)]
    it.links.set_groups(versions)
    for link in it.made.values():
        link.up()
    it.links.set_weights({"1": 0.0, "2": 1.0})
    task, (submit,) = await it.begin(_call(max_tokens=6))
    assert _where(it, submit) == 1
    it.link(1).answer(submit, "ab")
    it.link(1).end(submit, pb.FINISH_FAILED, "the weights are no good")
    (replay,) = it.link(0).submits
    it.link(0).answer(replay, "cdef", finish=pb.FINISH_LENGTH)
    assert _text(await task) == "abcdef"


async def test_a_gap_is_not_forwarded_but_replayed() -> None:
    it = bench()
    task, (submit,) = await it.begin(_call())
    at = _where(it, submit)
    it.link(at).answer(submit, "ab")
    it.link(at).say(pb.SequenceOutput(sequence_id=submit.sequence_id, position=3, token_ids=b"d"))
    assert it.link(at).cancels == [submit.sequence_id]
    (replay,) = it.link(1 - at).submits
    assert bytes(replay.output_token_ids) == b"ab"
    it.link(1 - at).answer(replay, "cd", finish=pb.FINISH_LENGTH)
    assert _text(await task) == "abcd"


async def test_news_of_an_old_generation_is_refused() -> None:
    it = bench(("engine/0",))
    task, (submit,) = await it.begin(_call())
    it.links.set_groups([address(generation=5)])
    with pytest.raises(Exception, match="generation 1, the roster at 5"):
        it.link().say(pb.SequenceOutput(sequence_id=submit.sequence_id, position=0, token_ids=b"x"), generation=1)
    it.link().down("stale")
    it.link().up()
    (replay,) = it.link().submits
    it.link().answer(replay, "y", finish=pb.FINISH_LENGTH)
    assert _text(await task) == "y"


async def test_a_group_that_leaves_the_roster_finishes_what_it_has() -> None:
    it = bench()
    task, (submit,) = await it.begin(_call())
    leaving = it.link(_where(it, submit))
    staying = it.link(1 - _where(it, submit))
    it.links.set_groups([staying.address])
    leaving.answer(submit, "ab")
    for _ in range(3):
        await it.begin(Call(text="x"))
    assert len(leaving.submits) == 1
    leaving.answer(submit, "c", finish=pb.FINISH_LENGTH)
    assert _text(await task) == "abc"
    await turns()
    assert not leaving.ready, "its stream was closed behind the last answer"


async def test_a_lost_group_is_not_waited_for() -> None:
    it = bench()
    task, (submit,) = await it.begin(_call())
    at = _where(it, submit)
    it.link(at).answer(submit, "ab")
    it.links.set_groups([it.link(1 - at).address], lost=[it.link(at).address.target])
    (replay,) = it.link(1 - at).submits
    assert bytes(replay.output_token_ids) == b"ab"
    it.link(1 - at).answer(replay, "c", finish=pb.FINISH_LENGTH)
    assert _text(await task) == "abc"
    assert not it.link(at).ready


async def test_a_group_at_the_address_of_a_lost_one_is_used() -> None:
    it = bench(("engine/0",))
    task, (submit,) = await it.begin(_call())
    it.links.set_groups([it.link().address], lost=[it.link().address.target])
    it.link().answer(submit, "abc", finish=pb.FINISH_LENGTH)
    assert _text(await task) == "abc"


async def test_a_group_at_a_new_address_is_a_new_group() -> None:
    it = bench(("engine/0",))
    old = it.link()
    it.links.set_groups([address(port=99)])
    assert it.link() is not old
    await turns()
    assert not it.desk.ready()
    it.link().up()
    assert it.desk.ready()


async def test_a_full_group_hands_on_to_the_next() -> None:
    it = bench()
    task, (submit,) = await it.begin(_call())
    at = _where(it, submit)
    it.link(at).end(submit, pb.FINISH_REFUSED, "queue full: 5 requests are waiting")
    (second,) = it.link(1 - at).submits
    it.link(1 - at).end(second, pb.FINISH_REFUSED, "queue full: 7 requests are waiting")
    with pytest.raises(Overloaded, match="7 requests are waiting") as caught:
        await task
    assert caught.value.retry_after_s


async def test_the_client_hears_the_soonest_of_the_groups_hints() -> None:
    it = bench()
    task, (submit,) = await it.begin(_call())
    at = _where(it, submit)
    it.link(at).end(submit, pb.FINISH_REFUSED, "too late", retry_after_s=2.5)
    (second,) = it.link(1 - at).submits
    it.link(1 - at).end(second, pb.FINISH_REFUSED, "too late", retry_after_s=7.0)
    with pytest.raises(Overloaded, match="too late") as caught:
        await task
    assert caught.value.retry_after_s == 2.5


async def test_a_deadline_out_of_reach_is_told_with_the_estimate() -> None:
    it = bench()
    task, (submit,) = await it.begin(Call(text="hi", timeout_s=10))
    it.link(_where(it, submit)).end(submit, pb.FINISH_DEADLINE, "about 12 s are needed, 10 s are left")
    with pytest.raises(DeadlineExceeded, match="about 12 s are needed"):
        await task


async def test_a_full_group_is_only_a_pause_for_a_stream_that_has_begun() -> None:
    it = bench(("engine/0",))
    task, (submit,) = await it.begin(_call())
    it.link().answer(submit, "ab")
    it.link().down()
    it.link().up()
    (replay,) = it.link().submits
    it.link().end(replay, pb.FINISH_REFUSED, "queue full")
    it.clock.advance(2)
    replay = it.link().submits[-1]
    it.link().answer(replay, "c", finish=pb.FINISH_LENGTH)
    assert _text(await task) == "abc"


async def test_what_fits_no_group_is_the_callers_mistake() -> None:
    it = bench(("engine/0",), up=False)
    it.link().up(num_blocks=1)
    task, (submit,) = await it.begin(Call(text="x" * 40))
    it.link().end(submit, pb.FINISH_REFUSED, "the sequence has 41 tokens, and the whole KV cache holds 16")
    with pytest.raises(InvalidRequest, match="holds 16"):
        await task


class Group:
    """Answers on a link as a real group does: by a function of prompt, output and seed."""

    def __init__(self, link: ScriptedLink) -> None:
        self.link = link
        self._outputs: dict[int, list[int]] = {}
        self._ended: set[int] = set()

    def step(self, draw: random.Random) -> None:
        """Up to three tokens for each sequence."""
        self._say(lambda output: draw.randint(0, 3))

    def fail(self) -> None:
        """All sequences are lost, and the stream lives."""
        self._say(None)

    def die(self) -> None:
        """The stream breaks, and another one is made."""
        self.link.down()
        self.link.up()
        self._outputs.clear()

    def _say(self, num_tokens: Callable[[list[int]], int] | None) -> None:
        said = []
        for submit in self.link.submits:
            if submit.sequence_id in self._ended:
                continue
            output = self._outputs.setdefault(submit.sequence_id, list(submit.output_token_ids))
            message = pb.SequenceOutput(sequence_id=submit.sequence_id, position=len(output))
            for _ in range(min(num_tokens(output), NUM_TOKENS - len(output)) if num_tokens else 0):
                output.append(hashed(submit.prompt_token_ids, output, submit.sampling.seed))
                message.token_ids.append(output[-1])
            if num_tokens is None:
                message.finish = pb.FINISH_FAILED
            elif len(output) == NUM_TOKENS:
                message.finish = pb.FINISH_LENGTH
            if message.finish:
                self._ended.add(submit.sequence_id)
            said.append(message)
        self.link.say(*said)


@pytest.mark.parametrize("seed", range(40))
async def test_any_sequence_of_failures_gives_the_same_stream(seed: int) -> None:
    draw = random.Random(seed)
    it = bench(limits=Limits(max_replays=1000))
    groups = [Group(it.link(at)) for at in range(2)]
    task, _ = await it.begin(_call(n=2, max_tokens=NUM_TOKENS, seed=1))
    for _ in range(1000):
        if task.done():
            break
        group = draw.choice(groups)
        draw.choice([lambda: group.step(draw), lambda: group.step(draw), group.fail, group.die])()  # noqa: B023
        it.clock.advance(draw.choice([0.0, 0.1, 2.0]))
        await turns(2)
    chunks = await task
    for index in range(2):
        mine = _text([chunk for chunk in chunks if chunk.index == index])
        assert mine == _alone(choice_seed(1, index), NUM_TOKENS)


def _alone(seed: int, num_tokens: int) -> str:
    """The stream that no failure interrupts."""
    output: list[int] = []
    while len(output) < num_tokens:
        output.append(hashed([BOS, *b"hi"], output, seed))
    return bytes(output).decode()
