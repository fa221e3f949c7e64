"""Locust users for both doors, in an open loop.

    locust -f loadtest/locustfile.py --headless -u 4 -r 4 -t 20s --host grpc://127.0.0.1:9000

A Locust user usually waits for one answer before it asks again, and so asks less of a server that stalls. Here each
user follows its own arrivals (`--arrivals`, each with its own seed), sends every request in a greenlet of its own,
and all latencies count from when the request was meant to be sent. A request makes three entries: "e2e" (which
carries the failure, if there is one), "ttft", and an "itl" for each gap between messages. `--host` chooses the
users by its scheme; `--http-host` adds HTTP users to gRPC ones.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import grpc
import httpx
from gevent.pool import Group
from grpc.experimental import gevent as grpc_gevent  # type: ignore[attr-defined]  # missing in its stubs
from locust import User, constant, events, task
from locust.exception import StopUser

from loadtest.arrivals import parse_arrivals
from loadtest.grpc_door import describe, generate_request, read_chunk
from loadtest.http_door import EventReader, completion_body
from loadtest.record import Recorder, RequestRecord
from loadtest.workload import TokenPrompts, Work, Workload, parse_lengths
from protos.shoal.v1 import inference_pb2 as pb
from protos.shoal.v1 import inference_pb2_grpc as rpc

__all__ = ["GrpcUser", "HttpUser"]

grpc_gevent.init_gevent()
logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request would drown Locust's own

_user_numbers = itertools.count()


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_options(parser: Any) -> None:
    group = parser.add_argument_group("Shoal")
    group.add_argument("--http-host", default="", help="URL of the HTTP door, beside a gRPC --host")
    group.add_argument("--arrivals", default="poisson:0.5", help="of each user; see loadtest/arrivals.py")
    group.add_argument("--lengths", default="uniform:16-128:16-48", help="see loadtest/workload.py")
    group.add_argument("--model", default="", help="default: the only model served")
    group.add_argument("--vocab-size", type=int, default=30_000, help="token ids are drawn below it")
    group.add_argument("--seed", type=int, default=0, help="users take this seed and those after it")
    group.add_argument("--api-key-file", default="", help="file that holds the key")
    group.add_argument("--request-timeout", type=float, default=300.0, help="seconds for one request")
    group.add_argument("--grace", type=float, default=30.0, help="seconds that open requests have at the end")


@events.init.add_listener  # type: ignore[untyped-decorator]
def _choose_users(environment: Any, **_: Any) -> None:
    """Keeps the users whose door was named."""
    host = environment.host or ""
    named: list[type[User]] = []
    if host.startswith("grpc://"):
        named.append(GrpcUser)
    if host.startswith(("http://", "https://")) or environment.parsed_options.http_host:
        named.append(HttpUser)
    if not named:
        sys.exit(f"error: --host must be grpc://HOST:PORT or http://HOST:PORT, not {host!r}")
    environment.user_classes = [user for user in environment.user_classes if user in named]


class _OpenLoopUser(User):  # type: ignore[misc]  # Locust is not followed
    """Sends at the times of its own arrivals; a subclass knows one door."""

    abstract = True
    wait_time = constant(0)
    door = ""

    def on_start(self) -> None:
        options = self.environment.parsed_options
        seed = options.seed + next(_user_numbers)
        workload = Workload(lengths=parse_lengths(options.lengths), prompts=TokenPrompts(options.vocab_size), seed=seed)
        self.timeout_s: float = options.request_timeout
        self.model: str = options.model
        self.api_key = Path(options.api_key_file).read_text(encoding="utf-8").strip() if options.api_key_file else ""
        self._work: Iterator[Work] = workload.requests()
        self._offsets_s = parse_arrivals(options.arrivals, seed=seed).offsets_s()
        self._open = Group()
        self.connect()
        self._start_s = time.perf_counter()

    def on_stop(self) -> None:
        """What was sent is waited for: leaving out the slowest answers would flatter the server."""
        if not self._open.join(timeout=self.environment.parsed_options.grace):
            self._open.kill()
        self.disconnect()

    @task  # type: ignore[untyped-decorator]
    def send(self) -> None:
        """Waits for the next arrival and sends it, without waiting for the answer."""
        offset_s = next(self._offsets_s, None)
        if offset_s is None:
            raise StopUser
        intended_s = self._start_s + offset_s
        gevent.sleep(max(0.0, intended_s - time.perf_counter()))
        self._open.spawn(self._ask, next(self._work), intended_s)

    def _ask(self, work: Work, intended_s: float) -> None:
        recorder = Recorder(self.door, work, intended_s, time.perf_counter)
        try:
            record = self.ask(work, recorder)
        except gevent.GreenletExit:
            record = recorder.close("not answered within the grace at the end")
        self._report(record)

    def _report(self, record: RequestRecord) -> None:
        fire = self.environment.events.request.fire
        failure = RuntimeError(record.error) if record.error else None
        common = {"request_type": self.door, "response_length": 0, "exception": None, "context": {}}
        if record.ttft_s is not None:
            fire(**common, name="ttft", response_time=record.ttft_s * 1e3)
        for gap_s in record.gaps_s:
            fire(**common, name="itl", response_time=gap_s * 1e3)
        answer = {"exception": failure, "response_length": record.num_output_tokens}
        fire(**(common | answer), name="e2e", response_time=record.e2e_s * 1e3)

    def connect(self) -> None:
        raise NotImplementedError

    def disconnect(self) -> None:
        raise NotImplementedError

    def ask(self, work: Work, recorder: Recorder) -> RequestRecord:
        raise NotImplementedError


class GrpcUser(_OpenLoopUser):
    """One channel to the gRPC door."""

    door = "grpc"

    def connect(self) -> None:
        # A pool of its own for each channel: users are different clients, and share no connection.
        address = self.host.removeprefix("grpc://").rstrip("/")
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub = rpc.InferenceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def disconnect(self) -> None:
        self._channel.close()

    def ask(self, work: Work, recorder: Recorder) -> RequestRecord:
        request: pb.GenerateRequest = generate_request(work, self.model)
        try:
            for chunk in self._stub.Generate(request, metadata=self._metadata, timeout=self.timeout_s):
                read_chunk(recorder, chunk)
        except grpc.RpcError as error:
            return recorder.close(describe(error))
        return recorder.close()


class HttpUser(_OpenLoopUser):
    """A pool of connections to the HTTP door."""

    door = "http"

    def connect(self) -> None:
        self._client = httpx.Client(
            base_url=self.environment.parsed_options.http_host or self.host,
            headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            timeout=self.timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )
        if not self.model:
            self.model = self._client.get("/v1/models").raise_for_status().json()["data"][0]["id"]

    def disconnect(self) -> None:
        self._client.close()

    def ask(self, work: Work, recorder: Recorder) -> RequestRecord:
        reader = EventReader(recorder)
        body = completion_body(work, self.model)
        try:
            with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    return recorder.close(f"HTTP {response.status_code}: {response.read().decode()[:200]}")
                for line in response.iter_lines():
                    reader.line(line)
        except (httpx.HTTPError, ValueError) as error:
            return recorder.close(f"{type(error).__name__}: {error}")
        return recorder.close(reader.fault)
