"""Every plan through `shoal serve` and its gRPC door: transformers' greedy tokens, and the samples of one rank.

One server for all of them: each plan is rolled out over the one before it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from protos.shoal.v1 import admin_pb2, admin_pb2_grpc
from protos.shoal.v1 import inference_pb2 as pb
from tests.checkpoints import tiny_deepseek
from tests.integration.served import Served, eventually, run_shoal, serving

pytestmark = pytest.mark.timeout(240)

# The last one takes three chunks of prefill, beside the others.
LONG = "the time of day in the house by the sea " * 6
TEXTS = ("A shoal is", "The quick brown fox jumps over", "house by the sea", LONG)
NUM_TOKENS = 12
CHUNK = 24
GUIDED = pb.GuidedDecoding(regex="[a-z]{3,8}( [a-z]{3,8}){2}")
CONFIG = f"inference: {{dtype: float32, max_batch_tokens: {CHUNK}, max_model_len: 256}}\n"
CACHE = "resources: {cache_size: 8MiB, cpu_threads: 1}\n"
PLANS = {
    "tp 2": {"tensor": 2},
    "tp 4": {"tensor": 4},
    "dp 2, experts over 2": {"data": 2},
    "dp 4, experts over 4": {"data": 4},
    "pp 2": {"pipeline": 2},
    "dp 2 x tp 2, redundant experts": {"data": 2, "tensor": 2, "redundant_experts": 4},
    "pp 2 x dp 2": {"pipeline": 2, "data": 2},  # the last one: a test below goes on with it
}
STAGES = [*PLANS][-1]
STAGES_CONFIG = CONFIG.replace(
    "{", "{deterministic: true, expert_balance: {interval_s: 1, threshold: 1.0}, record_routing: FOLDER, ", 1
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the choices of experts go of the plan with stages and several groups."""
    return tmp_path_factory.mktemp("routing")


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    """Begins with one rank; there is room for two engines of four."""
    config = f"{CONFIG}cluster: {{max_engines: 8}}\n"
    with serving(model, config=config, cache=CACHE) as server:
        yield server


