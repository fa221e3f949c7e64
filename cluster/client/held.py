"""What a client holds of a streamed request, and how it asks for the rest."""

from __future__ import annotations

import secrets
import uuid
from typing import TypeVar, cast

import grpc

from protos.shoal.v1 import inference_pb2 as pb

__all__ = ["CHANNEL_OPTIONS", "BrokenStream", "Held", "worth_resuming"]

Request = TypeVar("Request", pb.GenerateRequest, pb.ChatRequest)

# A connection of its own, so that the next one may reach another front door; one that is frozen, and a host that is
# not there, show in seconds. gRPC's keepalive timeout alone ends a connection only where the other kernel is silent,
# too; where it answers for a frozen process, the time limit of pings does, a minute unless set.
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 1_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # what a connection may take
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)

_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)


class BrokenStream(Exception):
    """A token came twice, or one is missing: the server's defect. `kind` is "repeated" or "skipped"."""

    def __init__(self, kind: str, index: int, position: int, expected: int) -> None:
        super().__init__(f"choice {index}: tokens were {kind}: position {position} came where {expected} was due")
        self.kind = kind


class Held:
    """One request from its first chunk to its last, over however many streams.

    Give it every chunk; where a stream breaks, `resume` is what to send to `Resume` next, at any front door.
    """

    def __init__(self, request: pb.GenerateRequest | pb.ChatRequest) -> None:
        self.request = type(request)()
        self.request.CopyFrom(request)  # type: ignore[arg-type]
        if not self.request.request_id and not self.request.idempotency_key:
            self.request.request_id = uuid.uuid4().hex
        # Whoever goes on with it must draw as the first would have.
        if not self.request.sampling.HasField("seed"):
            self.request.sampling.seed = secrets.randbits(63)
        num = self.request.sampling.n if self.request.sampling.HasField("n") else 1
        self.token_ids: list[list[int]] = [[] for _ in range(num)]
        self.done: set[int] = set()

    @property
    def finished(self) -> bool:
        """Whether every choice's end has come."""
        return len(self.done) == len(self.token_ids)

    def take(self, chunk: pb.GenerateChunk) -> None:
        """Raises BrokenStream."""
        tokens = self.token_ids[chunk.index]
        if chunk.position != len(tokens):
            kind = "repeated" if chunk.position < len(tokens) else "skipped"
            raise BrokenStream(kind, chunk.index, chunk.position, len(tokens))
        tokens.extend(chunk.token_ids)
        if chunk.finish_reason:
            self.done.add(chunk.index)

    def resume(self) -> pb.ResumeRequest:
        message = pb.ResumeRequest(
            request_id=self.request.request_id or self.request.idempotency_key,
            positions=[len(tokens) for tokens in self.token_ids],
            held=[pb.TokenIds(ids=tokens) for tokens in self.token_ids],
            done=sorted(self.done),
        )
        if isinstance(self.request, pb.GenerateRequest):
            message.generate.CopyFrom(self.request)
        else:
            message.chat.CopyFrom(self.request)
        return message


def worth_resuming(error: grpc.RpcError) -> bool:
    """Whether another front door, or the same one in a moment, may go on: what broke is the connection."""
    return cast("grpc.Call", error).code() in _AGAIN
