"""One front door: both doors over one desk, in one event loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opentelemetry import trace
from prometheus_client import CollectorRegistry

from cluster.front_door.admin_door import AdminDoor, Operations
from cluster.front_door.auth import ApiKeys
from cluster.front_door.chat_template import ChatTemplate
from cluster.front_door.desk import Desk
from cluster.front_door.engine_metrics import EngineMetrics
from cluster.front_door.expert_metrics import ExpertMetrics
from cluster.front_door.groups import GroupAddress
from cluster.front_door.grpc_server import GrpcServer
from cluster.front_door.http.app import build_app
from cluster.front_door.http.seam import HttpLimits
from cluster.front_door.http_server import HttpServer
from cluster.front_door.limits import Limits
from cluster.front_door.link import LinkOptions
from cluster.front_door.links import Links
from cluster.front_door.metrics import FrontDoorMetrics
from cluster.front_door.model_card import ModelCard
from cluster.front_door.quotas import Quotas
from cluster.front_door.text import Template, TextCodec
from cluster.front_door.tls import Certificates, TlsFiles
from cluster.front_door.tokenizer import Tokenizer
from scheduler.routing import POLICIES
from workers.guided import GrammarCompiler

__all__ = ["FrontDoorServer", "FrontDoorSettings"]

_TOLD_S = 1.0  # for calls that are ended at the end of a drain to hear so


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontDoorSettings:
    """`secret` is what DP groups demand. `api_keys` are clients' keys by name; without any, everybody may come in."""

    front_door_id: str
    secret: str
    host: str = "127.0.0.1"
    grpc_port: int = 9000
    http_port: int | None = 8000  # None: no HTTP door
    api_keys: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    administrators: tuple[str, ...] = ()  # names of keys; where there are no keys, everybody is one
    chaos: bool = False  # whether administrators may inject faults
    quotas: Quotas = field(default_factory=Quotas)
    tls: TlsFiles | None = None  # None: in the clear
    cors_origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    routing: str = "prefix-affinity"
    share_prefixes: bool = False

    def may_operate(self, client: str) -> bool:
        """Whether a client may drain, scale and the like."""
        return not self.api_keys or client in self.administrators


class FrontDoorServer:
    """Make it inside the event loop that it is to run in."""

    def __init__(
        self,
        settings: FrontDoorSettings,
        *,
        card: ModelCard,
        codec: TextCodec,
        template: Template | None = None,
        registry: CollectorRegistry | None = None,
        operations: Operations | None = None,
        tracer: trace.Tracer | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.settings = settings
        self.registry = registry or CollectorRegistry()
        self.links = Links(
            LinkOptions(front_door_id=settings.front_door_id, secret=settings.secret),
            POLICIES[settings.routing](random.Random()),  # noqa: S311 - spreads load, keeps no secret
        )
        metrics = FrontDoorMetrics(card.name, loop)
        metrics.watch(self.links)
        metrics.register(self.registry)
        self.experts = ExpertMetrics(card.name)
        self.registry.register(self.experts)
        self.engines = EngineMetrics(card.name)
        self.registry.register(self.engines)
        self.desk = Desk(
            card=card,
            codec=codec,
            template=template,
            links=self.links,
            limits=settings.limits,
            metrics=metrics,
            clock=loop,
            tracer=tracer,
            share_prefixes=settings.share_prefixes,
            grammars=grammars,
            quotas=settings.quotas,
        )
        certificates = None if settings.tls is None else Certificates(settings.tls)
        authenticate = ApiKeys(settings.api_keys)
        admin = None
        if operations is not None:
            admin = AdminDoor(operations, authenticate, may_operate=settings.may_operate, chaos=settings.chaos)
        self._grpc = GrpcServer(
            self.desk,
            authenticate=authenticate,
            admin=admin,
            max_message_bytes=settings.limits.max_message_bytes,
            certificates=certificates,
        )
        app = build_app(
            self.desk,
            registry=self.registry,
            authenticate=authenticate,
            cors_origin=settings.cors_origins,
            limits=HttpLimits(max_body_bytes=settings.limits.max_message_bytes),
        )
        self._http = HttpServer(app, certificates) if settings.http_port is not None else None
        self.grpc_port = 0
        self.http_port = 0

    @classmethod
    def from_folder(
        cls,
        settings: FrontDoorSettings,
        folder: Path | str,
        card: ModelCard,
        *,
        registry: CollectorRegistry | None = None,
        operations: Operations | None = None,
        tracer: trace.Tracer | None = None,
    ) -> FrontDoorServer:
        """With the tokenizer and the chat template of a model folder. Raises ValueError naming the file at fault."""
        return cls(
            settings,
            card=card,
            codec=Tokenizer.from_folder(folder),
            template=ChatTemplate.from_folder(folder),
            registry=registry,
            operations=operations,
            tracer=tracer,
            grammars=GrammarCompiler.from_folder(folder, card.vocab_size),
        )

    @property
    def num_open(self) -> int:
        return self.desk.num_open

    def ready(self) -> bool:
        """Whether a call would be taken and run now."""
        return self.desk.ready()

    def set_groups(self, groups: Iterable[GroupAddress], lost: Collection[str] = ()) -> None:
        """The roster's newest list of DP groups that can serve; `lost` are addresses of some that are over."""
        self.links.set_groups(groups, lost)

    async def reach_groups(self, timeout_s: float) -> bool:
        """Waits until a DP group of the list can be reached; whether one can."""
        reached = asyncio.Event()

        def look() -> None:
            if self.links.ready:
                reached.set()

        self.links.on_change(look)
        look()
        try:
            async with asyncio.timeout(timeout_s):
                await reached.wait()
        except TimeoutError:
            return False
        finally:
            self.links.no_change(look)
        return True

    async def start(self) -> None:
        """Opens the ports. Raises OSError naming the one that cannot be had."""
        self.grpc_port = await self._grpc.start(self.settings.host, self.settings.grpc_port)
        if self._http is not None and self.settings.http_port is not None:
            try:
                self.http_port = await self._http.start(self.settings.host, self.settings.http_port)
            except OSError:
                await self.stop()
                raise

    async def drain(self, timeout_s: float) -> None:
        """Sends clients elsewhere and waits for the open calls; those still open after `timeout_s` are ended."""
        if self._http is not None:
            self._http.leave()
        await self._grpc.leave(timeout_s + _TOLD_S)
        await self.desk.drain(timeout_s)
        if self._http is not None:
            self._http.hang_up()

    async def stop(self) -> None:
        """Closes everything; call `drain` first to be polite."""
        if self._http is not None:
            await self._http.stop()
        await self._grpc.stop(1.0)
        await self.links.close()
        self.desk.close()
