"""Ray Serve's own gRPC proxy before a deployment whose tokens cost nothing.

    python -m loadtest.peers.serve_app     prints "ready ADDRESS", serves until its input ends

Serve as it comes: one proxy, one replica, streaming one message a token, no more work in it than making the message.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator

import ray
from ray import serve

from loadtest.peers.ports import free_port
from protos.shoal.v1 import inference_pb2 as pb

__all__ = ["TokenSource"]


class TokenSource:
    """Streams `max_tokens` chunks of one token each."""

    def __init__(self, token_id: int, text: str) -> None:
        self._token_ids = (token_id,)
        self._text = text

    async def Generate(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateChunk]:
        num_tokens = request.sampling.max_tokens
        for position in range(num_tokens):
            yield pb.GenerateChunk(
                request_id=request.request_id,
                position=position,
                token_ids=self._token_ids,
                text=self._text,
                finish_reason=pb.FINISH_REASON_LENGTH if position + 1 == num_tokens else pb.FINISH_REASON_UNSPECIFIED,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--token-id", type=int, default=300)
    parser.add_argument("--text", default=" of")
    options = parser.parse_args()
    port = free_port()
    ray.init(include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": free_port()},
            grpc_options={
                "port": port,
                "grpc_servicer_functions": ["protos.shoal.v1.inference_pb2_grpc.add_InferenceServicer_to_server"],
            },
        )
        source = serve.deployment(TokenSource, max_ongoing_requests=1024)
        serve.run(source.bind(options.token_id, options.text), name="peer")
        print(f"ready 127.0.0.1:{port}", flush=True)
        sys.stdin.read()
        serve.shutdown()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
