"""`shoal serve` under fire: two engines, two front doors, and processes that are killed while they stream."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from protos.shoal.v1 import inference_pb2, inference_pb2_grpc
from tests.checkpoints import tiny_llama
from tests.integration.served import Served, collect, eventually, serving

pytestmark = pytest.mark.timeout(240)

PROMPT = "The quick brown fox"
NUM_TOKENS = 3000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def pair(model: Path) -> Iterator[Served]:
    with serving(model, "--engines", "2", "--front-doors", "2") as server:
        yield server


def heads(served: Served) -> list[psutil.Process]:
    """Ray's GCS, whoever started it."""
    found = []
    for process in served.note_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "gcs_server" and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def busy_engine(served: Served) -> tuple[str, int]:
    """The engine that runs a sequence, and its rank's process."""
    found: list[tuple[str, int]] = []

    def runs() -> bool:
        for engine in served.status().engines:
            if any(group.num_running for group in engine.dp_groups):
                found.append((engine.name, engine.ranks[0].pid))
        return bool(found)

    eventually(runs, "an engine runs something")
    return found[0]


def all_ready(served: Served, *, newer_than: dict[str, int]) -> bool:
    engines = served.status().engines
    return len(engines) == len(newer_than) and all(
        engine.state == "ready" and engine.generation >= newer_than[engine.name] for engine in engines
    )


def test_two_engines_and_two_front_doors_work(pair: Served) -> None:
    status = pair.status()
    assert [engine.name for engine in status.engines] == ["engine-0", "engine-1"]
    assert len({engine.ranks[0].pid for engine in status.engines}) == 2
    assert [sorted(door.dp_groups) for door in status.front_doors] == [["engine-0/0", "engine-1/0"]] * 2
    assert pair.tokens(PROMPT, max_tokens=8) == pair.tokens(PROMPT, max_tokens=8)


def test_a_killed_rank_is_a_pause_and_no_more(pair: Served) -> None:
    expected = pair.tokens(PROMPT, max_tokens=NUM_TOKENS)
    generations = {engine.name: engine.generation for engine in pair.status().engines}
    stream = pair.stream(PROMPT, max_tokens=NUM_TOKENS)
    first = next(stream)
    engine, pid = busy_engine(pair)
    pair.note_processes()
    os.kill(pid, signal.SIGKILL)
    tokens = [*first.token_ids]
    for chunk in stream:
        assert chunk.position == len(tokens), "nothing repeated, nothing skipped"
        tokens.extend(chunk.token_ids)
    assert tokens == expected
    newer = {**generations, engine: generations[engine] + 1}
    eventually(lambda: all_ready(pair, newer_than=newer), "the engine is back in a new generation")


def test_a_killed_front_door_is_back(pair: Served) -> None:
    pair.note_processes()
    replicas = [process for process in processes(pair) if is_called(process, "ServeReplica:shoal:FrontDoor")]
    assert len(replicas) == 2
    before = {door.id for door in pair.status().front_doors}
    replicas[0].kill()
    broken: list[str] = []
    give_up_s = time.monotonic() + 60
    while time.monotonic() < give_up_s:
        # A connection of its own each time: those of the dead front door are gone.
        try:
            with fresh(pair) as channel:
                request = inference_pb2.GenerateRequest(text=PROMPT)
                request.sampling.max_tokens = 2
                collect(iter(inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=30)))
                doors = {door.id for door in pair.status().front_doors}
        except grpc.RpcError as error:
            broken.append(str(error))
            continue
        if len(doors) == 2 and doors != before:
            break
    assert len(doors) == 2, "Serve started another"
    assert doors != before
    assert len(broken) <= 2, f"the other one went on, and the new one knew the groups when it opened: {broken}"


