"""Constraints without a model: what does not compile, what costs too much, what a matcher says when."""

from __future__ import annotations

import itertools
import json
import random
import threading

import numpy as np
import pytest

from bear_grpc.backend import constraint as module
from bear_grpc.errors import ConstraintDeadEnd, ConstraintTooCostly, GrammarInvalid
from bear_grpc.params import Constraint, ConstraintKind
from bear_grpc.testing import FakeVocabulary
from bear_grpc.testing.constraint import write

VOCABULARY = FakeVocabulary()
EOS, END = VOCABULARY.eog_tokens()
NESTED = '{"type": "array", "items": '
DEEP = "(" * 20_000


def compiled(kind, source):
    if kind is ConstraintKind.CHOICES:
        return VOCABULARY.compile(Constraint(kind, choices=tuple(source)))
    if kind is ConstraintKind.JSON_SCHEMA and not isinstance(source, str):
        source = json.dumps(source)
    return VOCABULARY.compile(Constraint(kind, source))


def schema(source):
    return compiled(ConstraintKind.JSON_SCHEMA, source)


def lark(text):
    return compiled(ConstraintKind.LARK, text)


def regex(text):
    return compiled(ConstraintKind.REGEX, text)


def go_on(matcher, text):
    for byte in text.encode():
        assert matcher.allows(byte), (text, byte)
        matcher.accept(byte)
    return matcher


def accepts(matcher, text):
    for byte in text.encode():
        if not matcher.allows(byte):
            return False
        matcher.accept(byte)
    return matcher.is_satisfied()


@pytest.mark.parametrize(
    "keyword",
    [
        *("not", "if", "then", "else", "contains", "minContains", "maxContains", "propertyNames"),
        *("uniqueItems", "dependentRequired", "dependentSchemas", "unevaluatedProperties"),
        *("unevaluatedItems", "$dynamicRef"),
    ],
)
def test_schema_with_an_unsupported_keyword_is_refused_and_names_it(keyword):
    with pytest.raises(GrammarInvalid, match=f'"{keyword.replace("$", "[$]")}"'):
        schema({"type": "object", "properties": {"a": {keyword: True}}})


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("3", "must be an object or boolean"),
        ("false", "schema is false"),
        ('{"const": NaN}', "expected value"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "required property 'a'"),
        ({"type": "strin"}, "strin"),
        ({"$ref": "http://127.0.0.1:1/schema.json"}, "not fetch"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$ref": "#"}, "no text satisfies it"),
        ({"$schema": "http://127.0.0.1:1/schema.json"}, "not fetch"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
    ],
    ids=str,
)
def test_schema_that_cannot_be_kept_is_refused_and_says_why(source, problem):
    with pytest.raises(GrammarInvalid, match=problem):
        schema(source)


