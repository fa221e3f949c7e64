"""A DP group whose tokens cost nothing: it shows what the wire and the front door cost.

    python -m loadtest.peers.synthetic_group     prints "ready ADDRESS", serves until its input ends

Like an engine it sends one message a step, with one token of every open sequence in it; unlike an engine it takes
the next step as soon as the stream has taken the message.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

from protos.shoal.v1 import session_pb2 as pb
from protos.shoal.v1 import session_pb2_grpc as rpc

__all__ = ["MAX_MODEL_LEN", "SyntheticGroup"]

MAX_MODEL_LEN = 8192
_BLOCK_SIZE = 16
_NUM_BLOCKS = 1 << 16
# Front doors ping every few seconds, also while nothing is open.
_KEEPALIVE = (
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
)


class SyntheticGroup(rpc.DPGroupServicer):
    """Answers every submit with `max_tokens` tokens; end-of-sequence tokens are not among them."""

    def __init__(self, model: str, token_id: int) -> None:
        self._model = model
        self._token_id = token_id

    async def Connect(  # type: ignore[override]  # writes to the context instead of yielding
        self, request_iterator: AsyncIterator[pb.Uplink], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        stream = _Stream(self._token_id)
        reader = asyncio.create_task(stream.read(request_iterator))
        try:
            await context.write(self._hello())
            step = 0
            while await stream.wait():
                step += 1
                await context.write(stream.step(step))
        finally:
            reader.cancel()

    def _hello(self) -> pb.Downlink:
        info = pb.GroupInfo(
            engine="synthetic",
            model=self._model,
            max_model_len=MAX_MODEL_LEN,
            max_batch_tokens=MAX_MODEL_LEN,
            max_batch_size=1024,
            block_size=_BLOCK_SIZE,
            num_blocks=_NUM_BLOCKS,
        )
        return pb.Downlink(generation=1, info=info, load=_load(0))


class _Stream:
    """The sequences of one front door: (next position, positions asked for) by id."""

    def __init__(self, token_id: int) -> None:
        self._token_ids = (token_id,)
        self._open: dict[int, tuple[int, int]] = {}
        self._changed = asyncio.Event()
        self._ended = False

    async def read(self, uplinks: AsyncIterator[pb.Uplink]) -> None:
        """Takes submits and cancels until the other side is done."""
        async for uplink in uplinks:
            if uplink.HasField("submit"):
                submit = uplink.submit
                self._open[submit.sequence_id] = (len(submit.output_token_ids), submit.sampling.max_tokens)
            elif uplink.HasField("cancel"):
                self._open.pop(uplink.cancel.sequence_id, None)
            self._changed.set()
        self._ended = True
        self._changed.set()

    async def wait(self) -> bool:
        """Until there is a step to take; False at the end of the stream."""
        while not self._open and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        return not self._ended

    def step(self, number: int) -> pb.Downlink:
        """One token of each open sequence."""
        downlink = pb.Downlink(generation=1, step=number, load=_load(len(self._open)))
        for sequence_id, (position, most) in list(self._open.items()):
            last = position + 1 >= most
            downlink.outputs.add(
                sequence_id=sequence_id,
                position=position,
                token_ids=self._token_ids,
                finish=pb.FINISH_LENGTH if last else pb.FINISH_UNSPECIFIED,
            )
            if last:
                del self._open[sequence_id]
            else:
                self._open[sequence_id] = (position + 1, most)
        return downlink


def _load(num_running: int) -> pb.Load:
    return pb.Load(num_running=num_running, num_free_blocks=_NUM_BLOCKS, num_blocks=_NUM_BLOCKS, step_s=1e-4)


async def _serve(model: str, token_id: int) -> None:
    server = grpc.aio.server(options=_KEEPALIVE)
    rpc.add_DPGroupServicer_to_server(SyntheticGroup(model, token_id), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready 127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="synthetic")
    parser.add_argument("--token-id", type=int, default=300, help="the token that every answer is made of")
    options = parser.parse_args()
    uvloop.run(_serve(options.model, options.token_id))


if __name__ == "__main__":
    main()
