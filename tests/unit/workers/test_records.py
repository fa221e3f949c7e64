"""What a group remembers of sequences, and for how long."""

from __future__ import annotations

from collections.abc import Sequence

from protos.shoal.v1 import session_pb2 as pb
from workers.records import Record, Records


class _Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _submit(
    sequence_id: int = 1,
    *,
    request_id: str = "r",
    index: int = 0,
    opened: int = 7,
    output_token_ids: Sequence[int] = (),
) -> pb.Submit:
    return pb.Submit(
        sequence_id=sequence_id,
        request_id=request_id,
        prompt_token_ids=[1, 2],
        output_token_ids=output_token_ids,
        origin=pb.Origin(client="alice", index=index, n=2, opened_unix_ns=opened),
    )


def _said(record: Record, position: int, *token_ids: int, finish: pb.Finish.ValueType = pb.FINISH_UNSPECIFIED) -> None:
    record.see(
        pb.SequenceOutput(position=position, token_ids=token_ids, finish=finish, num_cached_tokens=2 * (position == 0))
    )


def test_a_running_sequence_is_found_with_all_it_has_said() -> None:
    records = Records(_Clock(), keep_s=10)
    record = records.begin(_submit(), (3, 1))
    _said(record, 0, 5)
    _said(record, 1, 6, 7)
    (found,) = records.find("alice", "r")
    message = found.message()
    assert found.owner == (3, 1)
    assert (message.output.position, list(message.output.token_ids)) == (0, [5, 6, 7])
    assert message.output.num_cached_tokens == 2
    assert not message.output.finish
    assert records.find("bob", "r") == []
    assert records.find("alice", "other") == []


def test_an_end_is_told_and_a_failure_is_none() -> None:
    records = Records(_Clock(), keep_s=10)
    ended, failed = records.begin(_submit(index=0), (1, 1)), records.begin(_submit(2, index=1), (1, 2))
    ended.see(pb.SequenceOutput(token_ids=[5], finish=pb.FINISH_STOP, stop_token_id=5))
    failed.see(pb.SequenceOutput(finish=pb.FINISH_FAILED))
    records.keep(ended)
    records.keep(failed)
    first, second = (record.message().output for record in records.find("alice", "r"))
    assert (first.finish, first.stop_token_id) == (pb.FINISH_STOP, 5)
    assert second.finish == pb.FINISH_UNSPECIFIED, "another group can go on with it"


def test_what_has_ended_is_forgotten_in_time() -> None:
    clock = _Clock()
    records = Records(clock, keep_s=10)
    running, ended = records.begin(_submit(request_id="a"), (1, 1)), records.begin(_submit(2, request_id="b"), (1, 2))
    records.keep(ended)
    clock.now_s += 9.9
    assert records.find("alice", "b") == [ended]
    clock.now_s += 0.2
    assert records.find("alice", "b") == []
    assert records.num_kept == 0
    assert records.find("alice", "a") == [running]


def test_the_oldest_go_first_where_there_are_too_many() -> None:
    records = Records(_Clock(), keep_s=10, max_kept=2)
    for number in range(3):
        records.keep(records.begin(_submit(number, request_id=str(number)), (1, number)))
    assert [bool(records.find("alice", str(number))) for number in range(3)] == [False, True, True]
    by_tokens = Records(_Clock(), keep_s=10, max_kept_tokens=5)  # each has two
    for number in range(3):
        by_tokens.keep(by_tokens.begin(_submit(number, request_id=str(number)), (1, number)))
    assert [bool(by_tokens.find("alice", str(number))) for number in range(3)] == [False, True, True]


def test_a_later_attempt_takes_the_place_of_an_ended_one() -> None:
    records = Records(_Clock(), keep_s=10)
    first = records.begin(_submit(), (1, 1))
    records.keep(first)
    second = records.begin(_submit(2, output_token_ids=[5]), (2, 2))
    assert records.find("alice", "r") == [second]
    assert records.num_kept == 0


def test_a_name_that_is_used_again_means_the_newer_request() -> None:
    records = Records(_Clock(), keep_s=10)
    records.keep(records.begin(_submit(opened=1), (1, 1)))
    newer = records.begin(_submit(2, opened=2), (1, 2))
    assert records.find("alice", "r") == [newer]


def test_what_is_dropped_is_gone() -> None:
    records = Records(_Clock(), keep_s=10)
    running = records.begin(_submit(), (1, 1))
    records.drop(running)
    kept = records.begin(_submit(), (1, 1))
    records.keep(kept)
    records.drop(kept)
    records.drop(kept)
    assert records.find("alice", "r") == []
    assert records.num_kept == 0
