"""`shoal chat` without a terminal and without a server."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata
from rich.console import Console

from cluster.cli.chat_client import ChatError, Conversation, Server
from cluster.cli.chat_terminal import Terminal
from protos.shoal.v1 import inference_pb2 as pb


def _error(code: grpc.StatusCode, details: str, *, reached: bool = True) -> grpc.RpcError:
    initial = Metadata(("server", "there")) if reached else Metadata()
    return AioRpcError(code, initial, Metadata(), details, None)


class FakeCall:
    def __init__(self, chunks: Iterator[pb.GenerateChunk]) -> None:
        self._chunks = chunks
        self.cancelled = False

    def __iter__(self) -> Iterator[pb.GenerateChunk]:
        return self._chunks

    def cancel(self) -> None:
        self.cancelled = True


class FakeStub:
    """Answers each question from `script`: texts are chunks, anything else is raised."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.script: list[object] = ["Hel", "lo"]
        self.requests: list[pb.ChatRequest] = []
        self.calls: list[FakeCall] = []
        self.list_error: grpc.RpcError | None = None
        self._tick = tick

    def Chat(self, request: pb.ChatRequest, metadata: object) -> FakeCall:
        self.requests.append(request)
        self.calls.append(FakeCall(self._chunks()))
        return self.calls[-1]

    def ListModels(self, request: pb.ListModelsRequest, metadata: object, timeout: float) -> pb.ListModelsResponse:
        if self.list_error is not None:
            raise self.list_error
        return pb.ListModelsResponse(models=[pb.Model(name="tiny")])

    def _chunks(self) -> Iterator[pb.GenerateChunk]:
        for at, item in enumerate(self.script):
            self._tick()
            if isinstance(item, BaseException):
                raise item
            last = at == len(self.script) - 1
            finish = pb.FINISH_REASON_LENGTH if last else pb.FINISH_REASON_UNSPECIFIED
            yield pb.GenerateChunk(text=str(item), position=at, token_ids=[at], finish_reason=finish)


class Scene:
    """A terminal over a fake server; every chunk takes half a second."""

    def __init__(self, *, apart: bool = False) -> None:
        self.now_s = 0.0
        self.stub = FakeStub(self._tick)
        server = Server("host:1", self.stub, ())  # type: ignore[arg-type]
        self.conversation = Conversation(server, temperature=0.0, clock=lambda: self.now_s)
        self.out = io.StringIO()
        self.notes = io.StringIO() if apart else self.out
        out = Console(file=self.out, soft_wrap=True)
        self.terminal = Terminal(self.conversation, out, Console(file=self.notes) if apart else out)

    def _tick(self) -> None:
        self.now_s += 0.5

    def talk(self, *lines: str | BaseException) -> int:
        typed = iter(lines)

        def read_line(prompt: str) -> str:
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        return self.terminal.talk(read_line)

    def asked(self) -> list[list[tuple[str, str]]]:
        return [[(message.role, message.content) for message in request.messages] for request in self.stub.requests]


def test_an_answer_and_what_it_took() -> None:
    scene = Scene()
    assert scene.talk("hi") == 0
    assert "tiny at host:1" in scene.out.getvalue()
    assert "Hello\n2 tokens · first after 0.50 s · 2.0 tokens/s · cut at the token limit" in scene.out.getvalue()
    assert scene.stub.requests[0].sampling.temperature == 0.0
    assert scene.stub.requests[0].sampling.HasField("temperature")
    assert not scene.stub.requests[0].sampling.HasField("max_tokens")


def test_history_system_and_reset() -> None:
    scene = Scene()
    scene.talk("a", "/system Be brief.", "b", "/reset", "c", "/system")
    told = ("system", "Be brief.")
    first = [("user", "a"), ("assistant", "Hello")]
    assert scene.asked() == [[("user", "a")], [told, *first, ("user", "b")], [told, ("user", "c")]]
    assert scene.out.getvalue().count("System message: Be brief.") == 2


