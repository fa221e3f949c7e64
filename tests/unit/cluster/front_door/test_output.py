"""One choice's output: positions, text, stops, and going back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.front_door.output import ChoiceOutput, PositionGap
from cluster.front_door.stops import StopScanner
from protos.shoal.v1 import session_pb2 as pb
from scheduler.plan import FinishReason
from tests.fakes import EOS, ByteCodec


def _output(
    *stops: str, include_stop: bool = False, skip_special_tokens: bool = True, min_tokens: int = 0
) -> ChoiceOutput:
    return ChoiceOutput(
        0,
        text=ByteCodec().detokenizer(skip_special_tokens),
        stops=StopScanner(stops, include_in_output=include_stop) if stops else None,
        min_tokens=min_tokens,
        include_stop=include_stop,
        prompt_token_ids=(1, 2, 3),
    )


def _said(position: int, *token_ids: int, finish: pb.Finish.ValueType = pb.FINISH_UNSPECIFIED) -> pb.SequenceOutput:
    return pb.SequenceOutput(sequence_id=1, position=position, token_ids=token_ids, finish=finish)


def test_chunks_are_contiguous_and_the_first_brings_the_prompt() -> None:
    output = _output()
    output.accept(_said(0, *b"ab"))
    first = output.take()
    output.accept(_said(2, *b"c"))
    output.accept(_said(3, *b"d", finish=pb.FINISH_LENGTH))
    second = output.take()
    assert (first.position, first.token_ids, first.text, first.prompt_token_ids) == (0, (97, 98), "ab", (1, 2, 3))
    assert (second.position, second.token_ids, second.text, second.prompt_token_ids) == (2, (99, 100), "cd", ())
    assert (first.finish, second.finish) == (None, FinishReason.LENGTH)


def test_a_gap_is_never_forwarded() -> None:
    output = _output()
    output.accept(_said(0, 97))
    with pytest.raises(PositionGap):
        output.accept(_said(2, 99))
    assert output.take().token_ids == (97,)


def test_repeated_tokens_are_skipped() -> None:
    output = _output()
    output.accept(_said(0, *b"abc"))
    assert output.accept(_said(1, *b"bcd")) == 1
    assert output.accept(_said(0, *b"ab")) == 0
    assert output.take().text == "abcd"


def test_half_a_character_waits() -> None:
    output = _output()
    first, second, third = "€".encode()
    texts = []
    for position, token_id in enumerate([first, second, third]):
        output.accept(_said(position, token_id))
        texts.append(output.take().text)
    assert texts == ["", "", "€"]


def test_half_a_character_at_the_end_is_replaced() -> None:
    output = _output()
    output.accept(_said(0, *"x€".encode()[:3], finish=pb.FINISH_LENGTH))
    assert output.take().text == "x\ufffd"


def test_a_stop_string_over_two_tokens_ends_the_choice_before_the_engine_does() -> None:
    output = _output("lo w")
    output.accept(_said(0, *b"hel"))
    assert output.take().text == "he"
    assert output.accept(_said(3, *b"lo world")) == 4
    chunk = output.take()
    assert (chunk.text, chunk.token_ids) == ("l", tuple(b"lo w"))
    assert (chunk.finish, chunk.stop_string, chunk.stop_token_id) == (FinishReason.STOP, "lo w", None)


def test_a_stop_string_may_be_included() -> None:
    output = _output("lo", include_stop=True)
    output.accept(_said(0, *b"hello w"))
    assert output.take().text == "hello"


def test_held_text_is_shown_at_the_end() -> None:
    output = _output("low")
    output.accept(_said(0, *b"hello"))
    assert output.take().text == "hel"
    output.accept(_said(5, finish=pb.FINISH_LENGTH))
    chunk = output.take()
    assert (chunk.text, chunk.token_ids, chunk.position) == ("lo", (), 5)


def test_stop_strings_wait_for_min_tokens() -> None:
    output = _output("a", min_tokens=2)
    output.accept(_said(0, *b"aaa"))
    assert output.take().text == "aa"
    assert output.finish is FinishReason.STOP


def test_the_end_token_is_reported_but_not_shown() -> None:
    output = _output(skip_special_tokens=False)
    message = _said(0, *b"ok", EOS, finish=pb.FINISH_STOP)
    message.stop_token_id = EOS
    output.accept(message)
    chunk = output.take()
    assert (chunk.text, chunk.token_ids[-1], chunk.stop_token_id) == ("ok", EOS, EOS)


def test_a_stop_token_may_be_shown() -> None:
    output = _output(include_stop=True)
    output.accept(_said(0, *b"ok.", finish=pb.FINISH_STOP))
    assert output.take().text == "ok."


def test_prompt_logprobs_begin_with_none() -> None:
    output = _output()
    message = _said(0, 97)
    message.prompt_logprobs.add(token_id=2, logprob=-1.0, rank=1)
    message.logprobs.add(token_id=97, logprob=-0.5, rank=2, top_token_ids=[98], top_logprobs=[-0.25])
    output.accept(message)
    chunk = output.take()
    assert chunk.prompt_logprobs[0] is None
    assert [entry.token_id for entry in chunk.prompt_logprobs if entry] == [2]
    assert chunk.logprobs[0].top == ((98, -0.25),)


@settings(deadline=None, derandomize=True)
@given(
    text=st.text("ab€\n", max_size=12),
    stops=st.lists(st.text("ab€", min_size=1, max_size=3), max_size=2),
    cuts=st.sets(st.integers(1, 40), max_size=8),
)
def test_a_client_that_comes_back_gets_exactly_the_rest(text: str, stops: list[str], cuts: set[int]) -> None:
    data = [*text.encode(), EOS]
    output = _output(*stops)
    shown: list[tuple[int, str]] = []  # tokens held, and the text that came with them
    edges = sorted({0, len(data)} | {cut for cut in cuts if cut < len(data)})
    for start, end in itertools.pairwise(edges):
        finish = pb.FINISH_STOP if end == len(data) else pb.FINISH_UNSPECIFIED
        output.accept(_said(start, *data[start:end], finish=finish))
        shown.append((len(output.token_ids), output.take().text))
        if output.finish is not None:
            break
    whole = "".join(part for _, part in shown)
    before_end = shown[:-1]
    for num_held, _ in [(0, ""), *before_end]:
        had = "".join(part for tokens, part in before_end if tokens <= num_held)
        output.rewind(num_held)
        rest = output.take()
        assert rest.position == num_held
        assert had + rest.text == whole
