"""The gRPC door: service shoal.v1.Inference on top of the desk."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from cluster.front_door.auth import Authenticate
from cluster.front_door.call import Call, Chunk
from cluster.front_door.convert import (
    Asker,
    ResponseBuilder,
    add_generation_prompt,
    call_of,
    chat_call_of,
    chunk_message,
    held_of,
    messages_of,
    model_message,
)
from cluster.front_door.desk import Desk
from cluster.front_door.grpc_guard import Context, Guard, Method, handler
from cluster.front_door.grpc_session import Session
from protos.shoal.v1 import inference_pb2 as pb

__all__ = ["SERVICE", "InferenceDoor"]

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name


class InferenceDoor:
    """Methods get a parsed request, who asks, and the call's context; `Guard` deals with what they raise."""

    def __init__(self, desk: Desk, authenticate: Authenticate) -> None:
        self._desk = desk
        self._guard = Guard(authenticate)

    @property
    def num_calls(self) -> int:
        """That have come."""
        return self._guard.num_calls

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """For `add_generic_rpc_handlers`."""
        guard = self._guard
        unary, stream, both = (
            grpc.unary_unary_rpc_method_handler,
            grpc.unary_stream_rpc_method_handler,
            grpc.stream_stream_rpc_method_handler,
        )
        return handler(
            SERVICE,
            {
                "Generate": Method(guard(self.generate, "Generate"), pb.GenerateRequest, stream),
                "GenerateOnce": Method(guard(self.generate_once, "GenerateOnce"), pb.GenerateRequest, unary),
                "Chat": Method(guard(self.chat, "Chat"), pb.ChatRequest, stream),
                "Session": Method(guard(self.session, "Session"), pb.SessionRequest, both),
                "Resume": Method(guard(self.resume, "Resume"), pb.ResumeRequest, stream),
                "Cancel": Method(guard(self.cancel, "Cancel"), pb.CancelRequest, unary),
                "Tokenize": Method(guard(self.tokenize, "Tokenize"), pb.TokenizeRequest, unary),
                "Detokenize": Method(guard(self.detokenize, "Detokenize"), pb.DetokenizeRequest, unary),
                "ListModels": Method(guard(self.list_models, "ListModels"), pb.ListModelsRequest, unary),
            },
        )

    async def generate(self, request: pb.GenerateRequest, asker: Asker, context: Context) -> None:
        call = call_of(request, asker, request_id=request.request_id or uuid.uuid4().hex)
        await self._stream(self._desk.open(call), call.request_id, context)

    async def chat(self, request: pb.ChatRequest, asker: Asker, context: Context) -> None:
        call = chat_call_of(request, asker, request_id=request.request_id or uuid.uuid4().hex)
        await self._stream(self._desk.open(call), call.request_id, context)

    async def resume(self, request: pb.ResumeRequest, asker: Asker, context: Context) -> None:
        chunks = self._desk.resume(
            request.request_id,
            request.positions,
            client=asker.client,
            timeout_s=asker.timeout_s,
            door="grpc",
            traceparent=asker.traceparent,
            held=held_of(request, asker),
        )
        await self._stream(chunks, request.request_id, context)

    async def generate_once(self, request: pb.GenerateRequest, asker: Asker, context: Context) -> pb.GenerateResponse:
        call: Call = call_of(request, asker, request_id=request.request_id or uuid.uuid4().hex)
        builder = ResponseBuilder(call.request_id, self._desk.card, self._desk.codec)
        async with aclosing(self._desk.open(call)) as chunks:
            async for chunk in chunks:
                builder.add(chunk)
        return builder.build()

    async def session(self, requests: AsyncIterator[pb.SessionRequest], asker: Asker, context: Context) -> None:
        await Session(self._desk, asker, context).run(requests)

    async def cancel(self, request: pb.CancelRequest, asker: Asker, context: Context) -> pb.CancelResponse:
        return pb.CancelResponse(found=await self._desk.cancel_anywhere(request.request_id, asker.client))

    async def tokenize(self, request: pb.TokenizeRequest, asker: Asker, context: Context) -> pb.TokenizeResponse:
        given = request.WhichOneof("input")
        token_ids = await self._desk.tokenize(
            model=request.model or request.chat.model,
            text=request.text if given == "text" else None,
            messages=messages_of(request.chat) if given == "chat" else None,
            add_special_tokens=request.add_special_tokens if request.HasField("add_special_tokens") else True,
            add_generation_prompt=add_generation_prompt(request.chat),
        )
        return pb.TokenizeResponse(token_ids=token_ids, max_model_len=self._desk.card.max_model_len)

    async def detokenize(self, request: pb.DetokenizeRequest, asker: Asker, context: Context) -> pb.DetokenizeResponse:
        text = await self._desk.detokenize(
            request.token_ids, model=request.model, skip_special_tokens=request.skip_special_tokens
        )
        return pb.DetokenizeResponse(text=text)

    async def list_models(self, request: pb.ListModelsRequest, asker: Asker, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=map(model_message, self._desk.models()))

    async def _stream(self, chunks: AsyncGenerator[Chunk, None], request_id: str, context: Context) -> None:
        card, codec, write = self._desk.card, self._desk.codec, context.write
        async with aclosing(chunks):
            async for chunk in chunks:
                await write(chunk_message(chunk, request_id, card, codec))
