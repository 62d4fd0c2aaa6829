"""Constraints on a text, by llguidance: which tokens may come next. The only importer of llguidance.

Knows a vocabulary as the bytes of its tokens and nothing of llama.cpp. Every bound on the work of a
compilation or of a step is here; what goes past one is an error, and none of them ends the process.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NoReturn, TypeGuard

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark
from numpy.typing import NDArray

from ..errors import BearError, ConstraintDeadEnd, ConstraintTooCostly, GrammarInvalid
from ..params import Constraint, ConstraintKind
from .base import Logits

# llguidance's own, but for: rows large enough for objects of 2,000 optional properties, and a fifth
# of the lexer states, of up to 2 kB each. Measured: schemas take up to 35 ms a step, a compilation 0.9 s.
_LIMITS = LLParserLimits(max_items_in_row=10_000, max_lexer_states=50_000, verbose_errors=False)
# Definitions of a grammar: llguidance goes through a chain of them by recursion, 3 kB of stack for each.
MAX_DEFINITIONS = 1000
# A number's remainders are its lexer's states, and no limit of llguidance counts them: 4 µs for each.
MAX_REMAINDERS = 50_000
# CPU time of one call. A grammar of 20 kB can take seconds within the limits above, in which nobody else's
# text goes on: it does so once.
MAX_CALL_S = 0.25
MAX_MESSAGE_CHARACTERS = 500

# White space of llama.cpp's json-schema-to-grammar (SPACE_RULE): bounded, or a model may write it for ever.
_WHITESPACE = r"( |\n{1,2}[ \t]{0,20})"
# Tokens are not forced, so that `mask` is exactly what `allows` says; the last declaration counts.
_OPTIONS = '\n%llguidance {"no_forcing": true, "allow_invalid_utf8": false}\n'
_SOURCE_LINES = re.compile(r"\n *[0-9]+ \|.*| *\n *\^ *(?=\n|$)|<non-verbose/>")
_PLACE = re.compile(r"^(at )?[0-9]+\([0-9]+\): ")
_INLINE_JSON = re.compile(r"%json(?:\s|//[^\n]*|#[^\n]*)*")
# An escape in GBNF: of a code point, or any other, which hides the character after it.
_CODE_POINT = re.compile(r"\\(?:u(?P<short>[0-9a-fA-F]{4})|U(?P<long>[0-9a-fA-F]{8})|.)", re.DOTALL)
# Keywords whose values are no schemas.
_VALUES = ("const", "enum", "default", "examples")

# Of this thread: others that compute take nothing from it.
_clock = time.thread_time


class Compiler:
    """Makes matchers for one vocabulary. Safe from every thread; compiling drops the GIL.

    Building it takes 0.1 s for 32,000 tokens. Long chains of rules need a stack of 8 MiB.
    """

    def __init__(self, pieces: Sequence[bytes], eog_tokens: Sequence[int]) -> None:
        """`pieces` are the bytes that each token adds to a text: none for control tokens."""
        ends = frozenset(eog_tokens)
        # 0xFF would mark the name of a special token, and is in no UTF-8.
        texts = [b"" if token in ends or 0xFF in piece else piece for token, piece in enumerate(pieces)]
        self._vocab = _Tokens(texts, ends)
        # llguidance wants an end of generation: one that is no token serves all of them. It is also
        # the only special token, so that a grammar can name no other.
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Wrapped([*texts, b"<|end|>"])))

    def compile(self, constraint: Constraint) -> GrammarMatcher:
        """A matcher at the beginning of a text. Raises GrammarInvalid."""
        grammar = _SOURCES[constraint.kind](constraint)
        matcher = LLMatcher(self._tokenizer, grammar + _OPTIONS, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarInvalid(_message(matcher.get_error()))
        compiled = GrammarMatcher(matcher, self._vocab)
        try:
            compiled.check()
        except ConstraintDeadEnd:
            raise GrammarInvalid("no text satisfies it") from None
        except BearError as exc:
            raise GrammarInvalid(exc.message) from None
        return compiled


class GrammarMatcher:
    """A Matcher on llguidance's. After an error it raises that error again, for ever."""

    def __init__(self, matcher: LLMatcher, vocab: _Tokens, ended: bool = False) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._ended = ended  # by an end-of-generation token
        self._is_late = False
        self._bits: NDArray[np.uint8] = np.zeros(vocab.num_mask_bytes, np.uint8)
        self._pointer = self._bits.ctypes.data

    def allows(self, token: int) -> bool:
        """Whether the token may come next; False after an error, which `mask` then tells."""
        if token in self._vocab.ends:
            return self.is_satisfied()
        if self._ended or self._is_late or not self._vocab.has_text(token):
            return False
        try:
            with self._timed():
                return self._matcher.validate_tokens([token]) == 1
        except ConstraintTooCostly:
            return False

    def mask(self, logits: Logits) -> Logits:
        """(n_vocab,) copy of `logits`, -inf where a token may not come next."""
        # An upper bound for each logit, made from its bit: inf (0x7F800000) or -inf (0xFF800000).
        bounds = self._allowed().astype(np.uint32)
        bounds <<= 31
        bounds ^= 0xFF800000
        result: Logits = bounds.view(np.float32)
        np.minimum(logits, result, out=result)
        return result

    def accept(self, token: int) -> None:
        """Goes on by an allowed token; one that is not is a ConstraintDeadEnd."""
        if self._is_late:
            self._fail()
        if token in self._vocab.ends and self.is_satisfied():
            self._ended = True
        elif self._ended or not self._vocab.has_text(token):
            self._fail(f"token {token} may not come here")
        else:
            with self._timed():
                is_consumed = self._matcher.consume_token(token)
            if not is_consumed:
                self._fail()

    def is_satisfied(self) -> bool:
        """Whether the text so far is a complete one."""
        return not self._is_late and self._matcher.is_accepting()

    def is_finished(self) -> bool:
        """Whether the text is complete and nothing may follow it."""
        return self._ended or (
            self._matcher.is_stopped() and not self._matcher.is_error() and not self._is_late
        )

    def copy(self) -> GrammarMatcher:
        """Another one that stands where this one stands."""
        copy = GrammarMatcher(self._matcher.deep_copy(), self._vocab, self._ended)
        copy._is_late = self._is_late
        return copy

    def check(self) -> None:
        """Raises ConstraintDeadEnd if no token may come next, ConstraintTooCostly."""
        self._allowed()

    def _allowed(self) -> NDArray[np.uint8]:
        """(n_vocab,) 1 for each token that may come next."""
        if self._is_late:
            self._fail()
        if self._ended:
            self._bits[:] = 0
        else:
            with self._timed():
                self._matcher.unsafe_compute_mask_ptr(self._pointer, self._bits.nbytes)
            if self._matcher.is_error():
                self._fail()
            # A Lark grammar can name any token by its number.
            self._bits &= self._vocab.text_bits
        if self.is_satisfied():
            self._bits |= self._vocab.end_bits
        elif not self._bits.any():
            self._fail("only tokens without text may follow")
        return np.unpackbits(self._bits, count=self._vocab.size, bitorder="little")

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Raises ConstraintTooCostly if what is done within took too long, and from then on."""
        began_s = _clock()
        yield
        if _clock() - began_s > MAX_CALL_S:
            self._is_late = True
            self._fail()

    def _fail(self, problem: str = "") -> NoReturn:
        if self._is_late:
            raise ConstraintTooCostly(f"one token took more than {MAX_CALL_S} s")
        error = _message(self._matcher.get_error())
        if "NoExtension" in error:
            raise ConstraintDeadEnd("no token of the vocabulary may follow")
        if not error or "doesn't satisfy the grammar" in error:
            raise ConstraintDeadEnd(error or problem)
        raise ConstraintTooCostly(error)


class _Tokens:
    """Which tokens have text and which are ends, as sets and as the bits of llguidance's masks."""

    def __init__(self, texts: Sequence[bytes], ends: frozenset[int]) -> None:
        self.size = len(texts)
        self.ends = ends
        self.num_mask_bytes = (self.size + 1 + 31) // 32 * 4  # the end that is no token has a bit too
        self._has_text = [bool(text) for text in texts]
        self.text_bits = self._bits(self._has_text)
        self.end_bits = self._bits([token in ends for token in range(self.size)])

    def has_text(self, token: int) -> bool:
        """Whether a text gets any bytes by the token; False for what is no token."""
        return 0 <= token < self.size and self._has_text[token]

    def _bits(self, flags: list[bool]) -> NDArray[np.uint8]:
        bits = np.zeros(self.num_mask_bytes, np.uint8)
        packed = np.packbits(flags, bitorder="little")
        bits[: len(packed)] = packed
        return bits


