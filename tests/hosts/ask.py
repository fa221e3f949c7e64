"""A client for hosts: `python -m tests.hosts.ask TARGET KEY TEXT COUNT` prints the greedy tokens, or a refusal.

As JSON: {"tokens": [...], "first_s": seconds to the first token} or {"code": "UNAUTHENTICATED"}.
"""

from __future__ import annotations

import json
import sys
import time

import grpc

from protos.shoal.v1 import inference_pb2, inference_pb2_grpc


def main() -> None:
    target, key, text, count = sys.argv[1:]
    request = inference_pb2.GenerateRequest(text=text)
    request.sampling.temperature = 0.0
    request.sampling.ignore_eos = True
    request.sampling.max_tokens = int(count)
    tokens: list[int] = []
    first_s = 0.0
    began_s = time.monotonic()
    with grpc.insecure_channel(target) as channel:
        metadata = (("authorization", f"Bearer {key}"),)
        try:
            for chunk in inference_pb2_grpc.InferenceStub(channel).Generate(request, metadata=metadata, timeout=60):
                assert chunk.position == len(tokens)
                tokens.extend(chunk.token_ids)
                first_s = first_s or time.monotonic() - began_s
        except grpc.RpcError as error:
            if not isinstance(error, grpc.Call):
                raise
            print(json.dumps({"code": error.code().name}))
            return
    print(json.dumps({"tokens": tokens, "first_s": first_s}))


if __name__ == "__main__":
    main()
