"""A client that follows its request from front door to front door."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from cluster.client.held import BrokenStream, Held
from cluster.client.streams import follow_blocking
from protos.shoal.v1 import inference_pb2 as pb


def _chunk(position: int, *token_ids: int, index: int = 0, last: bool = False) -> pb.GenerateChunk:
    finish = pb.FINISH_REASON_LENGTH if last else pb.FINISH_REASON_UNSPECIFIED
    return pb.GenerateChunk(index=index, position=position, token_ids=token_ids, finish_reason=finish)


def _gone(code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(), "connection reset", None)


class _Call:
    def __init__(self, script: list[pb.GenerateChunk | Exception]) -> None:
        self._script = script

    def __iter__(self) -> Iterator[pb.GenerateChunk]:
        for item in self._script:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        pass


class _Doors:
    """Front doors one after the other, each with what it says: the stub of all of them, and their channel."""

    def __init__(self, *scripts: list[pb.GenerateChunk | Exception]) -> None:
        self._scripts = iter(scripts)
        self.resumes: list[pb.ResumeRequest] = []

    def Generate(self, request: pb.GenerateRequest, metadata: object) -> _Call:
        return _Call(next(self._scripts))

    def unary_stream(self, method: str, **how: object) -> object:
        def resume(request: pb.ResumeRequest, metadata: object) -> _Call:
            self.resumes.append(request)
            return _Call(next(self._scripts))

        return resume if method.endswith("/Resume") else self

    def unary_unary(self, method: str, **how: object) -> object:
        return self

    def stream_stream(self, method: str, **how: object) -> object:
        return self

    def close(self) -> None:
        pass


def _follow(doors: _Doors, held: Held) -> list[int]:
    chunks = follow_blocking(doors, lambda: doors, held)  # type: ignore[arg-type, return-value]
    return [token for chunk in chunks for token in chunk.token_ids]


def test_the_rest_is_asked_for_with_what_is_held() -> None:
    doors = _Doors([_chunk(0, 5), _chunk(1, 6), _gone()], [_gone()], [_chunk(2, 7, last=True)])
    held = Held(pb.GenerateRequest(text="hi"))
    assert _follow(doors, held) == [5, 6, 7]
    assert held.finished
    assert len(doors.resumes) == 2
    resume = doors.resumes[-1]
    assert list(resume.positions) == [2]
    assert [list(each.ids) for each in resume.held] == [[5, 6]]
    assert resume.request_id == resume.generate.request_id != ""
    assert resume.generate.sampling.HasField("seed"), "whoever goes on draws the same"


def test_an_end_that_was_seen_needs_no_resume() -> None:
    doors = _Doors([_chunk(0, 5, last=True), _gone()])
    assert _follow(doors, Held(pb.GenerateRequest(text="hi"))) == [5]
    assert not doors.resumes


def test_an_error_that_is_the_servers_answer_is_raised() -> None:
    doors = _Doors([_chunk(0, 5), _gone(grpc.StatusCode.DEADLINE_EXCEEDED)])
    with pytest.raises(AioRpcError):
        _follow(doors, Held(pb.GenerateRequest(text="hi")))
    with pytest.raises(AioRpcError):
        _follow(_Doors([_gone()]), Held(pb.GenerateRequest(text="hi")))


@pytest.mark.parametrize(("position", "kind"), [(0, "repeated"), (2, "skipped")])
def test_a_token_that_comes_twice_or_is_missing_is_noticed(position: int, kind: str) -> None:
    with pytest.raises(BrokenStream) as caught:
        _follow(_Doors([_chunk(0, 5), _chunk(position, 6)]), Held(pb.GenerateRequest(text="hi")))
    assert caught.value.kind == kind


def test_several_choices_are_held_apart() -> None:
    held = Held(pb.GenerateRequest(text="hi", sampling=pb.SamplingParams(n=2)))
    held.take(_chunk(0, 5, 6))
    held.take(_chunk(0, 7, index=1, last=True))
    assert not held.finished
    assert list(held.resume().positions) == [2, 1]
    assert list(held.resume().done) == [1]
