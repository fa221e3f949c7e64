"""What is compiled, what is refused and in which words, and what is kept."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from scheduler.request import Grammar, GrammarKind
from tests.unit.cluster.tiny_tokenizers import byte_level
from tests.unit.workers.guided.support import EOS, VOCAB, compiled, compiler, encode, regex
from workers.guided import CompiledGrammar, GrammarCompiler, GrammarError


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    """Whether the whole text matches, going by the library's matcher alone."""
    matcher = grammar.prototype.deep_copy()
    return bool(matcher.consume_tokens(encode(text))) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        (GrammarKind.REGEX, "[a-c]+!", "abc!", "abd!"),
        (GrammarKind.CHOICE, '["yes", "a \\"no\\"", "né😀\\n"]', "né😀\n", "y"),
        (GrammarKind.RULES, 'start: "a" | start "+" start', "a+a+a", "a+"),
        (GrammarKind.RULES, 'root ::= "a" ("b" | "c")*', "abcb", "ad"),
        (GrammarKind.JSON_OBJECT, "", '{"a": [1, {"b": null}]}', "[1]"),
        (GrammarKind.JSON_SCHEMA, '{"type": "array", "items": {"type": "integer"}}', "[1, 2]", '["1"]'),
    ],
)
def test_every_notation_means_what_it_says(kind: GrammarKind, text: str, good: str, bad: str) -> None:
    grammar = compiled(Grammar(kind=kind, text=text))
    assert accepts(grammar, good)
    assert not accepts(grammar, bad)


def test_json_has_the_whitespace_that_is_asked_for() -> None:
    schema = '{"type": "array", "items": {"type": "integer"}}'
    usual = compiled(Grammar(kind=GrammarKind.JSON_SCHEMA, text=schema))
    free = compiled(Grammar(kind=GrammarKind.JSON_SCHEMA, text=schema, whitespace=r"[ \n]{1,3}"))
    assert accepts(usual, "[1, 2]")
    assert not accepts(usual, "[1,\n2]")
    assert accepts(free, "[1 ,\n2]")


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (GrammarKind.REGEX, "a(b", "unclosed group"),
        (GrammarKind.REGEX, "", "is empty"),
        (GrammarKind.CHOICE, "[]", "at least one"),
        (GrammarKind.CHOICE, '["a", ""]', "none of them empty"),
        (GrammarKind.RULES, " ", "is empty"),
        (GrammarKind.RULES, 'start: "a" | b', 'unknown name: "b"'),
        (GrammarKind.RULES, "start: " + "(" * 500 + '"a"' + ")" * 500, "nested"),
        (GrammarKind.RULES, "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "recursion"),
        (GrammarKind.JSON_SCHEMA, "{", "not valid JSON"),
        (GrammarKind.JSON_SCHEMA, "[1]", "must be a JSON schema"),
        (GrammarKind.JSON_SCHEMA, '{"type": "foo"}', "Invalid type: foo"),
        (GrammarKind.JSON_SCHEMA, '{"type": "string", "minLength": 5, "maxLength": 2}', "Unsatisfiable"),
        (GrammarKind.JSON_SCHEMA, '{"not": {"type": "string"}}', "Unimplemented"),
        (GrammarKind.REGEX, "a" * 70_000, "at most 65536"),
    ],
)
def test_what_cannot_be_used_says_why(kind: GrammarKind, text: str, says: str) -> None:
    with pytest.raises(GrammarError, match=says):
        compiled(Grammar(kind=kind, text=text))


def test_the_longest_chain_of_rules_does_not_run_over_the_stack() -> None:
    """The library recurses once a rule; a process of which the stack ends is gone without a word."""
    rules = [f"r{at}: r{at + 1}\n" for at in range(4000)]
    grammar = "start: r0\n" + "".join(rules) + 'r4000: "a"\n'
    assert accepts(compiled(Grammar(kind=GrammarKind.RULES, text=grammar[:65_536])), "a")
    schemas: dict[str, object] = {f"s{at}": {"$ref": f"#/$defs/s{at + 1}"} for at in range(1500)}
    schemas["s1500"] = {"type": "integer"}
    schema = json.dumps({"$defs": schemas, "$ref": "#/$defs/s0"})
    assert accepts(compiled(Grammar(kind=GrammarKind.JSON_SCHEMA, text=schema)), "7")


def test_the_same_grammar_is_compiled_once() -> None:
    first, again = compiled(regex("kept+")), compiled(regex("kept+"))
    assert first is again
    assert compiled(regex("other+")) is not first


def test_threads_that_begin_later_have_the_usual_stack() -> None:
    compiled(regex("a"))
    assert threading.stack_size() == 0


async def test_an_event_loop_is_not_held_up_and_a_slow_one_is_given_up() -> None:
    slow = GrammarCompiler(byte_level().to_str(), VOCAB, timeout_s=0.05)
    free = threading.Event()
    slow.submit(regex("first"), frozenset({EOS})).result(30)
    assert slow._threads is not None
    slow._threads.submit(free.wait)
    try:
        waiting = asyncio.create_task(slow.compile(regex("second"), frozenset({EOS})))
        await asyncio.sleep(0)
        assert not waiting.done()
        with pytest.raises(GrammarError, match=r"takes more than 0\.05 s"):
            await waiting
    finally:
        free.set()
    assert (await compiler().compile(regex("third"), frozenset({EOS}))).text == "third"
    slow.close()


def test_a_tokenizer_that_the_library_cannot_read_is_named() -> None:
    strange = GrammarCompiler('{"model": {"type": "Tea"}}', VOCAB)
    with pytest.raises(GrammarError, match="model's tokenizer"):
        strange.submit(regex("a"), frozenset()).result(30)
    strange.close()


def test_a_folder_without_a_tokenizer_has_no_compiler(tmp_path: object) -> None:
    assert GrammarCompiler.from_folder(str(tmp_path), VOCAB) is None