@pytest.mark.parametrize(
    ("kind", "source", "problem"),
    [
        (ConstraintKind.REGEX, "(a", "unclosed group"),
        (ConstraintKind.REGEX, r"\xZZ", "hexadecimal"),
        (ConstraintKind.REGEX, r"(a)\1", "backreferences"),
        (ConstraintKind.REGEX, r"a(?!b)", "look-around"),
        (ConstraintKind.REGEX, r"(?-u:\xff)", "invalid UTF-8"),
        (ConstraintKind.REGEX, r"[^\s\S]", "no text satisfies it"),
        (ConstraintKind.CHOICES, [], "nothing to choose"),
        (ConstraintKind.LARK, "", "start"),
        (ConstraintKind.LARK, "start: a", "unknown name"),
        (ConstraintKind.LARK, "start: start", "no text satisfies it"),
        (ConstraintKind.LARK, 'start: A\nA: "a" A', "circular"),
        (ConstraintKind.LARK, "\0%%%", "lexer error"),
        (ConstraintKind.GBNF, "root ::= a", "'a' not found"),
        (ConstraintKind.GBNF, 'start ::= "a"', "No 'root' rule"),
        (ConstraintKind.GBNF, 'root ::= "a', "end of input"),
        (ConstraintKind.GBNF, 'root ::= "\\', "index"),
        (ConstraintKind.GBNF, r'root ::= "\q"', "escape"),
        (ConstraintKind.GBNF, r'root ::= "\ud800"', "no character"),
        (ConstraintKind.GBNF, 'start: "a"', "::="),
    ],
    ids=ascii,
)
def test_grammar_that_does_not_compile_is_refused_and_says_why(kind, source, problem):
    with pytest.raises(GrammarInvalid, match=problem):
        compiled(kind, source)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (ConstraintKind.REGEX, DEEP + "a" + ")" * len(DEEP)),
        (ConstraintKind.LARK, f'start: {DEEP}"a"'),
        (ConstraintKind.LARK, "start: " + "%lark { start: " * 50 + '"a"' + "}" * 50),
        (ConstraintKind.LARK, "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4000))),
        (ConstraintKind.LARK, "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(40))),
        (ConstraintKind.LARK, "start: A\nA: /(.*a.{30})/ & /(.*b.{33})/ & /(.*c.{35})/ & ~/(.*d.{31})/"),
        (ConstraintKind.LARK, 'start: "x" %json {"type": "integer", "multipleOf": 121330189}'),
        (ConstraintKind.LARK, 'start: "x" %json // y\n {"multip\\u006ceOf": 121330189}'),
        (ConstraintKind.GBNF, f'root ::= {DEEP}"a"'),
        (ConstraintKind.GBNF, "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(4000))),
        (ConstraintKind.JSON_SCHEMA, NESTED * 3000 + "{}" + "}" * 3000),
        (ConstraintKind.JSON_SCHEMA, {"type": "integer", "multipleOf": 121330189}),
        (ConstraintKind.JSON_SCHEMA, {"allOf": [{"multipleOf": n} for n in (101, 103, 107, 109)]}),
        (ConstraintKind.JSON_SCHEMA, {"allOf": [{"multipleOf": 10007}, {"multipleOf": 0.01}]}),
        (
            ConstraintKind.JSON_SCHEMA,
            {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(4)]} for i in range(12)]},
        ),
        (ConstraintKind.JSON_SCHEMA, {"type": "string", "pattern": ".*a.*b.*c", "minLength": 500}),
        (ConstraintKind.JSON_SCHEMA, {"type": "integer", "minimum": -1e300, "maximum": 1e308}),
    ],
    ids=lambda value: str(value)[:40].translate(str.maketrans("\n[]", "   ")),
)
def test_grammar_that_would_take_too_much_is_refused(kind, source):
    with pytest.raises(GrammarInvalid):
        compiled(kind, source)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (ConstraintKind.REGEX, "a{1000000}"),
        (ConstraintKind.REGEX, "((a{0,100}){0,100}){0,100}"),
        (ConstraintKind.REGEX, "(a|b)*a(a|b){18}"),
        (ConstraintKind.REGEX, "(a*)*b(a|a)*(a|aa)+"),
        (ConstraintKind.LARK, 'start: s\ns: s s s | s s | "a" | ""'),
        (ConstraintKind.LARK, 'start: ((("a" x){1000}){1000}){1000}\nx: "b" x?'),
        (
            ConstraintKind.LARK,
            "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(900)) + '\nr900: "a"',
        ),
        (ConstraintKind.JSON_SCHEMA, {"type": "string", "minLength": 10**9}),
        (ConstraintKind.JSON_SCHEMA, {"type": "array", "items": {"type": "string"}, "minItems": 10**6}),
        (ConstraintKind.JSON_SCHEMA, {"type": "integer", "multipleOf": 49_999}),
        (
            ConstraintKind.JSON_SCHEMA,
            {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1200)}},
        ),
        (
            ConstraintKind.JSON_SCHEMA,
            {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}}}},
        ),
    ],
    ids=lambda value: str(value)[:40].translate(str.maketrans("\n[]", "   ")),
)
def test_grammar_that_only_looks_hostile_gives_text(kind, source):
    matcher = compiled(kind, source)
    draw = random.Random(1)
    for _ in range(30):
        token = draw.choice(np.flatnonzero(matcher.mask(np.zeros(VOCABULARY.size, np.float32)) == 0).tolist())
        matcher.accept(token)
        if matcher.is_finished():
            break