def test_an_interrupted_answer_is_cancelled_and_what_was_read_is_kept() -> None:
    scene = Scene()
    scene.stub.script = ["Hel", KeyboardInterrupt()]
    scene.talk("a", "b")
    assert all(call.cancelled for call in scene.stub.calls)
    assert scene.asked()[1] == [("user", "a"), ("assistant", "Hel"), ("user", "b")]
    assert "interrupted" in scene.out.getvalue()


def test_an_answer_interrupted_before_it_began_leaves_no_trace() -> None:
    scene = Scene()
    scene.stub.script = [KeyboardInterrupt()]
    scene.talk("a", "b")
    assert scene.asked() == [[("user", "a")], [("user", "b")]]


def test_a_failed_answer_leaves_no_trace_and_the_chat_goes_on() -> None:
    scene = Scene()
    scene.stub.script = ["Hel", _error(grpc.StatusCode.INVALID_ARGUMENT, "too \x1b[31mlong")]
    assert scene.talk("a", "b") == 0
    assert scene.asked() == [[("user", "a")], [("user", "b")]]
    assert "too \ufffd[31mlong" in scene.out.getvalue()


def test_interrupting_the_prompt_does_not_leave() -> None:
    scene = Scene()
    assert scene.talk(KeyboardInterrupt(), "a") == 0
    assert "Ctrl-D or /exit leaves" in scene.out.getvalue()
    assert scene.asked() == [[("user", "a")]]


def test_commands() -> None:
    scene = Scene()
    assert scene.talk("/help", "/rest", "  ", "/exit", "never asked") == 0
    shown = scene.out.getvalue()
    assert all(name in shown for name in ("/reset", "/system", "/help", "/exit", "Ctrl-C"))
    assert "Did you mean /reset?" in shown
    assert scene.asked() == []


def test_nobody_there() -> None:
    scene = Scene()
    scene.stub.list_error = _error(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses", reached=False)
    assert scene.talk("a") == 1
    assert "no server answers at host:1; is `shoal serve` running?" in scene.out.getvalue()
    scene.stub.list_error = _error(grpc.StatusCode.UNAUTHENTICATED, "the API key is not known here")
    with pytest.raises(ChatError, match="the API key is not known here"):
        scene.conversation.server.model_names()


def test_what_the_model_says_cannot_drive_the_terminal() -> None:
    scene = Scene()
    scene.stub.script = ["\x1b]0;owned\x07[bold]a\tb\nc", "\x9b"]
    scene.talk("a")
    assert "\ufffd]0;owned\ufffd[bold]a\tb\nc\ufffd" in scene.out.getvalue()
    assert "\x1b" not in scene.out.getvalue()


def test_in_a_script_the_output_is_the_answers_alone() -> None:
    scene = Scene(apart=True)
    assert scene.terminal.ask_all(iter(["a", "", "/system x", "b"])) == 0
    assert scene.out.getvalue() == "Hello\nHello\n"
    assert "tokens/s" in scene.notes.getvalue()
    assert len(scene.stub.requests) == 2


def test_a_script_ends_at_its_first_failure() -> None:
    scene = Scene(apart=True)
    scene.stub.script = [_error(grpc.StatusCode.UNAVAILABLE, "no engine is ready")]
    assert scene.terminal.ask_all(["a", "b"]) == 1
    assert scene.notes.getvalue() == "no engine is ready\n"
    scene.stub.script = ["Hel", KeyboardInterrupt()]
    assert scene.terminal.ask_all(["a", "b"]) == 130
    assert len(scene.stub.requests) == 2


def test_one_message_is_no_command_and_need_not_be_good_text() -> None:
    scene = Scene(apart=True)
    assert scene.terminal.ask_all(["/etc/hosts \udcff"], commands=False) == 0
    assert scene.asked() == [[("user", "/etc/hosts \ufffd")]]
