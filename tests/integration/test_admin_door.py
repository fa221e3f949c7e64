"""Who may operate a cluster, over the wire."""

from __future__ import annotations

import grpc
import pytest

from protos.shoal.v1 import admin_pb2 as pb
from protos.shoal.v1 import admin_pb2_grpc
from tests.fakes import FakeGroup
from tests.integration.doors import FakeOperations, open_door

KEYS = {"ops": "key-of-ops", "alice": "key-of-alice"}
OPS = (("x-api-key", KEYS["ops"]),)
ALICE = (("x-api-key", KEYS["alice"]),)


async def test_administrators_drain_and_hear_how_it_goes() -> None:
    async with open_door(FakeGroup(), operations=FakeOperations(), api_keys=KEYS, administrators=("ops",)) as door:
        stub = admin_pb2_grpc.AdminStub(door.channel)
        events = [event async for event in stub.Drain(pb.DrainRequest(target="engine-0"), metadata=OPS)]
        assert [event.line for event in events] == ["drains engine-0", "drained"]
        assert events[-1].state == pb.OperationEvent.STATE_DONE
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Rollout(pb.RolloutRequest(), metadata=OPS).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_others_may_only_look() -> None:
    async with open_door(
        FakeGroup(), operations=FakeOperations(), api_keys=KEYS, administrators=("ops",), chaos=True
    ) as door:
        stub = admin_pb2_grpc.AdminStub(door.channel)
        assert (await stub.Status(pb.StatusRequest(), metadata=ALICE)).model == "fake"
        for call in (
            stub.Drain(pb.DrainRequest(), metadata=ALICE).read(),
            stub.Scale(pb.ScaleRequest(), metadata=ALICE).read(),
            stub.Inject(pb.InjectRequest(), metadata=ALICE),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=r"security\.administrators") as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("chaos", "keys", "says"), [(False, KEYS, "chaos.enabled"), (True, {}, "administrator's key"), (True, KEYS, "")]
)
async def test_faults_need_the_switch_and_a_key(chaos: bool, keys: dict[str, str], says: str) -> None:
    async with open_door(
        FakeGroup(), operations=FakeOperations(), api_keys=keys, administrators=("ops",), chaos=chaos
    ) as door:
        call = admin_pb2_grpc.AdminStub(door.channel).Inject(pb.InjectRequest(target="x"), metadata=OPS)
        if not says:
            assert (await call).node == "x"
            return
        with pytest.raises(grpc.aio.AioRpcError, match=says) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
