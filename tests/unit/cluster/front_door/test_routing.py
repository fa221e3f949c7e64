"""Where calls go: by what the groups hold and say, through the desk."""

from __future__ import annotations

import random

from cluster.front_door.call import Call, SamplingOptions
from cluster.front_door.limits import Limits
from protos.shoal.v1 import session_pb2 as pb
from scheduler.routing import POLICIES
from tests.unit.cluster.front_door.support import Bench, bench, turns

TALK = "a conversation that goes on and on, and says the same again with every turn of it. "


def affine() -> Bench:
    return bench(policy=POLICIES["prefix-affinity"](random.Random(1)))


async def say(it: Bench, text: str, tenant: str = "", max_tokens: int = 4) -> int:
    """Asks, answers in full; which group it was."""
    before = [len(it.link(at).submits) for at in range(2)]
    sampling = SamplingOptions(max_tokens=max_tokens)
    task, (submit,) = await it.begin(Call(text=text, tenant=tenant, client=tenant, sampling=sampling))
    at = next(at for at in range(2) if len(it.link(at).submits) > before[at])
    it.link(at).answer(submit, "x" * max_tokens, finish=pb.FINISH_LENGTH)
    await task
    return at


async def test_a_conversation_stays_where_it_began() -> None:
    it = affine()
    first = await say(it, TALK)
    others = [await say(it, f"{index} something else entirely, {TALK}") for index in range(6)]
    assert set(others) == {0, 1}, "what is new goes to either"
    for turn in range(2, 6):
        assert await say(it, TALK * turn) == first


async def test_it_leaves_a_group_that_is_saturated() -> None:
    it = affine()
    first = await say(it, TALK)
    load = pb.Load(num_blocks=1000, num_running=4, num_waiting=50, num_waiting_tokens=50_000)
    it.link(first)._receive(pb.Downlink(generation=it.link(first).generation, load=load))
    assert await say(it, TALK * 2) == 1 - first


async def test_the_same_words_of_another_tenant_are_another_prefix() -> None:
    it = affine()
    places = {tenant: await say(it, TALK, tenant) for tenant in map(str, range(12))}
    assert set(places.values()) == {0, 1}
    assert {tenant: await say(it, TALK, tenant) for tenant in places} == places


async def test_a_group_is_seen_with_what_is_on_its_way() -> None:
    it = bench(("engine/0",))
    link = it.link()
    link.info.max_batch_tokens = 512
    tasks = [(await it.begin(Call(text="x", sampling=SamplingOptions(max_tokens=9))))[0] for _ in range(3)]
    view = link.view()
    assert (view.num_outstanding, view.max_batch_tokens, view.outstanding_tokens) == (3, 512, 3 * (2 + 9))
    for task in tasks:
        task.cancel()
    await turns()
    assert link.view().num_outstanding == 0


async def test_background_work_is_refused_first() -> None:
    it = bench(limits=Limits(max_open_requests=4, background_share=0.5))
    tasks = [(await it.begin(Call(text="x", priority=1)))[0] for _ in range(2)]
    refused, submits = await it.begin(Call(text="x", priority=1))
    assert not submits
    assert it.value("shoal_requests_total", door="direct", code="overloaded") == 1
    taken, submits = await it.begin(Call(text="x", priority=0))
    assert len(submits) == 1
    for task in (*tasks, refused, taken):
        task.cancel()
        task.exception() if task.done() else None
    await turns()


async def test_the_balance_of_expert_steps_is_told() -> None:
    it = bench()
    link = it.link()
    assert it.registry.get_sample_value("shoal_ep_step_imbalance", {"model_name": "fake", "engine": "engine/0"}) is None
    link._receive(pb.Downlink(generation=link.generation, load=pb.Load(num_blocks=1, ep_imbalance=1.25)))
    assert it.value("shoal_ep_step_imbalance", engine="engine/0") == 1.25
