"""The gRPC door as a client sees it."""

from __future__ import annotations

import time

import grpc

from loadtest.client import DoorError, ModelFacts
from loadtest.record import Clock, Recorder, RequestRecord
from loadtest.workload import Work
from protos.shoal.v1 import inference_pb2 as pb
from protos.shoal.v1 import inference_pb2_grpc as rpc

__all__ = ["GrpcDoor", "describe", "generate_request", "read_chunk"]


def generate_request(work: Work, model: str = "") -> pb.GenerateRequest:
    """The work on the wire."""
    request = pb.GenerateRequest(
        model=model,
        sampling=pb.SamplingParams(
            max_tokens=work.num_output_tokens, ignore_eos=work.ignore_eos, temperature=work.temperature
        ),
    )
    if isinstance(work.prompt, str):
        request.text = work.prompt
    else:
        request.token_ids.ids.extend(work.prompt)
    return request


def read_chunk(recorder: Recorder, chunk: pb.GenerateChunk) -> None:
    """Enters a chunk into the record."""
    recorder.tokens(len(chunk.token_ids), position=chunk.position, index=chunk.index)
    if chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED:
        recorder.finish_reason()


class GrpcDoor:
    """One channel to a server's gRPC port. Close it with `aclose`."""

    name = "grpc"

    def __init__(
        self,
        address: str,
        *,
        model: str = "",
        api_key: str = "",
        timeout_s: float = 300.0,
        root_certificate: bytes | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._address = address
        self._model = model
        self._metadata = [("authorization", f"Bearer {api_key}")] if api_key else []
        self._timeout_s = timeout_s
        self._clock = clock
        self._channel = (
            grpc.aio.insecure_channel(address)
            if root_certificate is None
            else grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(root_certificate))
        )
        self._stub = rpc.InferenceStub(self._channel)

    async def aclose(self) -> None:
        await self._channel.close(None)

    async def model(self) -> ModelFacts:
        try:
            answer = await self._stub.ListModels(pb.ListModelsRequest(), metadata=self._metadata, timeout=10.0)
        except grpc.aio.AioRpcError as error:
            raise DoorError(f"gRPC server at {self._address}: {describe(error)}") from error
        for model in answer.models:
            if self._model in ("", model.name):
                return ModelFacts(model.name, model.max_model_len, model.vocab_size, model.dtype)
        raise DoorError(f"gRPC server at {self._address} does not serve {self._model or 'any model'}")

    async def generate(self, work: Work, intended_s: float) -> RequestRecord:
        request = generate_request(work, self._model)
        recorder = Recorder(self.name, work, intended_s, self._clock)
        try:
            async for chunk in self._stub.Generate(request, metadata=self._metadata, timeout=self._timeout_s):
                read_chunk(recorder, chunk)
        except grpc.aio.AioRpcError as error:
            return recorder.close(describe(error))
        return recorder.close()


def describe(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}"
