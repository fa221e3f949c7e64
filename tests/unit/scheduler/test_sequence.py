"""The states of a sequence, and the rows of logits it asks for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import scheduler
from scheduler.sequence import TRANSITIONS, Sequence, State, Trigger
from tests.unit.scheduler.harness import request


def open_sequence(prompt: int = 5, **changes: Any) -> Sequence:
    return Sequence.open(request("a", prompt, **changes), order=(0,), max_output_tokens=16)


@pytest.mark.parametrize(("state", "trigger"), list(itertools.product(State, Trigger)))
def test_every_pair_moves_by_the_table_or_is_a_mistake(state: State, trigger: Trigger) -> None:
    sequence = open_sequence()
    sequence.state = state
    if (state, trigger) in TRANSITIONS:
        sequence.apply(trigger)
        assert sequence.state is TRANSITIONS[state, trigger]
    else:
        with pytest.raises(AssertionError, match=state.name):
            sequence.apply(trigger)
        assert sequence.state is state


def test_every_state_but_the_last_leads_to_the_end() -> None:
    assert not [pair for pair in TRANSITIONS if pair[0] is State.FINISHED]
    leads = {State.FINISHED}
    for _ in State:
        leads |= {state for (state, _), after in TRANSITIONS.items() if after in leads}
    assert leads == set(State)


def test_a_plain_prompt_needs_logits_for_its_last_token_only() -> None:
    sequence = open_sequence(5)
    assert [sequence.num_logits(n) for n in (1, 4, 5)] == [0, 0, 1]


def test_prompt_logprobs_need_every_row_that_was_not_delivered() -> None:
    sequence = open_sequence(6, prompt_logprobs=0)
    assert [sequence.num_logits(n) for n in (1, 3, 6)] == [1, 3, 6]
    sequence.num_prompt_predicted = 3  # computed before a preemption
    assert [sequence.num_logits(n) for n in (2, 3, 4, 6)] == [0, 0, 1, 3]
    sequence.num_prompt_predicted = 5
    assert [sequence.num_logits(n) for n in (5, 6)] == [0, 1]


def test_replayed_tokens_mean_that_prompt_logprobs_were_delivered() -> None:
    sequence = open_sequence(5, prompt_logprobs=2, output_token_ids=(7, 8))
    assert sequence.num_logits(4) == 0
    assert sequence.num_logits(7) == 1
    assert sequence.num_output_tokens == 2


def test_stop_tokens_are_forbidden_below_min_tokens() -> None:
    sequence = open_sequence(2, min_tokens=1, stop_token_ids=frozenset({4}), eos_token_ids=frozenset({5}))
    assert sequence.forbidden_token_ids() == {4, 5}
    sequence.token_ids.append(9)
    assert sequence.forbidden_token_ids() == frozenset()


def test_ignored_eos_is_not_forbidden() -> None:
    sequence = open_sequence(2, min_tokens=1, ignore_eos=True, eos_token_ids=frozenset({5}))
    assert sequence.forbidden_token_ids() == frozenset()


def test_the_readme_shows_the_table() -> None:
    readme = Path(scheduler.__path__[0], "README.md").read_text()
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in readme.splitlines() if "|" in line]
    table = {(state.value, trigger.value, after.value) for (state, trigger), after in TRANSITIONS.items()}
    assert {row for row in rows if row[0] in {state.value for state in State}} == table
