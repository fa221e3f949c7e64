"""`shoal chat` as a process of its own, over a real connection and at a real terminal."""

from __future__ import annotations

import asyncio
import codecs
import os
import pty
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator

import pytest

from cluster.front_door.server import FrontDoorServer, FrontDoorSettings
from tests.fakes import CARD, SECRET, ByteCodec, FakeGroup, LineTemplate, says, serving

COMMAND = (sys.executable, "-c", "import typer; from cluster.cli.chat import chat; typer.run(chat)")
ANSWER = "Blub 🐟!"
KEY = "a client's key"


@pytest.fixture
async def group() -> AsyncIterator[FakeGroup]:
    group = FakeGroup(says(ANSWER))
    async with serving(group):
        yield group


@pytest.fixture
async def address(group: FakeGroup) -> AsyncIterator[str]:
    settings = FrontDoorSettings(
        front_door_id="door", secret=SECRET, grpc_port=0, http_port=None, api_keys={"ann": KEY}
    )
    server = FrontDoorServer(settings, card=CARD, codec=ByteCodec(), template=LineTemplate())
    server.set_groups([group.address])
    await server.start()
    try:
        await group.until(lambda group: group.num_streams == 1)
        yield f"127.0.0.1:{server.grpc_port}"
    finally:
        await server.stop()


async def _run(*arguments: str, stdin: bytes = b"", key: str = KEY) -> tuple[int | None, str, str]:
    environment = {**os.environ, "SHOAL_API_KEY": key}
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate(stdin)
    return process.returncode, out.decode(), err.decode()


async def test_one_message(address: str, group: FakeGroup) -> None:
    code, out, err = await _run("--address", address, "--message", "hi", "--system", "brief", "--max-tokens", "5")
    assert (code, out) == (0, "Blub \n")
    assert "5 tokens · first after" in err
    assert "cut at the token limit" in err
    assert bytes(i for i in group.submits[0].prompt_token_ids if i < 256) == b"system: brief\nuser: hi\nassistant: "


async def test_lines_from_a_pipe(address: str, group: FakeGroup) -> None:
    code, out, _ = await _run("--address", address, stdin=b"one\n\ntwo\n/reset\nthree\n")
    assert (code, out) == (0, f"{ANSWER}\n" * 3)
    prompts = [bytes(i for i in submit.prompt_token_ids if i < 256).decode() for submit in group.submits]
    assert prompts == [
        "user: one\nassistant: ",
        f"user: one\nassistant: {ANSWER}\nuser: two\nassistant: ",
        "user: three\nassistant: ",
    ]


async def test_failures_in_words(address: str) -> None:
    code, out, err = await _run("--address", address, "--message", "hi", key="wrong")
    assert (code, out, err) == (1, "", "the API key is not known here\n")
    code, out, err = await _run("--address", address, "--message", "hi", "--temperature", "-1")
    assert (code, out) == (1, "")
    assert err.startswith("temperature must be between")
    code, out, err = await _run("--address", "127.0.0.1:1", "--message", "hi")
    assert (code, out) == (1, "")
    assert err == "no server answers at 127.0.0.1:1; is `shoal serve` running?\n"


class _Screen:
    """The other end of a terminal."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._more = asyncio.Event()
        asyncio.get_running_loop().add_reader(terminal, self._read)

    async def until(self, text: str) -> None:
        """Waits until `text` is shown, and forgets what was shown up to it."""
        async with asyncio.timeout(60):
            while text not in self._text:
                self._more.clear()
                await self._more.wait()
        self._text = self._text.partition(text)[2]

    def type(self, line: str) -> None:
        os.write(self._terminal, line.encode())

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._terminal)
        os.close(self._terminal)

    def _read(self) -> None:
        try:
            self._text += self._decoder.decode(os.read(self._terminal, 65536))
        except OSError:  # the process has closed its end
            asyncio.get_running_loop().remove_reader(self._terminal)
        self._more.set()


async def _at_a_terminal(*arguments: str) -> tuple[Process, _Screen]:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "SHOAL_API_KEY": KEY, "TERM": "dumb"}
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    return process, _Screen(ours)


async def test_an_answer_is_interrupted_and_the_chat_goes_on(address: str, group: FakeGroup) -> None:
    group.hold_at = 4
    process, screen = await _at_a_terminal("--address", address)
    try:
        await screen.until("fake at")
        await screen.until("> ")
        screen.type("one\n")
        await screen.until("Blub")
        process.send_signal(signal.SIGINT)
        await screen.until("interrupted")
        await group.until(lambda group: group.num_running == 0)
        group.release()
        screen.type("two\n")
        await screen.until(ANSWER)
        await screen.until("tokens/s")
        screen.type("/exit\n")
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        screen.close()
    assert len(group.cancels) == 1
    asked = bytes(i for i in group.submits[1].prompt_token_ids if i < 256)
    assert asked == b"user: one\nassistant: Blub\nuser: two\nassistant: "