class _Wrapped:
    """A tokenizer in the form that TokenizerWrapper takes; it is never asked to tokenize."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        return []


def _json_schema(constraint: Constraint) -> str:
    schema = _parsed(constraint.text)
    if schema is True:
        schema = {}  # the same, and can carry the white space
    if isinstance(schema, dict):
        if "x-guidance" in schema:
            raise GrammarInvalid("x-guidance is no keyword of JSON schema")
        _check_schema(schema)
        schema["x-guidance"] = {"whitespace_pattern": _WHITESPACE}
    return f"start: %json {json.dumps(schema)}"


def _regex(constraint: Constraint) -> str:
    r"""`\d` is an ASCII digit; all other classes are Unicode's."""
    return f"start: /{regex_to_lark(constraint.text, 'd')}/"


def _choices(constraint: Constraint) -> str:
    if not constraint.choices:
        raise GrammarInvalid("there is nothing to choose from")
    # One terminal: of several, the lexer would take the longest, and lose those that begin it.
    return "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, constraint.choices))


def _lark(constraint: Constraint) -> str:
    text = constraint.text
    colons, after = text.count(":"), 0
    for match in _INLINE_JSON.finditer(text):
        try:
            schema, end = json.JSONDecoder().raw_decode(text, match.end())
        except (ValueError, RecursionError):
            continue  # llguidance, which takes less, tells what is wrong with it
        _check_schema(schema)
        if isinstance(schema, dict) and match.end() >= after:
            colons, after = colons - text.count(":", match.end(), end), end
    _check_definitions(colons)
    return text


