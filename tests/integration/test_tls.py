"""TLS at both doors: who is let in, who is not, and certificates that change while they are served."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import grpc
import httpx
import pytest

from cluster.chaos import campaign
from cluster.chaos.schedule import Plan
from cluster.cli.chat_client import ChatError, Conversation, connect
from cluster.cli.connection import Tls
from cluster.doctor import checks
from cluster.doctor.facts import Wanted
from cluster.doctor.finding import Level
from cluster.doctor.gather import gather
from cluster.front_door.server import FrontDoorServer
from cluster.front_door.tls import TlsFiles
from protos.shoal.v1 import inference_pb2 as pb
from protos.shoal.v1 import inference_pb2_grpc
from tests.certificates import Authority
from tests.fakes import FakeGroup, says
from tests.integration.doors import FakeOperations, open_door


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def files(authority: Authority, *, client_ca: Path | None = None) -> TlsFiles:
    cert, key = authority.issue("server")
    return TlsFiles(cert=str(cert), key=str(key), client_ca=None if client_ca is None else str(client_ca))


async def ask(server: FrontDoorServer, credentials: grpc.ChannelCredentials) -> str:
    """Over a connection of its own."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.secure_channel(f"127.0.0.1:{server.grpc_port}", credentials, options=options) as channel:
        stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(channel)
        return (await stub.GenerateOnce(pb.GenerateRequest(text="hi"), timeout=20)).choices[0].text


async def fetch(server: FrontDoorServer, context: ssl.SSLContext) -> int:
    async with httpx.AsyncClient(verify=context) as client:
        answer = await client.post(f"https://127.0.0.1:{server.http_port}/v1/completions", json={"prompt": "hi"})
        return answer.status_code


async def serial(server: FrontDoorServer, port: int, authority: Authority) -> str:
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.set_alpn_protocols(["h2", "http/1.1"])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    connection = writer.get_extra_info("ssl_object")
    found = connection.getpeercert()["serialNumber"]
    writer.close()
    return str(found)


async def test_both_doors_speak_tls_and_nothing_else(authority: Authority) -> None:
    async with open_door(FakeGroup(says("ok")), tls=files(authority), http=True) as door:
        server = door.server
        assert await ask(server, grpc.ssl_channel_credentials(authority.ca.read_bytes())) == "ok"
        assert await fetch(server, ssl.create_default_context(cafile=str(authority.ca))) == 200
        with pytest.raises(grpc.aio.AioRpcError):
            await door.stub.GenerateOnce(pb.GenerateRequest(text="hi"), timeout=20)
        with pytest.raises(httpx.HTTPError):
            async with httpx.AsyncClient() as client:
                await client.get(f"http://127.0.0.1:{server.http_port}/healthz")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await fetch(server, ssl.create_default_context())


async def test_clients_show_a_certificate_where_that_is_asked_for(authority: Authority, tmp_path: Path) -> None:
    ours, others = Authority(tmp_path, "clients"), Authority(tmp_path, "others")
    async with open_door(FakeGroup(says("ok")), tls=files(authority, client_ca=ours.ca), http=True) as door:
        ca = authority.ca.read_bytes()
        for signer, name, welcome in ((ours, "ann", True), (others, "eve", False)):
            cert, key = signer.issue(name)
            credentials = grpc.ssl_channel_credentials(ca, key.read_bytes(), cert.read_bytes())
            context = ssl.create_default_context(cafile=str(authority.ca))
            context.load_cert_chain(cert, key)
            if welcome:
                assert await ask(door.server, credentials) == "ok"
                assert await fetch(door.server, context) == 200
            else:
                with pytest.raises(grpc.aio.AioRpcError):
                    await ask(door.server, credentials)
                with pytest.raises(httpx.HTTPError):
                    await fetch(door.server, context)
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(door.server, grpc.ssl_channel_credentials(ca))
        with pytest.raises(httpx.HTTPError):
            await fetch(door.server, ssl.create_default_context(cafile=str(authority.ca)))


async def test_a_new_certificate_is_used_and_a_broken_one_is_not(authority: Authority) -> None:
    async with open_door(FakeGroup(says("ok")), tls=files(authority), http=True) as door:
        ports = (door.server.grpc_port, door.server.http_port)
        first = [await serial(door.server, port, authority) for port in ports]
        assert len(set(first)) == 1
        authority.issue("server")
        second = [await serial(door.server, port, authority) for port in ports]
        assert len(set(second)) == 1
        assert second != first
        authority.spoil("server")
        assert [await serial(door.server, port, authority) for port in ports] == second
        authority.issue("server")
        third = [await serial(door.server, port, authority) for port in ports]
        assert third not in (first, second)
        assert await ask(door.server, grpc.ssl_channel_credentials(authority.ca.read_bytes())) == "ok"


async def test_shoal_chat_speaks_it(authority: Authority) -> None:
    async with open_door(FakeGroup(says("ok")), tls=files(authority)) as door:
        address = f"127.0.0.1:{door.server.grpc_port}"

        def chat(tls: Tls) -> str:
            with connect(address, None, tls) as server:
                return Conversation(server).ask("hi", lambda text: None).text

        assert await asyncio.to_thread(chat, Tls(ca=authority.ca)) == "ok"
        with pytest.raises(ChatError, match=f"no TLS with {address}"):
            await asyncio.to_thread(_names, address, Tls(enabled=True))


def _names(address: str, tls: Tls) -> list[str]:
    with connect(address, None, tls) as server:
        return server.model_names()


async def test_shoal_chaos_speaks_it(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "_SETTLE_S", 0.2)
    async with open_door(FakeGroup(), tls=files(authority), operations=FakeOperations()) as door:
        asked = campaign.Campaign(
            addresses=[f"127.0.0.1:{door.server.grpc_port}"],
            api_key="",
            plan=Plan(weights={("kill", "rank"): 1.0}),
            num_faults=0,
            num_streams=1,
            works=campaign.works(2, 4, seed=1),
            credentials=Tls(ca=authority.ca).credentials(),
        )
        found = await campaign.run(asked, lambda line: None)
        assert found.clean
        assert found.num_started > 0


async def test_the_doctor_knows_a_front_door_and_its_certificate(authority: Authority, tmp_path: Path) -> None:
    clients = Authority(tmp_path, "clients")
    served = files(authority, client_ca=clients.ca)
    async with open_door(FakeGroup(), tls=served) as door:
        wanted = Wanted(ports=(door.server.grpc_port,), tls=served)
        facts = await asyncio.to_thread(gather, wanted, address="127.0.0.1")
        assert facts.serving
        (finding,) = checks.certificate([facts], wanted)
        assert (finding.level, facts.tls_problem) == (Level.OK, "")
        authority.spoil("server")
        (finding,) = checks.certificate([await asyncio.to_thread(gather, wanted, address="127.0.0.1")], wanted)
        assert finding.level is Level.FAILURE
        assert "server.key" in finding.text
        assert "security.tls.cert" in finding.fix
