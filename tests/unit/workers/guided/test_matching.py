"""Masks against trial, and places that follow from the tokens alone."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.plan import SequenceResult, StepPlan, StepResult
from scheduler.request import Grammar, GrammarKind, SamplingParams
from tests.unit.workers.guided.support import EOS, VOCAB, allowed_ids, compiled, encode, guided, regex, text_of
from tests.unit.workers.sampler.plans import decoding
from workers.guided import Afar, Matching

leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda n: {"type": "integer", "minimum": -n, "maximum": 2 * n}, st.integers(0, 50)),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 6)),
    st.just({"enum": ["red", "grün", 'a "b"', 7, None]}),
    st.just({"type": "string", "pattern": "^[a-c]{1,4}$"}),
)


def _objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(st.sampled_from(["name", "the", "dog", "é", "x y"]), inner, max_size=3)
    return properties.map(
        lambda given: {
            "type": "object",
            "properties": given,
            "required": sorted(given)[:2],
            "additionalProperties": False,
        }
    )


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        _objects(inner),
        st.builds(lambda item, n: {"type": "array", "items": item, "maxItems": n}, inner, st.integers(0, 3)),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=5,
)


def run(matching: Matching, grammar: Grammar, seed: int, *, max_tokens: int = 400) -> tuple[list[int], bool]:
    """A random output, and whether the grammar ended it."""
    draw = random.Random(seed)
    sequence = guided(grammar)
    history = sequence.history
    assert isinstance(history, list)
    for _ in range(max_tokens):
        (end,) = matching.follow([sequence])
        if end is not None:
            assert end.complete, end.error
            return history[3:], True
        token_id = draw.choice(sorted(allowed_ids(matching.allowed([sequence]))))
        if token_id == EOS:
            return history[3:], True
        matching.take(sequence, token_id)
        history.append(token_id)
        sequence.num_computed += 1
    return history[3:], False


@settings(deadline=None, max_examples=60, derandomize=True)
@given(schemas, st.integers(0, 1000))
def test_whatever_comes_of_a_schema_is_valid(schema: dict[str, Any], seed: int) -> None:
    grammar = compiled(Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema)))
    output, ended = run(Matching(), grammar, seed)
    assert ended
    jsonschema.validate(json.loads(text_of(output)), schema)


GRAMMARS = [
    regex(r"[a-z ]{1,9}(, [0-9]+)?!"),
    regex(r"(the|then|there) (quick|q) ?[^x]*"),
    Grammar(kind=GrammarKind.RULES, text='start: e\ne: /[0-9]+/ | "(" e (" + " | " * ") e ")"'),
    Grammar(kind=GrammarKind.CHOICE, text='["the quick", "the lazy", "the dog", "a"]'),
    Grammar(kind=GrammarKind.JSON_OBJECT),
]


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind.value)
@pytest.mark.parametrize("seed", range(3))
def test_a_mask_is_what_trial_finds(grammar: Grammar, seed: int) -> None:
    """Every token that is allowed can be consumed. Where nothing is forced, every other one cannot."""
    mine = compiled(grammar)
    output, _ = run(Matching(), mine, seed, max_tokens=20)
    num_open = 0
    for cut in range(len(output)):
        matcher = mine.prototype.deep_copy()
        assert matcher.consume_tokens(output[:cut])
        matching, sequence = Matching(), guided(mine, output[:cut])
        assert matching.follow([sequence]) == [None]
        mask = allowed_ids(matching.allowed([sequence]))
        assert output[cut] in mask
        trial = {token_id for token_id in range(VOCAB) if _fits(matcher, token_id)}
        assert mask <= trial
        if not matcher.compute_ff_bytes():
            num_open += 1
            assert mask == trial
    assert num_open, "a place where more than one text may follow"


def _fits(matcher: Any, token_id: int) -> bool:
    if token_id == EOS:
        return bool(matcher.is_accepting())
    return bool(matcher.validate_tokens([token_id]) == 1)


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind.value)
@pytest.mark.parametrize("seed", range(3))
def test_a_place_follows_from_the_tokens_wherever_it_is_taken_up(grammar: Grammar, seed: int) -> None:
    mine = compiled(grammar)
    output, _ = run(Matching(), mine, seed, max_tokens=30)
    ongoing = Matching()
    sequence = guided(mine)
    history = sequence.history
    assert isinstance(history, list)
    for cut in range(len(output) + 1):
        fresh, again = Matching(), guided(mine, output[:cut])
        ends = ongoing.follow([sequence])
        assert fresh.follow([again]) == ends
        if ends != [None]:
            assert cut == len(output)
            break
        assert allowed_ids(fresh.allowed([again])) == allowed_ids(ongoing.allowed([sequence]))
        if cut < len(output):
            ongoing.take(sequence, output[cut])
            history.append(output[cut])
            sequence.num_computed += 1


def test_a_step_that_is_run_again_goes_back() -> None:
    matching, sequence = Matching(), guided(regex("abc|abd"), encode("a"))
    matching.follow([sequence])
    before = allowed_ids(matching.allowed([sequence]))
    matching.take(sequence, encode("b")[0])
    matching.follow([sequence])
    assert allowed_ids(matching.allowed([sequence])) == before


def test_the_end_may_come_only_where_the_grammar_allows_it() -> None:
    grammar = compiled(regex("a+b?"))
    matching = Matching()
    assert matching.follow([guided(grammar, [], key="0")]) == [None]
    for key, output, may_end in (("0", "", False), ("1", "aa", True)):
        sequence = guided(grammar, encode(output), key=key)
        assert matching.follow([sequence]) == [None]
        assert (EOS in allowed_ids(matching.allowed([sequence]))) is may_end
    ends = matching.follow([guided(grammar, encode("aab"), key="2")])
    assert ends[0] is not None
    assert ends[0].complete


def test_an_end_that_is_ignored_or_too_early_is_left_out_unless_the_grammar_has_nothing_else() -> None:
    grammar = compiled(regex("a*"))
    ignored = guided(grammar, encode("a"), ignore_eos=True)
    early = guided(grammar, encode("a"), forbidden=frozenset({EOS}))
    for sequence in (ignored, early):
        matching = Matching()
        matching.follow([sequence])
        mask = allowed_ids(matching.allowed([sequence]))
        assert mask
        assert EOS not in mask
    forced = encode("b")[0]
    sequence = guided(regex("ab"), encode("a"), forbidden=frozenset({forced}))
    matching = Matching()
    matching.follow([sequence])
    assert allowed_ids(matching.allowed([sequence])) == {forced}


def test_tokens_that_do_not_match_end_it_with_a_reason() -> None:
    (end,) = Matching().follow([guided(regex("abc"), encode("x"))])
    assert end is not None
    assert not end.complete
    assert "cannot be followed" in end.error


def test_places_of_those_that_are_gone_are_forgotten() -> None:
    grammar = compiled(regex("a*"))
    matching = Matching()
    for number in range(200):
        matching.follow([guided(grammar, encode("a"), key=str(number))])
    assert len(matching) <= 64
    many = [guided(grammar, encode("a"), key=f"many {number}") for number in range(100)]
    assert matching.follow(many) == [None] * 100
    assert matching.allowed(many) is not None


def test_a_place_that_was_forgotten_before_its_token_came_is_made_again() -> None:
    """As many steps of others as a pipeline has in flight, and more."""
    grammar = compiled(regex("ab|cd"))
    afar = Afar()
    sequence = guided(grammar, encode("a"), key="first")
    opened = afar.open(StepPlan(generation=1, step=1, sequences=(sequence,)))
    for number in range(200):
        other = guided(grammar, key=str(number))
        afar.open(StepPlan(generation=1, step=2 + number, sequences=(other,)))
    (b,) = encode("b")
    mask = np.unpackbits(np.frombuffer(opened.masks[0], dtype=np.uint8), bitorder="little")
    assert np.nonzero(mask)[0].tolist() == [b]
    made = afar.close(opened, StepResult((SequenceResult(token_id=b),)))
    assert made.sequences[0].complete


def test_who_has_come_to_an_end_samples_nothing_afar() -> None:
    done, lost = guided(regex("ab"), encode("ab")), guided(regex("ab"), encode("x"), key="lost")
    afar = Afar()
    opened = afar.open(StepPlan(generation=1, step=1, sequences=(done, lost)))
    assert set(opened.ended) == {0, 1}
    assert not opened.masks
    first, second = afar.close(opened, StepResult((SequenceResult(), SequenceResult()))).sequences
    assert (first.complete, first.error) == (True, "")
    assert not second.complete
    assert "cannot be followed" in second.error


def test_rows_without_a_grammar_have_no_mask() -> None:

    plain, own = decoding(SamplingParams()), guided(regex("a|b"), key="own")
    matching = Matching()
    matching.follow([own])
    allowed = matching.allowed([plain, own, plain])
    assert allowed is not None
    assert allowed.rows == [1]
    assert matching.allowed([plain]) is None
