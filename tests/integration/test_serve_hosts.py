"""One engine over two hosts, asked from a third: experts spread over both; and what the doctor says of sick hosts."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.shoal.v1 import admin_pb2, admin_pb2_grpc, session_pb2, session_pb2_grpc
from tests.checkpoints import tiny_deepseek
from tests.hosts import Host, Hosts, make_hosts, needs_hosts
from tests.hosts.host import HOME, ROOT
from tests.hosts.ray_cluster import RAY_ENV, join, ray_cluster, serving_on, shoal
from tests.integration.served import SHOAL, eventually

pytestmark = [needs_hosts, pytest.mark.root, pytest.mark.timeout(240)]

PORT, HTTP_PORT = 19000, 18000  # of hosts with addresses of their own: nobody else is there
KEY = "a-key-for-tests"
TEXT = "A shoal is many small fish"
NUM_TOKENS = 24


def config(*, plan: str = "data: auto", start_timeout_s: int = 60) -> str:
    doors = f"host: 0.0.0.0, port: {PORT}, http_port: {HTTP_PORT}"
    return f"""
parallel: {{{plan}}}
inference: {{deterministic: true, dtype: float32, max_model_len: 512}}
resources: {{cache_size: 16MiB, cpu_threads: 1}}
security: {{api_key: {KEY}}}
cluster: {{{doors}, start_timeout_s: {start_timeout_s}, network: {{interface: eth0}}}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def hosts(model: Path) -> Iterator[Hosts]:
    """The first two are a Ray cluster with one core each; nobody knows a way out of the subnet."""
    with make_hosts(3, shared=[model], default_route=False) as made, ray_cluster(made[0], made[1], num_cpus=1):
        yield made


def ask(client: Host, server: Host, key: str) -> dict[str, Any]:
    command = (sys.executable, "-m", "tests.hosts.ask", f"{server.address}:{PORT}", key, TEXT, str(NUM_TOKENS))
    answer = json.loads(client.run(*command).stdout)
    assert isinstance(answer, dict)
    return answer


def greedy(model: Path) -> list[int]:
    """The oracle: transformers, reading everything anew for every token."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    ids: list[int] = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompt = len(ids)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[prompt:]


def refusal(address: str) -> grpc.StatusCode:
    """What a DP group says to a stranger."""
    with grpc.insecure_channel(address) as channel:
        hello = session_pb2.Uplink(hello=session_pb2.Hello(front_door_id="stranger"))
        stream = session_pb2_grpc.DPGroupStub(channel).Connect(iter([hello]), timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            next(iter(stream))
    assert isinstance(caught.value, grpc.Call)
    return caught.value.code()


def door_of(output: str, *hosts: Host) -> Host:
    """A host with a front door, from what the server says."""
    lines = [line.split()[-1] for line in output.splitlines() if line.strip().startswith("gRPC")]
    doors = [host for host in hosts if f"{host.address}:{PORT}" in lines]
    assert doors, output
    return doors[0]


def engine_of(door: Host) -> admin_pb2.EngineStatus:
    with grpc.insecure_channel(f"{door.address}:{PORT}") as channel:
        metadata = (("authorization", f"Bearer {KEY}"),)
        status = admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), metadata=metadata, timeout=20)
    (engine,) = status.engines
    return engine


def test_an_engine_over_two_hosts_answers_a_third(hosts: Hosts, model: Path) -> None:
    first, second, client = hosts
    with serving_on(first, model, config()) as server:
        door = door_of(server.output, first, second)
        assert ask(client, door, KEY)["tokens"] == greedy(model)
        assert ask(client, door, "not-the-key")["code"] == "UNAUTHENTICATED"
        engine = engine_of(door)
        assert engine.plan == "data 2 x pipeline 1 x tensor 1", "a rank of one thread on each host's one core"
        assert any("data 2: every group" in reason for reason in engine.plan_reasons)
        assert not any("Ray's estimate" in reason for reason in engine.plan_reasons), "both hosts said what they have"
        addresses = [group.address for group in engine.dp_groups]
        assert {address.rpartition(":")[0] for address in addresses} == {first.address, second.address}
        assert len({rank.node for rank in engine.ranks}) == 2
        assert [refusal(address) for address in addresses] == [grpc.StatusCode.UNAUTHENTICATED] * 2


def test_the_stages_of_a_pipeline_on_two_hosts(hosts: Hosts, model: Path) -> None:
    first, second, client = hosts
    with serving_on(first, model, config(plan="data: 1, pipeline: 2")) as server:
        door = door_of(server.output, first, second)
        assert ask(client, door, KEY)["tokens"] == greedy(model)
        engine = engine_of(door)
        assert engine.plan == "data 1 x pipeline 2 x tensor 1"
        assert len({rank.node for rank in engine.ranks}) == 2


def test_a_drained_host_sends_its_clients_to_the_other(hosts: Hosts, model: Path) -> None:
    """Its door says so to health checks and closes; a stream that is open there is resumed at the other door."""
    first, second, client = hosts
    text = (
        config(plan="data: 1")
        .replace("cluster: {", "cluster: {engines: 2, front_doors: 2, ")
        .replace(KEY, f"{{ops: {KEY}}}")
    )
    with serving_on(first, model, text.replace("security: {", "security: {administrators: [ops], ")) as server:
        status = door_status(first)
        assert {door.node for door in status.front_doors} == {first.address, second.address}, server.output
        with grpc.insecure_channel(f"{second.address}:{PORT}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=120)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            doors = f"{second.address}:{PORT},{first.address}:{PORT}"
            stream = client.start(sys.executable, "-m", "tests.hosts.follow", doors, KEY, TEXT, "400")
            eventually(lambda: "begun" in stream.output, "the stream has begun", timeout_s=30)
            drain = ("drain", second.address, "--timeout-s", "0.2", "--address", f"{first.address}:{PORT}")
            code, out, errors = shoal(first, *drain, "--api-key", KEY)
            assert code == 0, out + errors + server.output
            assert f"front doors on {second.address} are closed" in out
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        eventually(lambda: stream.poll() is not None, "the stream has ended", timeout_s=60)
        assert "finished 400 tokens" in stream.output
        after = door_status(first)
        assert [(door.node, door.draining) for door in after.front_doors if door.draining] == [(second.address, True)]
        assert {rank.node for engine in after.engines for rank in engine.ranks} == {first.address}
        code, out, errors = shoal(
            first, "drain", first.address, "--address", f"{first.address}:{PORT}", "--api-key", KEY
        )
        assert code == 1
        assert "nothing else takes requests" in errors


def door_status(host: Host) -> admin_pb2.StatusResponse:
    with grpc.insecure_channel(f"{host.address}:{PORT}") as channel:
        metadata = (("authorization", f"Bearer {KEY}"),)
        return admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), metadata=metadata, timeout=20)


def serve_in_vain(host: Host, model: Path, text: str) -> list[str]:
    """The lines of a start that must fail."""
    host.outside("/tmp/shoal.yaml").write_text(text)
    where = ("--address", "auto", "--config", "/tmp/shoal.yaml")
    code, _, errors = shoal(host, "serve", "--model-path", str(model), *where)
    assert code == 1, errors
    assert "Traceback" not in errors
    return [line.removeprefix("shoal: ") for line in errors.splitlines() if line.startswith("shoal: ")]


def test_a_host_without_the_model_is_named(hosts: Hosts, model: Path) -> None:
    shutil.copytree(model, hosts[0].outside("/tmp/only-here"))
    told, line = serve_in_vain(hosts[0], Path("/tmp/only-here"), config())
    assert told == "the cluster cannot run this model:"
    assert line.startswith("model on host-2: /tmp/only-here is not there; fix: copy the model")


def test_ranks_that_find_no_place_end_the_start_in_time(hosts: Hosts, model: Path) -> None:
    told, *found = serve_in_vain(hosts[0], model, config(plan="data: 4", start_timeout_s=8))
    assert told.startswith("not ready after 8 s (cluster.start_timeout_s): engine-0 is placing")
    assert any(line.startswith("room: ranks need 4 times 1 CPU in one piece; the cluster has: host-") for line in found)


def doctor(host: Host, *options: str) -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
    """The exit code, and the findings by check and place."""
    host.outside("/tmp/doctor.yaml").write_text(f"cluster: {{host: 0.0.0.0, port: {PORT}, http_port: {HTTP_PORT}}}")
    code, out, errors = shoal(host, "doctor", "--address", "auto", "--config", "/tmp/doctor.yaml", "--json", *options)
    assert out, errors
    return code, {(finding["check"], finding["node"]): finding for finding in json.loads(out)["findings"]}


def test_the_doctor_finds_nothing_on_healthy_hosts(hosts: Hosts, model: Path) -> None:
    code, found = doctor(hosts[0], "--model-path", str(model))
    assert code == 0, found
    assert {finding["level"] for finding in found.values()} <= {"ok", "warning"}
    for check in ("versions", "addresses", "ports", "clock", "shared memory", "memory", "disk", "compiler", "model"):
        assert {node for name, node in found if name == check} == {"host-1", "host-2"}
    assert found["Ray's token", "host-2"]["text"] == "demanded"
    assert "all-reduce" in found["link", "host-1 - host-2"]["text"]


def test_a_start_over_a_cut_link_ends_in_time_and_names_the_two(hosts: Hosts, model: Path) -> None:
    """With everything taken down: 65 s after its time was over at the latest, as the README has it."""
    first, second, third = hosts
    third.write(".ray/auth_token", first.outside(HOME / ".ray/auth_token").read_text())
    join(third, first, num_cpus=1)
    hosts.cut(second, third)
    first.outside("/tmp/shoal.yaml").write_text(config(plan="data: 3", start_timeout_s=10))
    where = ("--address", "auto", "--config", "/tmp/shoal.yaml", "--model-path", str(model))
    server = first.start(*SHOAL, "serve", *where, env=RAY_ENV)
    try:
        eventually(lambda: "engine-0: " in server.output or server.poll() is not None, "it has begun", timeout_s=120)
        began_s = time.monotonic()
        assert server.wait(10 + 65 + 30) == 1, server.output
    finally:
        server.kill()
    print(f"\nended {time.monotonic() - began_s:.1f} s after it had begun to place ranks")
    hosts.heal()
    third.run("ray", "stop", "--force", check=False)
    lines = [line.removeprefix("shoal: ") for line in server.output.splitlines() if line.startswith("shoal: ")]
    assert lines[0].startswith("not ready after 10 s (cluster.start_timeout_s)"), server.output
    assert any(line.startswith("link on host-2 - host-3: no connection") for line in lines), lines
    assert not [process for host in hosts for process in host.processes("ray::RankActor")]


def test_the_doctor_finds_every_sick_host(hosts: Hosts, model: Path) -> None:
    """Another version on one, no model on another, and a cut between two."""
    first, second, third = hosts
    # Packages tell their versions in folders on the path; the first one counts.
    fake = third.outside("/tmp/fake/grpcio-0.1.dist-info")
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: grpcio\nVersion: 0.1\n")
    third.write(".ray/auth_token", first.outside(HOME / ".ray/auth_token").read_text())
    join(third, first, num_cpus=1, env={**RAY_ENV, "PYTHONPATH": f"/tmp/fake:{ROOT}"})
    shutil.copytree(model, second.outside("/tmp/but-there"))
    hosts.cut(second, third)
    code, found = doctor(first, "--model-path", "/tmp/but-there")
    hosts.heal()
    assert code == 1
    failures = {key: finding for key, finding in found.items() if finding["level"] == "failure"}
    assert {("versions", "host-3"), ("model", "host-1")} <= failures.keys(), failures
    assert "grpcio 0.1 (elsewhere" in failures["versions", "host-3"]["text"]
    assert "is not there" in failures["model", "host-1"]["text"]
    (link,) = (where for check, where in failures if check == "link")
    assert set(link.split(" - ")) == {"host-2", "host-3"}
    assert all(finding["fix"] for finding in failures.values())
