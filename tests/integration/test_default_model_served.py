"""The default model in fp32, served over gRPC, says what transformers says: one rank and three, alone and crowded."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from cluster.config.environment import cache_folder
from cluster.models import catalog, registry
from tests.integration.served import Served, serving
from workers.assemble import assemble
from workers.inputs import StepInputs
from workers.parallel.collectives import SingleRank
from workers.parallel.plan import ParallelPlan
from workers.settings import EngineSettings

pytestmark = pytest.mark.timeout(600)

NUM_TOKENS = 64
SUBJECTS = (
    "the sea",
    "a small town",
    "bread",
    "the moon",
    "a lost dog",
    "mathematics",
    "rain",
    "an old king",
    "trains",
    "ink",
)
OPENINGS = ("Write a short story about {}.\n", "The most important thing to know about {} is")
PROMPTS = [opening.format(subject) for opening in OPENINGS for subject in SUBJECTS]
# Small chunks, so that most prompts need several steps while others decode.
CHUNKED = (
    "inference: {dtype: float32, max_batch_tokens: 40, max_batch_size: 32, max_model_len: 512}\n"
    "resources: {cache_size: 128MiB}\n"
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return catalog.pull(registry.DEFAULT, cache_folder())


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def expected(folder: Path, oracle: Any) -> list[list[int]]:
    """Of all prompts at once, which takes transformers a tenth of the time; shorter ones are filled up in front."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    width = max(map(len, prompts))
    answers = oracle.generate(
        torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        pad_token_id=0,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
    )
    return [answer[width:].tolist() for answer in answers]


def test_logits_are_those_of_transformers(folder: Path, oracle: Any) -> None:
    for ours, wanted in _logits(folder, "float32", oracle):
        assert (ours - wanted).abs().max() <= 1e-4


def test_bfloat16_is_closer_to_the_truth_than_that_of_transformers(folder: Path, oracle: Any) -> None:
    """The residual is in fp32, so that what a layer adds is not rounded to what all before it have summed up to."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    exact = [wanted for _, wanted in _logits(folder, "float32", oracle)]
    found = list(_logits(folder, "bfloat16", theirs))
    ours = torch.cat([ours - true for (ours, _), true in zip(found, exact, strict=True)])
    rounded = torch.cat([rounded - true for (_, rounded), true in zip(found, exact, strict=True)])
    print(
        f"root mean square error: ours {ours.square().mean().sqrt():.4f}, theirs {rounded.square().mean().sqrt():.4f}"
    )
    assert ours.square().mean() <= 0.5 * rounded.square().mean()


def _logits(folder: Path, dtype: str, oracle: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Those of some prompts, and the oracle's."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = EngineSettings(
        engine="e",
        model_name="m",
        model_path=str(folder),
        plan=ParallelPlan(),
        dtype=dtype,
        device="cpu",
        max_model_len=256,
        cache_bytes=64 << 20,
    )
    runner = assemble(settings, settings.plan.place(0), SingleRank())
    for prompt in PROMPTS[::5]:
        ids = tokenizer.encode(prompt).ids
        inputs = StepInputs.from_proto(_whole_prompt(ids, settings.block_size))
        logits = runner.forward(inputs)
        assert logits is not None
        with torch.inference_mode():
            yield logits, oracle(torch.tensor([ids])).logits[0].float()


def _whole_prompt(ids: list[int], block_size: int) -> Any:
    from protos.shoal.v1 import session_pb2

    blocks = range(-(-len(ids) // block_size))
    return session_pb2.StepPlan(
        generation=1,
        step=1,
        token_ids=ids,
        num_tokens=[len(ids)],
        num_computed=[0],
        block_ids=blocks,
        num_blocks=[len(blocks)],
        num_logits=[len(ids)],
    )


@pytest.fixture(scope="module", params=[1, 3], ids=["tensor 1", "tensor 3"])
def served(request: pytest.FixtureRequest, folder: Path) -> Iterator[Served]:
    with serving(folder, "--tensor", str(request.param), config=CHUNKED, cache=None) as server:
        yield server


def test_alone(served: Served, expected: list[list[int]]) -> None:
    tokens = served.tokens(PROMPTS[-1], max_tokens=NUM_TOKENS, ignore_eos=False, min_tokens=NUM_TOKENS)
    assert tokens == expected[-1]


def test_in_a_crowd_with_random_arrivals(served: Served, expected: list[list[int]]) -> None:
    """Thirty-two at once, with every prompt; each begins when a random number of tokens of the others have come."""
    draw = random.Random(3)
    order = [*range(len(PROMPTS)), *(draw.randrange(len(PROMPTS)) for _ in range(32 - len(PROMPTS)))]
    draw.shuffle(order)
    come = threading.Semaphore(8)  # the first eight begin at once; every few tokens let another one in

    def one(number: int) -> list[int]:
        come.acquire()
        tokens: list[int] = []
        stream = served.stream(PROMPTS[order[number]], max_tokens=NUM_TOKENS, ignore_eos=False, min_tokens=NUM_TOKENS)
        for chunk in stream:
            tokens.extend(chunk.token_ids)
            if draw.random() < 0.2:
                come.release()
        come.release()
        return tokens

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(one, range(32)))
    for number, tokens in enumerate(found):
        assert tokens == expected[order[number]], PROMPTS[order[number]]