def test_message_of_the_compiler_is_cut():
    with pytest.raises(GrammarInvalid) as caught:
        regex("(?=" + "a" * 5000 + ")")
    assert 100 < len(caught.value.message) < module.MAX_MESSAGE_CHARACTERS + 100


def test_step_past_a_limit_is_too_costly_and_stays_so(monkeypatch):
    monkeypatch.setattr(module, "_LIMITS", module.LLParserLimits(max_items_in_row=20, verbose_errors=False))
    matcher = lark('start: "x" s\ns: s s | "a" s | "b" s | "c" s | "d" s | "a" "b" | "c"')
    untouched = matcher.copy()
    with pytest.raises(ConstraintTooCostly, match="max is 20"):
        for byte in b"xaaabababaabababab":
            matcher.accept(byte)
    with pytest.raises(ConstraintTooCostly):
        matcher.mask(np.zeros(VOCABULARY.size, np.float32))
    with pytest.raises(ConstraintTooCostly):
        matcher.accept(ord("a"))
    assert not any(matcher.allows(token) for token in (ord("a"), EOS))
    assert not matcher.is_satisfied()
    assert not matcher.is_finished()
    assert not matcher.copy().allows(ord("a"))
    assert accepts(untouched, "xab")


@pytest.mark.parametrize(
    "call",
    [
        lambda matcher: matcher.mask(np.zeros(VOCABULARY.size, np.float32)),
        lambda matcher: matcher.accept(ord("a")),
        lambda matcher: matcher.allows(ord("a")) and matcher.check(),
    ],
    ids=["mask", "accept", "allows"],
)
def test_call_that_takes_too_long_is_the_last_and_stays_so(monkeypatch, call):
    matcher = regex("a*")
    untouched = matcher.copy()
    with monkeypatch.context() as slow:
        times = itertools.count(step=module.MAX_CALL_S * 1.5)
        slow.setattr(module, "_clock", lambda: next(times))
        with pytest.raises(ConstraintTooCostly, match="took more than"):
            call(matcher)
            matcher.check()
    with pytest.raises(ConstraintTooCostly):
        matcher.mask(np.zeros(VOCABULARY.size, np.float32))
    with pytest.raises(ConstraintTooCostly):
        matcher.accept(ord("a"))
    assert not any(matcher.allows(token) for token in (ord("a"), EOS))
    assert not matcher.is_satisfied()
    assert not matcher.is_finished()
    assert not matcher.copy().allows(ord("a"))
    assert accepts(untouched, "aa")


def test_mask_past_a_limit_is_too_costly(monkeypatch):
    monkeypatch.setattr(module, "_LIMITS", module.LLParserLimits(step_lexer_fuel=50, verbose_errors=False))
    matcher = go_on(lark("start: X\nX: /x[ab]*a[ab]{9}c/"), "x")
    with pytest.raises(ConstraintTooCostly, match="lexer error"):
        matcher.mask(np.zeros(VOCABULARY.size, np.float32))


def test_first_step_past_a_limit_does_not_compile(monkeypatch):
    monkeypatch.setattr(module, "_LIMITS", module.LLParserLimits(max_lexer_states=10, verbose_errors=False))
    with pytest.raises(GrammarInvalid, match="too many states"):
        regex("x[ab]*a[ab]{9}c")


def test_token_that_is_not_allowed_is_a_dead_end_that_stays():
    matcher = regex("ab")
    with pytest.raises(ConstraintDeadEnd):
        matcher.accept(ord("x"))
    with pytest.raises(ConstraintDeadEnd):
        matcher.mask(np.zeros(VOCABULARY.size, np.float32))
    assert not matcher.allows(ord("a"))


@pytest.mark.parametrize("token", [EOS, END, VOCABULARY.bos, -1, VOCABULARY.size, 2**40])
def test_end_or_control_token_or_none_before_the_text_is_complete_is_a_dead_end(token):
    matcher = regex("ab")
    assert not matcher.allows(token)
    with pytest.raises(ConstraintDeadEnd):
        matcher.accept(token)


