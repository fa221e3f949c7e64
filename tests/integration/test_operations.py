"""`shoal scale`, `rollout` and `drain` under a load of plain clients: no request fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
import pytest

from protos.shoal.v1 import inference_pb2 as pb
from protos.shoal.v1 import inference_pb2_grpc
from tests.checkpoints import tiny_llama
from tests.integration.served import Served, eventually, run_shoal, serving

pytestmark = pytest.mark.timeout(300)


@dataclass
class _Load:
    """Streams in threads, one after the other on each, that neither retry nor resume."""

    port: int
    think_s: float  # between two of a thread
    num_done: int = 0
    errors: list[str] = field(default_factory=list)
    longest_wait_s: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        request = pb.GenerateRequest(text="over and over", sampling=pb.SamplingParams(max_tokens=150, ignore_eos=True))
        with grpc.insecure_channel(f"127.0.0.1:{self.port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            while not self.stop.is_set():
                position, last_s = 0, time.monotonic()
                try:
                    for chunk in stub.Generate(request, timeout=120):
                        assert chunk.position == position
                        position += len(chunk.token_ids)
                        self.longest_wait_s = max(self.longest_wait_s, time.monotonic() - last_s)
                        last_s = time.monotonic()
                    assert position == 150
                    self.num_done += 1
                    self.stop.wait(self.think_s)
                except (grpc.RpcError, AssertionError) as error:
                    self.errors.append(str(error))


@contextmanager
def _under_load(served: Served, num_streams: int = 3, think_s: float = 0.0) -> Iterator[_Load]:
    load = _Load(served.port, think_s)
    threads = [threading.Thread(target=load.run) for _ in range(num_streams)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        load.stop.set()
        for thread in threads:
            thread.join()


def test_engines_come_and_go_and_no_request_fails(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tiny", max_position_embeddings=2048)
    newer = tiny_llama(tmp_path / "newer", max_position_embeddings=2048)
    config = tmp_path / "newer.yaml"
    config.write_text(f"model: {{path: {newer}}}\nresources: {{cache_size: 16MiB}}\n")
    with serving(model) as served:
        at = ["--address", f"127.0.0.1:{served.port}"]
        with _under_load(served, think_s=0.3) as load:
            up = run_shoal("scale", "2", *at)
            assert up.returncode == 0, up.stdout + up.stderr + served.output
            assert [engine.name for engine in served.status().engines] == ["engine-0", "engine-1"]
            full = run_shoal("scale", "3", *at)
            assert full.returncode == 1
            assert "cluster.max_engines" in full.stderr
            _check_the_roster_is_survived(served, at)
            down = run_shoal("drain", "engine-0", "--timeout-s", "1", *at)
            assert down.returncode == 0, down.stdout + down.stderr
            rollout = ("rollout", str(config), "--version", "2", "--watch-s", "2", "--max-slowdown", "50", *at)
            killer = threading.Thread(target=_kill_while_it_rolls, args=(served,))
            killer.start()
            new = run_shoal(*rollout)
            killer.join()
            assert new.returncode == 0, new.stdout + new.stderr + served.output
            assert "version 2 serves alone" in new.stdout, "its news go on behind the roster's death"
            (engine,) = served.status().engines
            assert (engine.version, engine.state) == ("2", "ready")
        assert load.errors == []
        assert load.num_done > 0
        last = run_shoal("drain", engine.name, *at)
        assert last.returncode == 1
        assert "--force" in last.stderr
        wrong = run_shoal("rollout", str(_other_tokenizer(tmp_path, model)), "--version", "3", *at)
        assert wrong.returncode == 1
        assert "tokenizer" in wrong.stderr
        served.interrupt()
        assert served.process.wait(timeout=60) == 0
        served.expect_nothing_left()


def test_engines_follow_the_load(tmp_path: Path) -> None:
    """Of three streams two wait, until there is another engine; of one none does, and it goes again."""
    model = tiny_llama(tmp_path / "tiny", max_position_embeddings=2048)
    limits = "least: 1, most: 2, most_waiting: 0.5, up_after_s: 0.5, down_after_s: 2.0, pause_s: 1.0"
    with serving(model, config=f"inference: {{max_batch_size: 1}}\ncluster: {{autoscale: {{{limits}}}}}") as served:
        with _under_load(served) as many:
            eventually(lambda: _states(served) == ["ready", "ready"], "another engine", timeout_s=120)
        with _under_load(served, 1) as few:
            eventually(lambda: _states(served) == ["ready"], "it has gone", timeout_s=60)
        assert many.errors + few.errors == []
        assert min(many.num_done, few.num_done) > 0


def _states(served: Served) -> list[str]:
    return [engine.state for engine in served.status().engines]


def _pids(served: Served, name: str) -> list[int]:
    """Ray names the processes of its actors after them, and after what they are doing."""
    found = []
    for process in served.note_processes():
        with suppress(psutil.Error):  # it has ended
            if "".join(process.cmdline()[:1]).partition(".")[0] == f"ray::{name}":
                found.append(process.pid)
    return found


def _kill(served: Served, name: str) -> None:
    """And waits until Ray has started another."""
    eventually(lambda: len(_pids(served, name)) == 1, f"a {name}")
    (pid,) = _pids(served, name)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: bool(set(_pids(served, name)) - {pid}), f"another {name}")


def _check_the_roster_is_survived(served: Served, at: list[str]) -> None:
    """What was drained stays so, and what was not does not."""
    out = run_shoal("drain", "engine-1/rank-0", "--timeout-s", "1", *at)
    assert out.returncode == 0, out.stdout + out.stderr
    _kill(served, "RosterActor")

    def draining() -> list[bool]:
        return [engine.draining for engine in served.status().engines]

    eventually(lambda: len(draining()) == 2, "both engines report themselves")
    assert draining() == [False, True]
    back = run_shoal("drain", "engine-1/rank-0", "--undo", *at)
    assert back.returncode == 0, back.stdout + back.stderr
    eventually(lambda: draining() == [False, False], "the group takes requests")


def _kill_while_it_rolls(served: Served) -> None:
    """Serve's controller as the new engine is being placed, the roster a little later."""
    eventually(lambda: "(version 2)" in served.output, "a new engine is started")
    _kill(served, "ServeController")
    _kill(served, "RosterActor")


def _other_tokenizer(folder: Path, model: Path) -> Path:
    """A configuration that names a model with another tokenizer."""
    other = folder / "other"
    other.mkdir()
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    config = folder / "other.yaml"
    config.write_text(f"model: {{path: {other}}}\n")
    return config