def test_a_killed_leader_and_a_killed_roster_cost_nothing(pair: Served) -> None:
    eventually(lambda: all_ready(pair, newer_than={"engine-0": 1, "engine-1": 1}), "both engines")
    before = {engine.name: (engine.generation, engine.ranks[0].pid) for engine in pair.status().engines}
    expected = pair.tokens(PROMPT, max_tokens=NUM_TOKENS)
    stream = pair.stream(PROMPT, max_tokens=NUM_TOKENS)
    first = next(stream)
    killed = [process for process in processes(pair) if is_called(process, "ServeReplica:shoal-engine-", "RosterActor")]
    assert len(killed) == 3
    for process in killed:
        process.kill()
    rest = [token for chunk in stream for token in chunk.token_ids]
    assert [*first.token_ids, *rest] == expected
    eventually(lambda: len(pair.status().front_doors) == 2, "the roster is back and knows everything")
    eventually(lambda: all_ready(pair, newer_than={"engine-0": 1, "engine-1": 1}), "new leaders lead")
    after = {engine.name: (engine.generation, engine.ranks[0].pid) for engine in pair.status().engines}
    assert after == before, "the ranks were taken over as they were"


def test_a_killed_head_is_back_and_nobody_else_ends(pair: Served) -> None:
    eventually(lambda: all_ready(pair, newer_than={"engine-0": 1, "engine-1": 1}), "both engines")
    before = {engine.name: (engine.generation, engine.ranks[0].pid) for engine in pair.status().engines}
    expected = pair.tokens(PROMPT, max_tokens=NUM_TOKENS)
    stream = pair.stream(PROMPT, max_tokens=NUM_TOKENS)
    first = next(stream)
    (head,) = heads(pair)
    head.kill()
    assert [*first.token_ids, *(token for chunk in stream for token in chunk.token_ids)] == expected
    eventually(lambda: [one for one in heads(pair) if one.pid != head.pid] != [], "there is another")
    assert {engine.name: (engine.generation, engine.ranks[0].pid) for engine in pair.status().engines} == before
    pair.note_processes()
    os.kill(before["engine-0"][1], signal.SIGKILL)
    newer = {"engine-0": before["engine-0"][0] + 1, "engine-1": before["engine-1"][0]}
    eventually(lambda: all_ready(pair, newer_than=newer), "a rank that dies afterwards is started again")
    assert pair.tokens(PROMPT, max_tokens=NUM_TOKENS) == expected


def test_a_killed_command_leaves_nothing(pair: Served) -> None:
    pair.note_processes()
    pair.process.kill()
    pair.process.wait()
    pair.expect_nothing_left()


def test_tensor_parallel_ranks_die_and_come_back_together(model: Path, pair_tokens: list[int]) -> None:
    with serving(model, "--tensor", "2") as served:
        (engine,) = served.status().engines
        assert len(engine.ranks) == 2
        assert engine.collectives
        assert served.tokens(PROMPT, max_tokens=16) == pair_tokens[:16]
        stream = served.stream(PROMPT, max_tokens=300)
        first = next(stream)
        served.note_processes()
        os.kill(engine.ranks[1].pid, signal.SIGKILL)
        rest = [token for chunk in stream for token in chunk.token_ids]
        assert [*first.token_ids, *rest] == served.tokens(PROMPT, max_tokens=300)
        eventually(lambda: served.status().engines[0].generation == 2, "both ranks were started again")
        # Twice Ctrl-C does not wait for an open request.
        endless = served.stream(PROMPT, max_tokens=2 * NUM_TOKENS)
        next(endless)
        served.interrupt()
        eventually(lambda: "draining" in served.output, "draining")
        time.sleep(0.6)  # sooner, it would count as the same wish
        served.interrupt()
        served.process.wait(timeout=40)
        with pytest.raises(grpc.RpcError):
            list(endless)
        served.expect_nothing_left()


@pytest.fixture(scope="module")
def pair_tokens(model: Path) -> list[int]:
    """What transformers says to the prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = oracle.generate(**inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    return [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]


def processes(served: Served) -> list[psutil.Process]:
    return psutil.Process(served.process.pid).children(recursive=True)


def is_called(process: psutil.Process, *names: str) -> bool:
    return any(name in " ".join(process.cmdline()) for name in names)


def fresh(served: Served) -> grpc.Channel:
    return grpc.insecure_channel(f"127.0.0.1:{served.port}", [("grpc.use_local_subchannel_pool", 1)])
