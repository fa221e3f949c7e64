"""A client for hosts that follows its stream over several doors.

`python -m tests.hosts.follow DOOR,DOOR KEY TEXT COUNT` says "begun" with the first token, and in the end how many came,
each once and in order.
"""

from __future__ import annotations

import asyncio
import itertools
import sys

import grpc

from cluster.client.held import CHANNEL_OPTIONS, Held
from cluster.client.streams import follow
from protos.shoal.v1 import inference_pb2


async def main() -> None:
    doors, key, text, count = sys.argv[1:]
    turns = itertools.cycle(doors.split(","))
    sampling = inference_pb2.SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=int(count))
    held = Held(inference_pb2.GenerateRequest(text=text, sampling=sampling))
    metadata = (("authorization", f"Bearer {key}"),)

    def connect() -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(next(turns), options=CHANNEL_OPTIONS)

    begun = False
    async for _ in follow(connect, held, metadata=metadata):
        if not begun:
            begun = True
            print("begun", flush=True)
    print(f"finished {len(held.token_ids[0])} tokens", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
