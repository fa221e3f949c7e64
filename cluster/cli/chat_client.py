"""A conversation with a front door over gRPC, and the times of its answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import grpc

from cluster.cli.connection import Tls
from cluster.client.held import Held
from cluster.client.streams import follow_blocking
from protos.shoal.v1 import inference_pb2 as pb
from protos.shoal.v1 import inference_pb2_grpc

__all__ = ["Answer", "ChatError", "Conversation", "Server", "connect"]

_HELLO_S = 10.0


class ChatError(Exception):
    """What went wrong, in words for whoever types."""


@dataclass(frozen=True, slots=True)
class Server:
    """A front door and what to show it."""

    address: str
    stub: inference_pb2_grpc.InferenceStub
    metadata: tuple[tuple[str, str], ...]
    tls: Tls = field(default_factory=Tls)

    def channel(self) -> grpc.Channel:
        """Another connection, which may reach another front door."""
        return self.tls.channel(self.address)

    def model_names(self) -> list[str]:
        """Raises ChatError where nobody answers."""
        try:
            answer = self.stub.ListModels(pb.ListModelsRequest(), metadata=self.metadata, timeout=_HELLO_S)
        except grpc.RpcError as error:
            raise self.error(error) from None
        return [model.name for model in answer.models]

    def error(self, error: grpc.RpcError) -> ChatError:
        """A failed call in words."""
        failed = cast("grpc.Call", error)  # what grpc raises is both, and says so nowhere
        code, details = failed.code(), failed.details() or ""
        never_reached = code is grpc.StatusCode.UNAVAILABLE and not failed.initial_metadata()
        if never_reached and "andshake" in details:
            return ChatError(f"no TLS with {self.address}: is it spoken there (--tls), and who signs (--tls-ca)?")
        if never_reached and ("onnect" in details or "resol" in details):
            return ChatError(f"no server answers at {self.address}; is `shoal serve` running?")
        return ChatError(details or code.name.lower().replace("_", " "))


@contextmanager
def connect(address: str, api_key: str | None, tls: Tls | None = None) -> Iterator[Server]:
    """The first call opens the connection."""
    metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    secured = tls or Tls()
    with secured.channel(address) as channel:
        yield Server(address, inference_pb2_grpc.InferenceStub(channel), metadata, secured)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """`first_token_s` is None where no token came."""

    text: str
    num_tokens: int
    first_token_s: float | None
    decode_s: float  # from the first token to the last
    at_limit: bool
    interrupted: bool

    @property
    def tokens_per_s(self) -> float | None:
        """After the first token; None where there is nothing to divide."""
        return (self.num_tokens - 1) / self.decode_s if self.num_tokens > 1 and self.decode_s > 0 else None


class Conversation:
    """What was said so far: always a question and its answer, never one without the other."""

    def __init__(
        self,
        server: Server,
        *,
        model: str = "",
        system: str = "",
        temperature: float | None = None,
        max_tokens: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.server = server
        self.model = model
        self.system = system
        self.turns: list[tuple[str, str]] = []
        self._sampling = pb.SamplingParams(temperature=temperature, max_tokens=max_tokens)
        self._clock = clock

    def reset(self) -> None:
        """Forgets all turns; the system message stays."""
        self.turns.clear()

    def ask(self, question: str, on_text: Callable[[str], object]) -> Answer:
        """Gives the answer's text to `on_text` as it comes.

        A KeyboardInterrupt cancels the answer; what had come of it is kept, as the model must know what was read.
        Raises ChatError, and then the question is not kept.
        """
        request = pb.ChatRequest(model=self.model, messages=self._messages(question), sampling=self._sampling)
        start_s = self._clock()
        first_s: float | None = None
        last_s = start_s
        texts: list[str] = []
        num_tokens = 0
        finish = pb.FINISH_REASON_UNSPECIFIED
        interrupted = False
        server = self.server
        chunks = follow_blocking(server.stub, server.channel, Held(request), metadata=server.metadata)
        try:
            for chunk in chunks:
                if chunk.token_ids:
                    last_s = self._clock()
                    first_s = last_s if first_s is None else first_s
                    num_tokens += len(chunk.token_ids)
                finish = chunk.finish_reason or finish
                if chunk.text:
                    texts.append(chunk.text)
                    on_text(chunk.text)
        except KeyboardInterrupt:
            interrupted = True
        except grpc.RpcError as error:
            raise self.server.error(error) from None
        finally:
            chunks.close()
        text = "".join(texts)
        if text or not interrupted:
            self.turns.append((question, text))
        return Answer(
            text=text,
            num_tokens=num_tokens,
            first_token_s=None if first_s is None else first_s - start_s,
            decode_s=0.0 if first_s is None else last_s - first_s,
            at_limit=finish == pb.FINISH_REASON_LENGTH,
            interrupted=interrupted,
        )

    def _messages(self, question: str) -> list[pb.ChatMessage]:
        messages = [pb.ChatMessage(role="system", content=self.system)] if self.system else []
        for asked, answered in self.turns:
            messages.append(pb.ChatMessage(role="user", content=asked))
            messages.append(pb.ChatMessage(role="assistant", content=answered))
        messages.append(pb.ChatMessage(role="user", content=question))
        return messages
