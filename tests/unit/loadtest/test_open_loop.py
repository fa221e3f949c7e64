"""The open loop: a server that stalls must show in the latencies of everyone who meant to ask meanwhile."""

from __future__ import annotations

import asyncio
import time

from loadtest.client import open_loop
from loadtest.record import Recorder, RequestRecord
from loadtest.stats import summarize
from loadtest.workload import Work
from tests.unit.loadtest import virtual_time

WORK = Work(prompt=(1,), num_output_tokens=1)


class _StallingServer:
    """Answers one request after another in 1 ms each, but stands still between 1 s and 3 s."""

    def __init__(self) -> None:
        self._busy = asyncio.Lock()
        self.now = asyncio.get_running_loop().time

    async def generate(self, work: Work, intended_s: float) -> RequestRecord:
        recorder = Recorder("fake", work, intended_s, self.now)
        async with self._busy:
            if 1.0 <= self.now() < 3.0:
                await asyncio.sleep(3.0 - self.now())
            await asyncio.sleep(0.001)
        recorder.tokens(1, position=0)
        recorder.finish_reason()
        return recorder.close()


def test_a_stall_shows_in_the_latency_of_all_who_waited_for_it() -> None:
    async def main() -> list[RequestRecord]:
        server = _StallingServer()
        offsets_s = [index / 10 for index in range(40)]
        return await open_loop(server.generate, [WORK] * 40, offsets_s, clock=server.now)

    records = virtual_time.run(main())
    assert [record.intended_s for record in records] == [index / 10 for index in range(40)]
    assert all(record.sent_s == record.intended_s for record in records), "sending must not wait for answers"
    waited = [record for record in records if record.e2e_s > 0.09]
    assert len(waited) == 20, "each request meant for the two seconds of the stall"
    ttft = summarize(records).ttft
    assert ttft is not None
    assert 0.4 < ttft.mean < 0.6, "half the requests waited a second on average"
    assert ttft.max > 1.9


def test_latency_counts_from_the_intended_time_when_the_client_itself_is_late() -> None:
    async def main() -> list[RequestRecord]:
        loop = asyncio.get_running_loop()

        async def send_late(work: Work, intended_s: float) -> RequestRecord:
            await asyncio.sleep(0.5)
            recorder = Recorder("fake", work, intended_s, loop.time)
            await asyncio.sleep(0.25)
            recorder.tokens(1, position=0)
            recorder.finish_reason()
            return recorder.close()

        return await open_loop(send_late, [WORK], [1.0], clock=loop.time)

    (record,) = virtual_time.run(main())
    assert record.send_delay_s == 0.5
    assert record.ttft_s == record.e2e_s == 0.75


def test_work_or_offsets_may_run_out_first() -> None:
    async def main(num_work: int, num_offsets: int) -> int:
        server = _StallingServer()
        return len(await open_loop(server.generate, [WORK] * num_work, [0.0] * num_offsets, clock=server.now))

    assert virtual_time.run(main(2, 5)) == 2
    assert virtual_time.run(main(5, 2)) == 2


def test_every_record_is_reported_as_it_ends() -> None:
    seen: list[RequestRecord] = []

    async def main() -> list[RequestRecord]:
        server = _StallingServer()
        return await open_loop(server.generate, [WORK] * 3, [0.0] * 3, clock=server.now, on_record=seen.append)

    assert virtual_time.run(main()) == seen


def test_virtual_time_does_not_pass_for_real() -> None:
    started_s = time.perf_counter()
    virtual_time.run(asyncio.sleep(3600))
    assert time.perf_counter() - started_s < 5
