"""What the doors' readers make of the wire, good and bad."""

from __future__ import annotations

import json

import pytest

from loadtest.grpc_door import generate_request, read_chunk
from loadtest.http_door import EventReader, completion_body
from loadtest.record import Recorder, RequestRecord
from loadtest.workload import Work
from protos.shoal.v1 import inference_pb2 as pb

WORK = Work(prompt=(5, 6), num_output_tokens=2)


def _recorder() -> Recorder:
    return Recorder("http", WORK, 0.0, lambda: 1.0)


def _tokens(*ids: int, finish: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "token_ids": ids, "finish_reason": finish}]})


def _usage(num_tokens: int) -> str:
    return "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": num_tokens}})


def _read(*lines: str) -> RequestRecord:
    recorder = _recorder()
    reader = EventReader(recorder)
    for line in lines:
        reader.line(line)
    return recorder.close(reader.fault)


def test_the_same_work_on_both_wires() -> None:
    request = generate_request(WORK, "m")
    assert list(request.token_ids.ids) == [5, 6]
    assert (request.model, request.sampling.max_tokens, request.sampling.ignore_eos) == ("m", 2, True)
    assert request.sampling.HasField("temperature")
    body = completion_body(WORK, "m")
    assert (body["prompt"], body["max_tokens"], body["ignore_eos"]) == ((5, 6), 2, True)
    assert generate_request(Work(prompt="hi", num_output_tokens=1)).text == "hi"


def test_grpc_chunks_are_read() -> None:
    recorder = _recorder()
    read_chunk(recorder, pb.GenerateChunk(position=0, token_ids=[1]))
    read_chunk(recorder, pb.GenerateChunk(position=1, token_ids=[2]))
    read_chunk(recorder, pb.GenerateChunk(position=2, finish_reason=pb.FINISH_REASON_LENGTH))
    assert recorder.close().error == ""


def test_a_whole_http_stream_is_read() -> None:
    record = _read(": ping", "", _tokens(1), _tokens(2, finish="length"), _usage(2), "data: [DONE]")
    assert record.error == ""
    assert record.num_output_tokens == 2


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([_tokens(1), _tokens(2, finish="length"), _usage(2)], "without [DONE]"),
        ([_tokens(1), _tokens(2, finish="length"), "data: [DONE]"], "no usage"),
        ([_tokens(1, finish="length"), _usage(2), "data: [DONE]"], "1 token ids came where usage says 2"),
        ([_tokens(1), 'data: {"error": {"message": "boom"}}'], "boom"),
        ([_tokens(1), _tokens(2), _usage(2), "data: [DONE]"], "finish reason"),
        ([_tokens(1, finish="length"), _usage(1), "data: [DONE]"], "1 tokens came where 2 were asked for"),
    ],
)
def test_a_broken_http_stream_is_an_error(lines: list[str], error: str) -> None:
    assert error in _read(*lines).error
