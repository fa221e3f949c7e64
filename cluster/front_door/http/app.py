"""The routes."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from cluster.front_door.auth import Authenticate
from cluster.front_door.call import Call
from cluster.front_door.errors import InvalidRequest, RequestError
from cluster.front_door.http.batch import settle
from cluster.front_door.http.calls import chat_call, completion_calls, messages_of, scores_only, template_kwargs
from cluster.front_door.http.chat import ChatStyle
from cluster.front_door.http.completions import CompletionStyle, without_output
from cluster.front_door.http.connection import read_body, while_connected
from cluster.front_door.http.faults import HttpFault, error_response
from cluster.front_door.http.gather import gather
from cluster.front_door.http.headers import LAST_EVENT_ID, RATE_LIMIT_HEADERS, Envelop, asker
from cluster.front_door.http.landing import landing_page
from cluster.front_door.http.merge import open_all
from cluster.front_door.http.parse import Body, check_content_type, parse
from cluster.front_door.http.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from cluster.front_door.http.seam import DeskLike, HttpLimits
from cluster.front_door.http.stream import Events, EventStream, Marks
from cluster.front_door.http.style import Envelope, Style, to_json
from cluster.front_door.model_card import ModelCard
from cluster.front_door.validate import check_model

__all__ = ["build_app"]


def build_app(
    desk: DeskLike,
    *,
    registry: CollectorRegistry,
    authenticate: Authenticate | None = None,
    cors_origin: Sequence[str] = (),
    limits: HttpLimits | None = None,
    clock: Callable[[], float] = time.time,
) -> FastAPI:
    """The ASGI application of one front door.

    `authenticate` guards everything but `/`, `/healthz`, `/readyz` and `/metrics`; without it everyone is let in.
    `cors_origin` names the origins whose web pages may call; `"*"` is all. `clock` is Unix time.
    """
    app = FastAPI(title="Shoal", docs_url=None, redoc_url=None, openapi_url=None)
    door = _Door(desk, registry, authenticate, limits or HttpLimits(), clock)
    app.add_middleware(Envelop)
    if cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", *RATE_LIMIT_HEADERS],
        )
    app.add_exception_handler(HTTPException, _no_such_endpoint)
    for kind in (RequestError, HttpFault):
        app.add_exception_handler(kind, _failed)
    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("GET", "/", door.landing),
        ("GET", "/healthz", door.healthz),
        ("GET", "/readyz", door.readyz),
        ("GET", "/metrics", door.metrics),
        ("GET", "/v1/models", door.models),
        ("GET", "/v1/models/{name:path}", door.model),
        ("POST", "/v1/completions", door.completions),
        ("POST", "/v1/chat/completions", door.chat_completions),
        ("POST", "/tokenize", door.tokenize),
        ("POST", "/detokenize", door.detokenize),
    ]
    for method, path, endpoint in routes:
        app.add_route(path, endpoint, methods=[method])
    return app


class _Door:
    """The endpoints."""

    def __init__(
        self,
        desk: DeskLike,
        registry: CollectorRegistry,
        authenticate: Authenticate | None,
        limits: HttpLimits,
        clock: Callable[[], float],
    ) -> None:
        self._desk = desk
        self._registry = registry
        self._authenticate = authenticate
        self._limits = limits
        self._clock = clock

    async def landing(self, request: Request) -> Response:
        return HTMLResponse(landing_page([card.name for card in self._desk.models()]))

    async def healthz(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        if self._desk.ready():
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": "no DP group is ready, or the server is draining"}, 503)

    async def metrics(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), headers={"Content-Type": content_type})

    async def models(self, request: Request) -> Response:
        asker(request, self._authenticate, self._desk)
        return _json({"object": "list", "data": [_model_object(card) for card in self._desk.models()]})

    async def model(self, request: Request) -> Response:
        asker(request, self._authenticate, self._desk)
        return _json(_model_object(self._card(request.path_params["name"])))

    async def completions(self, request: Request) -> Response:
        who = asker(request, self._authenticate, self._desk)
        body = await self._body(request, CompletionBody)
        calls = completion_calls(body, who, self._limits)
        style = CompletionStyle(body, calls, self._desk.codec)
        return await self._answer(
            request, body, calls, style, id=body.request_id or who.idempotency_key or calls[0].request_id
        )

    async def chat_completions(self, request: Request) -> Response:
        who = asker(request, self._authenticate, self._desk)
        body = await self._body(request, ChatBody)
        call = chat_call(body, who)
        return await self._answer(request, body, (call,), ChatStyle(body, self._desk.codec), id=call.request_id)

    async def tokenize(self, request: Request) -> Response:
        asker(request, self._authenticate, self._desk)
        body = await self._body(request, TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("exactly one of prompt and messages must be given", field="prompt")
        is_text = body.messages is None
        tokens = await self._desk.tokenize(
            model=body.model,
            text=body.prompt,
            messages=None if body.messages is None else messages_of(body.messages),
            add_special_tokens=is_text if body.add_special_tokens is None else body.add_special_tokens,
            add_generation_prompt=body.add_generation_prompt is not False,
            chat_template_kwargs=template_kwargs(body.chat_template_kwargs),
        )
        codec = self._desk.codec
        texts = [codec.token_bytes(i).decode("utf-8", "replace") for i in tokens] if body.return_token_strs else None
        card = self._card(body.model)
        return _json({"count": len(tokens), "max_model_len": card.max_model_len, "tokens": tokens, "token_strs": texts})

    async def detokenize(self, request: Request) -> Response:
        asker(request, self._authenticate, self._desk)
        body = await self._body(request, DetokenizeBody)
        return _json({"prompt": await self._desk.detokenize(body.tokens, model=body.model)})

    async def _answer(
        self, request: Request, body: ChatBody | CompletionBody, calls: tuple[Call, ...], style: Style, *, id: str
    ) -> Response:
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream to be true", field="stream_options")
        _check_held(body, calls)
        card = self._card(body.model)
        envelope = Envelope(id=id, model=card.name, created_s=int(self._clock()))
        chunks = open_all(self._desk, await settle(self._desk, card, calls))
        if isinstance(body, CompletionBody) and scores_only(body):
            chunks = without_output(chunks)
        if body.stream:
            return EventStream(chunks, Events(envelope, style, body.stream_options, marks=_marks(calls)))
        choices, usage = await while_connected(request.receive, gather(chunks))
        return _json(envelope.whole(style, choices, usage))

    async def _body(self, request: Request, model: type[Body]) -> Body:
        check_content_type(request.headers)
        return parse(await read_body(request.headers, request.receive, self._limits.max_body_bytes), model)

    def _card(self, name: str) -> ModelCard:
        cards = self._desk.models()
        card = next((card for card in cards if card.answers_to(name)), cards[0])
        check_model(name, card)
        return card


def _check_held(body: ChatBody | CompletionBody, calls: Sequence[Call]) -> None:
    """What a client holds, it can say of a stream that is one call."""
    if not calls[0].held:
        return
    if not body.stream:
        raise InvalidRequest(f"{LAST_EVENT_ID} needs stream to be true", field=LAST_EVENT_ID)
    if len(calls) > 1:
        raise InvalidRequest(f"{LAST_EVENT_ID} is for one prompt, not {len(calls)}", field=LAST_EVENT_ID)
    num_choices = calls[0].sampling.n or 1
    if len(calls[0].held) != num_choices:
        found = f"{len(calls[0].held)} numbers, and the request has {num_choices} choices"
        raise InvalidRequest(f"{LAST_EVENT_ID} has {found}", field=LAST_EVENT_ID)


def _marks(calls: Sequence[Call]) -> Marks | None:
    """Ids for the events of a request that can be gone on with."""
    if len(calls) > 1 or not calls[0].idempotency_key:
        return None
    return Marks(calls[0].sampling.n or 1, calls[0].held)


def _model_object(card: ModelCard) -> dict[str, object]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created_unix_s,
        "owned_by": "shoal",
        "root": card.name,
        "parent": None,
        "max_model_len": card.max_model_len,
    }


def _json(value: object, status: int = 200) -> Response:
    return Response(to_json(value).encode(), status_code=status, media_type="application/json")


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _no_such_endpoint(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:100]}"
    if error.status_code == 405:
        allowed = dict(error.headers or {})
        return error_response(HttpFault(405, f"{asked}: wrong method", code="method_not_allowed", headers=allowed))
    return error_response(HttpFault(error.status_code, f"there is no {asked}", code="not_found"))