@pytest.fixture(scope="module")
def greedy(model: Path) -> list[list[int]]:
    """What transformers says, reading everything anew for every token."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = []
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        with torch.inference_mode():
            for _ in range(NUM_TOKENS):
                ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[-NUM_TOKENS:])
    assert len(ids) > 2 * CHUNK + NUM_TOKENS
    return found


@pytest.fixture(scope="module")
def sampled(served: Served, greedy: list[list[int]]) -> list[list[int]]:
    """What one rank draws; asked for before any plan is rolled out."""
    assert served.status().engines[0].plan == "data 1 x pipeline 1 x tensor 1"
    check_greedy(served, greedy)
    return samples(served)


def check_greedy(served: Served, expected: list[list[int]]) -> None:
    """All at once, and twice: the second time most of each prompt is in a prefix cache."""
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        for _ in range(2):
            found = pool.map(lambda text: served.tokens(text, max_tokens=NUM_TOKENS), TEXTS)
            assert list(found) == expected


def samples(served: Served) -> list[list[int]]:
    """Three choices of each text, and of a guided one."""

    def ask(text: str, guided: pb.GuidedDecoding | None = None) -> list[list[int]]:
        params = pb.SamplingParams(
            temperature=1.0, top_p=0.9, seed=11, n=3, max_tokens=NUM_TOKENS, ignore_eos=True, guided=guided
        )
        answer = served.inference.GenerateOnce(pb.GenerateRequest(text=text, sampling=params), timeout=120)
        return [list(choice.token_ids) for choice in answer.choices]

    with ThreadPoolExecutor(len(TEXTS) + 1) as pool:
        asked = [pool.submit(ask, text) for text in TEXTS]
        asked.append(pool.submit(ask, TEXTS[0], GUIDED))
        found = [choice for one in asked for choice in one.result()]
    assert len(found) == 3 * (len(TEXTS) + 1)
    assert len(set(map(tuple, found))) > len(TEXTS), "choices have noise of their own"
    return found


def roll_out(served: Served, model: Path, recording: Path, name: str, plan: dict[str, int]) -> None:
    """The last one gives the same bits in any batch, wherever its experts have gone."""
    config = STAGES_CONFIG.replace("FOLDER", str(recording)) if name == STAGES else CONFIG
    order = admin_pb2.RolloutRequest(
        config=f"model: {{path: {model}}}\nparallel: {json.dumps(plan)}\n{config}{CACHE}",
        strategy="blue-green",
        version=name,
        watch_s=0.0,
    )
    events = list(admin_pb2_grpc.AdminStub(served.channel).Rollout(order, timeout=120))
    served.note_processes()
    assert events[-1].state == admin_pb2.OperationEvent.STATE_DONE, [event.line for event in events]


@pytest.mark.parametrize(("name", "plan"), PLANS.items(), ids=PLANS)
def test_a_plan_says_what_transformers_says(
    served: Served,
    model: Path,
    recording: Path,
    greedy: list[list[int]],
    sampled: list[list[int]],
    name: str,
    plan: dict[str, int],
) -> None:
    roll_out(served, model, recording, name, plan)
    (engine,) = served.status().engines
    whole = {axis: plan.get(axis, 1) for axis in ("data", "pipeline", "tensor")}
    text = " x ".join(f"{axis} {size}" for axis, size in whole.items())
    if redundant := plan.get("redundant_experts"):
        text += f" + {redundant} redundant experts"
    assert (engine.version, engine.plan) == (name, text)
    check_greedy(served, greedy)
    assert samples(served) == sampled


def test_streams_go_on_where_a_stage_is_killed(
    served: Served, model: Path, recording: Path, sampled: list[list[int]]
) -> None:
    """Its group goes, and what it had open is replayed; the other goes on with what it holds, and steps in flight are
    begun again: nothing is lost, repeated or another bit. Experts move meanwhile."""
    if served.status().engines[0].version != STAGES:
        roll_out(served, model, recording, STAGES, PLANS[STAGES])
    (before,) = served.status().engines
    begun = threading.Semaphore(0)

    def read(number: int) -> list[int]:
        drawn = {"temperature": float(number % 2), "seed": number, "max_tokens": 200}
        tokens: list[int] = []
        for chunk in served.stream(TEXTS[number % 3], **drawn):
            assert chunk.position == len(tokens), "nothing repeated, nothing skipped"
            tokens.extend(chunk.token_ids)
            begun.release()
        return tokens

    with ThreadPoolExecutor(6) as pool:
        expected = [one.result() for one in [pool.submit(read, number) for number in range(6)]]
        assert all(len(tokens) == 200 for tokens in expected)
        begun = threading.Semaphore(0)
        reading = [pool.submit(read, number) for number in range(6)]
        for _ in range(18):
            assert begun.acquire(timeout=60)
        served.note_processes()
        os.kill(before.ranks[3].pid, signal.SIGKILL)
        assert not all(one.done() for one in reading), "it was in the middle of them"
        assert [one.result() for one in reading] == expected

    def back() -> bool:
        engine = served.status().engines[0]
        return engine.state == "ready" and len(engine.ranks) == 4 and engine.generation >= before.generation + 2

    eventually(back, "the lost group is back", timeout_s=120)
    (after,) = served.status().engines
    served.note_processes()
    pids, new_pids = ({rank.rank: rank.pid for rank in engine.ranks} for engine in (before, after))
    assert [rank for rank in pids if new_pids[rank] == pids[rank]] == [0, 1], "nobody else started again"
    assert (after.num_restarts, after.num_regroups >= 2) == (0, True)
    assert after.last_regroup_s > 0
    assert samples(served) == sampled


def test_experts_of_stages_move_and_their_routing_is_on_file(
    served: Served, recording: Path, sampled: list[list[int]]
) -> None:
    """While samples are drawn that are the same ones."""

    def engine() -> admin_pb2.EngineStatus:
        return served.status().engines[0]

    assert engine().version == STAGES

    def moved() -> bool:
        assert samples(served) == sampled
        return engine().expert_epoch >= 2

    eventually(moved, "experts have moved")
    assert engine().expert_imbalance > 0
    assert sum(rank.expert_tokens > 0 for rank in engine().ranks) >= 3, "what each rank of each stage carries is told"
    eventually(lambda: {0, 1, 2, 3} == _recorded(recording), "each rank writes its layers' choices")
    tried = run_shoal("plan-experts", str(recording), "--ranks", "2", "--redundant", "2")
    assert tried.returncode == 0, tried.stderr
    assert " expert choices in 2 layers" in tried.stdout
    assert tried.stdout.count(" | ") == 3, "each stage's ranks, for each placement"


def _recorded(recording: Path) -> set[int]:
    """The ranks that have written."""
    return {int(path.stem.rpartition("-")[2]) for path in recording.glob("*.npz")}
