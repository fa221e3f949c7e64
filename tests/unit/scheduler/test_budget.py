"""The model of a step's time, and the budget that keeps steps short."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.budget import StepTimeModel, prefill_budget
from tests.unit.scheduler.harness import Bench, request
from tests.unit.scheduler.harness import settings as limits


def observed(fixed_s: float, token_s: float, sizes: list[int], *, noise: float = 0.0, seed: int = 1) -> StepTimeModel:
    rng = random.Random(seed)
    model = StepTimeModel()
    for size in sizes:
        model.observe(size, (fixed_s + token_s * size) * (1.0 + rng.uniform(-noise, noise)))
    return model


@settings(deadline=None, derandomize=True)
@given(
    st.floats(1e-4, 1e-1),
    st.floats(1e-6, 1e-2),
    st.lists(st.sampled_from([1, 16, 64, 300, 2000]), min_size=9, max_size=40),
)
def test_a_line_is_found_exactly(fixed_s: float, token_s: float, sizes: list[int]) -> None:
    model = observed(fixed_s, token_s, [1, 1000, *sizes])
    assert model.ready
    assert model.step_s(500) == pytest.approx(fixed_s + token_s * 500, rel=1e-3)
    assert model.tokens_within(fixed_s + token_s * 500) == pytest.approx(500, rel=1e-3)


def test_noise_and_single_slow_steps_do_not_move_it() -> None:
    rng = random.Random(3)
    sizes = [rng.choice([4, 32, 256, 512]) for _ in range(300)]
    model = observed(0.01, 1e-4, sizes, noise=0.1)
    for size in (4, 4, 512, 256, 256):
        model.observe(size, 5.0)
    assert model.step_s(400) == pytest.approx(0.05, rel=0.1)
    assert model.step_s(1) == pytest.approx(0.01, rel=0.1)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    model = observed(0.01, 1e-4, [1, 8, 64, 512] * 20)
    for _ in range(60):
        for size in (8, 256):
            model.observe(size, 3 * (0.01 + 1e-4 * size))
    assert model.step_s(256) == pytest.approx(3 * (0.01 + 1e-4 * 256), rel=0.15)


@pytest.mark.parametrize("seconds", [[3.0, 1.0], [1.0, 9.0], [1.0, 1.0]])
def test_neither_part_is_ever_negative(seconds: list[float]) -> None:
    model = StepTimeModel()
    model.observe(10, seconds[0])
    model.observe(20, seconds[1])
    assert 0.0 <= model.step_s(0) <= model.step_s(100)


def test_without_data_it_knows_nothing() -> None:
    model = StepTimeModel()
    model.observe(5, 0.0)
    assert (model.ready, model.num_observed, model.step_s(100), model.most_tokens) == (False, 0, 0.0, 0)


def budget(model: StepTimeModel, **changes: float) -> int:
    values = {"num_decodes": 10, "target_step_s": 0.05, "min_chunk_tokens": 32, "max_tokens": 2048}
    return prefill_budget(model, **(values | changes))  # type: ignore[arg-type]


def test_the_budget_keeps_the_step_to_its_target() -> None:
    model = observed(0.01, 1e-4, [10, 400] * 10)
    assert budget(model) in (389, 390)
    assert budget(model, target_step_s=0.0) == 2048
    assert budget(model, num_decodes=1000) == 32
    assert budget(model, target_step_s=0.001) == 32
    assert budget(model, max_tokens=20) == 20


def test_the_budget_grows_by_trial() -> None:
    assert budget(StepTimeModel()) == 32
    model = observed(0.01, 1e-6, [10, 100] * 10)
    assert budget(model) == 190


def step_seconds(num_tokens: int) -> float:
    return 0.010 + 0.0005 * num_tokens


def gaps_while_a_long_prompt_arrives(**changes: float) -> tuple[list[float], float]:
    """Seconds between the tokens of a decoding sequence from the arrival on, and until the prompt's first token."""
    bench = Bench(limits(num_blocks=8192, max_model_len=16384, max_batch_tokens=2048, **changes))
    bench.submit(request("a", 8, max_tokens=2000), *(request(f"warm{n}", 2**n, max_tokens=1) for n in range(9)))

    def step() -> float:
        plan = bench.schedule()
        assert plan is not None
        step_s = step_seconds(plan.num_tokens)
        bench.clock.now_s += step_s
        bench.commit()
        return step_s

    for _ in range(40):
        step()
    bench.submit(request("long", [index % 17 for index in range(8000)], max_tokens=1))
    gaps = []
    while not bench.events["long"]:
        gaps.append(step())
    return gaps, sum(gaps)


def test_a_long_prompt_does_not_stall_the_others() -> None:
    plain, plain_s = gaps_while_a_long_prompt_arrives()
    adapted, adapted_s = gaps_while_a_long_prompt_arrives(target_step_s=0.1)
    assert max(plain) == pytest.approx(step_seconds(2048))
    assert max(adapted) <= 0.105
    assert adapted_s <= 1.2 * plain_s