def _gbnf(constraint: Constraint) -> str:
    _check_definitions(constraint.text.count("::="))
    try:
        lark = gbnf_to_lark(_CODE_POINT.sub(_plain_code_point, constraint.text))
    except Exception as exc:  # the converter raises whatever befalls it
        raise GrammarInvalid(_message(str(exc) or type(exc).__name__)) from None
    _check_definitions(lark.count(":"))
    return str(lark)


_SOURCES: dict[ConstraintKind, Callable[[Constraint], str]] = {
    ConstraintKind.JSON_SCHEMA: _json_schema,
    ConstraintKind.REGEX: _regex,
    ConstraintKind.CHOICES: _choices,
    ConstraintKind.LARK: _lark,
    ConstraintKind.GBNF: _gbnf,
}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise GrammarInvalid("the schema is nested too deeply") from None
    except ValueError as exc:
        raise GrammarInvalid(f"the schema is no JSON: {_message(str(exc))}") from None


def _check_schema(schema: Any) -> None:
    """Refuses what llguidance takes for ever to compile, and what it would not enforce."""
    steps = []
    for node in _subschemas(schema):
        step, least = node.get("multipleOf"), node.get("minProperties")
        if _is_number(step) and step > 0 and math.isfinite(step):
            steps.append(Fraction(str(step)))
        # Keys that are not listed may repeat, and the last one of them counts.
        required = node.get("required")
        listed = len(required) if isinstance(required, list) else 0
        if _is_number(least) and least > max(1, listed):
            raise GrammarInvalid("minProperties above 1 and above the number of required properties")
    if steps:
        finest = Fraction(1, math.lcm(*(step.denominator for step in steps)))
        if math.lcm(*((step / finest).numerator for step in steps)) > MAX_REMAINDERS:
            raise GrammarInvalid(f"the values of multipleOf have more than {MAX_REMAINDERS} remainders")


def _subschemas(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a schema, those outside of schemas too."""
    todo = [value]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            yield node
            todo += [below for key, below in node.items() if key not in _VALUES]
        elif isinstance(node, list):
            todo += node


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_definitions(count: int) -> None:
    if count > MAX_DEFINITIONS:
        raise GrammarInvalid(f"{count} definitions (colons are counted); at most {MAX_DEFINITIONS}")


def _plain_code_point(match: re.Match[str]) -> str:
    """A code point as the converter keeps it: it drops the zeros of `\\u0041`."""
    digits = match.group("short") or match.group("long")
    if digits is None:
        return match.group()
    code = int(digits, 16)
    if code < 0x80:
        return f"\\x{code:02x}"
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise ValueError(f"{match.group()} is no character")
    return chr(code)


def _message(error: str) -> str:
    """What the compiler says, without the lines of a grammar that the client did not write."""
    text = _PLACE.sub("", _SOURCE_LINES.sub("", error.partition("\n<backtrace>")[0])).strip()
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else f"{text[:MAX_MESSAGE_CHARACTERS]} …"