def test_grammar_that_needs_a_control_token_is_a_dead_end():
    matcher = go_on(lark(f'start: "a" <[{VOCABULARY.control("<|user|>")}]> "b"'), "a")
    with pytest.raises(ConstraintDeadEnd, match="without text"):
        matcher.mask(np.zeros(VOCABULARY.size, np.float32))


@pytest.mark.parametrize("name", ["<|user|>", "<s>", f"<[{EOS}]>", f"<[{VOCABULARY.bos}]>"])
def test_grammar_of_control_tokens_only_is_refused(name):
    with pytest.raises(GrammarInvalid):
        lark(f"start: {name}")


def test_schema_white_space_is_bounded():
    matcher = schema({"type": "array", "items": {"type": "integer"}})
    assert accepts(matcher.copy(), "[ 1,\n\n" + " " * 20 + "2 ]")
    assert accepts(matcher.copy(), "[1,2]")
    assert not accepts(matcher.copy(), "[  1]")
    assert not accepts(matcher.copy(), "[1,\n\n\n2]")
    assert not accepts(matcher.copy(), "[1,\n" + " " * 21 + "2]")
    assert not accepts(matcher.copy(), " [1]")
    assert not go_on(matcher.copy(), "[1]").allows(ord(" "))


def test_schema_true_takes_any_json_with_bounded_white_space():
    assert accepts(schema("true"), '{"a": [1, null]}')
    assert not accepts(schema("true"), "[  1]")


def test_gbnf_escapes_of_code_points_are_kept():
    source = r'root ::= "\u0041B" [\u0030-\u0039] "\\u0041" "\U0001F43B" "\x41" "\u00e9"'
    assert accepts(compiled(ConstraintKind.GBNF, source), "AB7\\u0041🐻Aé")


def test_lark_cannot_turn_off_what_keeps_the_text_utf8():
    matcher = lark('%llguidance {"allow_invalid_utf8": true}\nstart: /[\\xe0-\\xff]/\n')
    assert accepts(matcher, "é")


def test_colons_of_inline_json_are_no_definitions():
    source = json.dumps({"type": "object", "properties": {f"p{i}": {"const": i} for i in range(600)}})
    assert accepts(lark(f"start: %json {source} | %json {source}"), '{"p7":7}')


def test_copy_goes_its_own_way():
    matcher = go_on(regex("a(bc|cb)"), "a")
    other = go_on(matcher.copy(), "bc")
    assert other.is_finished()
    assert accepts(matcher, "cb")


def test_matcher_made_in_one_thread_works_in_another():
    made = []
    maker = threading.Thread(target=lambda: made.append(regex("[ab]+c")))
    maker.start()
    maker.join()
    assert accepts(made[0], "abac")


def test_compiling_in_many_threads_at_once_gives_each_its_own():
    vocabulary, texts = FakeVocabulary(), {}

    def make(number):
        source = Constraint(ConstraintKind.CHOICES, choices=(f"only {number}",))
        texts[number] = write(vocabulary.compile(source), vocabulary)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: b"only %d" % number for number in range(8)}


def test_vocabulary_without_an_end_finishes_and_has_no_way_on():
    matcher = module.Compiler([b"a", b"b"], ()).compile(Constraint(ConstraintKind.REGEX, "ab?"))
    assert matcher.mask(np.array([1.0, 2.0], np.float32)).tolist() == [1.0, -np.inf]
    matcher.accept(0)
    assert matcher.is_satisfied()
    assert not matcher.is_finished()
    matcher.accept(1)
    assert matcher.is_finished()


def test_end_token_with_a_text_of_its_own_ends_and_is_no_text():
    compiler = module.Compiler([b"<", b"end", b">", b"<end>", b"\xff<end>"], (3,))
    matcher = compiler.compile(Constraint(ConstraintKind.REGEX, "<end>"))
    allowed = []
    for token in range(3):
        allowed.append([place for place in range(5) if matcher.allows(place)])
        matcher.accept(token)
    assert [*allowed, [place for place in range(5) if matcher.allows(place)]] == [[0], [1], [2], [3]]
    with pytest.raises(GrammarInvalid, match="unknown special token"):
        compiler.compile(Constraint(ConstraintKind.LARK, "start: <end>"))
