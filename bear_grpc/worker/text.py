"""The text thread: tokenizing, rendering and checking, beside a busy owner."""

from __future__ import annotations

import collections
import ctypes
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable

import msgspec
import numpy as np

from ..backend.base import Vocabulary
from ..engine.echo import Echo
from ..engine.resume import take_up
from ..engine.sequence import Sequence
from ..engine.stop import TextMachine
from ..errors import BackendError, BearError, ErrorRecord, InvalidField
from ..input_limits import DEFAULT_LIMITS
from ..params import (
    MAX_SEED,
    ChatInput,
    ChatTurn,
    Constraint,
    ConstraintKind,
    GenerationInput,
    PromptInput,
    TokensInput,
)
from ..protocol import Ended, Frame, Step, Submit, TextJob, TextResult
from .exits import EXIT_BROKEN
from .limits import Limits
from .template import ChatTemplate

log = logging.getLogger(__name__)

# Tokenizers with regular expressions recurse on long runs of letters.
STACK_BYTES = 256 * 2**20
STUCK_S = 5.0
# Tokens that are replayed take longer than those that are read.
REPLAY_TOKEN_S = 0.002
# A thread without work for so long uses the time.
IDLE_S = 0.5
# An answer must fit one frame, and the 4 MiB that a gRPC client takes by default.
MAX_ANSWER_BYTES = 4 * 2**20 - 2**16
# Of a detokenized text, which is told as bytes and as text: a byte that is no text takes three there.
MAX_RAW_BYTES = MAX_ANSWER_BYTES // 4
_NO_CONTROL = "the text of a control token is not allowed here"


class _JobTimeout(BaseException):
    """Raised inside the text thread by `interrupt_overdue`."""


class Preparer:
    """What the text thread knows: a model's vocabulary, template and limits."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        context_length: int,
        chat_template: str | None = None,
        *,
        max_rendered_chars: int = DEFAULT_LIMITS.max_rendered_chars,
    ) -> None:
        """`chat_template` takes the place of the model's own."""
        self._vocabulary = vocabulary
        self._context_length = context_length
        self._template_source = chat_template
        self._max_rendered_chars = max_rendered_chars
        self._template: ChatTemplate | None = None

    def warm_up(self) -> None:
        """Looks through the whole vocabulary once, so that no request has to wait for it."""
        self._vocabulary.eog_tokens()
        self._vocabulary.control_texts()

    def warm_up_constraints(self) -> None:
        """The same for constraints, whose tables take longer."""
        self._vocabulary.compile(Constraint(ConstraintKind.CHOICES, choices=("a",)))

    def sequences(self, submit: Submit) -> list[Sequence]:
        """The engine's form of a request, one for each answer.

        Raises InvalidField, ContextLengthExceeded, GrammarInvalid.
        """
        tokens, _ = self.tokens(submit.input)
        if not tokens:
            raise InvalidField("prompt", "must give at least one token")
        sampling, stop = submit.sampling, submit.stop
        self._check_ids("stop.token_ids", list(stop.token_ids))
        self._check_ids("sampling.logit_bias", [token for token, _ in sampling.logit_bias])
        if stop.ignore_eos:
            never = tuple((token, float("-inf")) for token in self._vocabulary.eog_tokens())
            sampling = msgspec.structs.replace(sampling, logit_bias=sampling.logit_bias + never)
        matcher = None if submit.constraint is None else self._vocabulary.compile(submit.constraint)
        limits = Limits(self._context_length, stop.max_tokens, stop.default_max_tokens)
        kept = limits.fit(tokens, submit.overflow, bos=self._vocabulary.bos_token)
        max_tokens = limits.max_tokens(len(kept))
        if stop.min_tokens > max_tokens:
            raise InvalidField("stop.min_tokens", f"must be 0 to {max_tokens}, is {stop.min_tokens}")
        strips = self._vocabulary.adds_space_prefix
        # SentencePiece begins an answer with a space; a constraint has nothing to spare.
        strips_answer = strips and matcher is None and isinstance(submit.input, ChatInput)

        def make_text() -> TextMachine:
            return TextMachine(stop.sequences, strip_space=strips_answer)

        sequences = [
            Sequence(
                id=submit.id + index,
                tokens=list(kept),
                sampling=msgspec.structs.replace(
                    sampling, seed=(sampling.seed + submit.index + index) % (MAX_SEED + 1)
                ),
                stop=stop,
                max_tokens=max_tokens,
                text=make_text(),
                received_s=submit.received_s,
                credit=submit.credit,
                output=submit.output,
                scope=submit.scope,
                tenant=submit.tenant,
                tag=submit.tag,
                priority=submit.priority,
                deadline_s=submit.deadline_s,
                matcher=matcher if matcher is None or index == 0 else matcher.copy(),
                echo=Echo(strip_space=strips) if submit.output.echo else None,
                truncated=len(tokens) - len(kept),
                request=submit.id - submit.index,
                was_taken=submit.was_taken,
            )
            for index in range(submit.n)
        ]
        if submit.resume is not None:
            take_up(sequences[0], submit.resume, self._vocabulary, make_text)
        return sequences

    def answer(self, job: TextJob) -> TextResult:
        """Token ids of an input, or the text of token ids."""
        vocabulary = self._vocabulary
        if job.input is None:
            ids = job.token_ids or []
            self._check_ids("token_ids", ids)
            raw = b"".join(vocabulary.piece(token, special=job.include_special) for token in ids)
            _check_size("token_ids", len(raw), MAX_RAW_BYTES)
            return TextResult(job.id, raw=raw)
        ids, rendered = self.tokens(job.input)
        pieces = [vocabulary.piece(token, special=True) for token in ids] if job.include_pieces else []
        _check_size(
            "input",
            4 * len(ids) + sum(len(piece) + 5 for piece in pieces) + len(rendered.encode()),
            MAX_ANSWER_BYTES,
        )
        return TextResult(job.id, ids=np.asarray(ids, "<i4").tobytes(), pieces=pieces, text=rendered)

    def tokens(self, source: GenerationInput) -> tuple[list[int], str]:
        """Token ids of an input, and the text that the template gave for chat."""
        if isinstance(source, TokensInput):
            self._check_ids("token_ids.ids", source.ids)
            return list(source.ids), ""
        if isinstance(source, PromptInput):
            ids = self._vocabulary.tokenize(
                source.text, add_special=source.add_special, parse_special=source.parse_special
            )
            return ids, ""
        return self._chat_tokens(source)

    def _chat_tokens(self, chat: ChatInput) -> tuple[list[int], str]:
        """Control tokens are recognised where the template wrote them, never where a client did."""
        mark = f"\ufdd0{secrets.token_hex(8)}:"  # no client can write it
        controls = self._vocabulary.control_texts()
        if any(control in str(chat.template_kwargs) for control in controls):
            raise InvalidField("chat.template_kwargs", _NO_CONTROL)
        fenced = [_fenced(turn, place, mark, controls) for place, turn in enumerate(chat.messages)]
        text = self._chat_template().render(msgspec.structs.replace(chat, messages=fenced))
        first, *rest = re.split(f"{mark}([0-9]+)([<>])", text)
        places, sides, texts = rest[0::3], rest[1::3], rest[2::3]
        whole = sides == ["<", ">"] * (len(sides) // 2) and places[0::2] == places[1::2]
        if not whole or any(
            turn is not given and str(place) not in places
            for place, (turn, given) in enumerate(zip(fenced, chat.messages, strict=True))
        ):
            raise InvalidField("chat.messages", _NO_CONTROL)
        parts = [first, *texts]
        bos = self._vocabulary.special_text("bos")
        add_special = not (bos and first.startswith(bos))
        ids: list[int] = []
        for place, part in enumerate(parts):
            if part or len(parts) == 1:
                ids += self._vocabulary.tokenize(part, add_special=add_special, parse_special=place % 2 == 0)
                add_special = False
        return ids, "".join(parts)

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            source = self._template_source or self._vocabulary.chat_template()
            if source is None:
                raise InvalidField("chat", "the model has no chat template; use prompt")
            self._template = ChatTemplate(source, self._vocabulary, self._max_rendered_chars)
        return self._template

    def _check_ids(self, field: str, ids: list[int]) -> None:
        size = self._vocabulary.size
        for place, token in enumerate(ids):
            if not 0 <= token < size:
                raise InvalidField(f"{field}[{place}]", f"must be 0 to {size - 1}, is {token}")


def _check_size(field: str, size: int, limit: int) -> None:
    if size > limit:
        raise InvalidField(field, f"gives {size} bytes, the limit is {limit}")


def _fenced(turn: ChatTurn, place: int, mark: str, controls: frozenset[str]) -> ChatTurn:
    """The turn, with marks around a content that holds the text of a control token.

    White space stays outside: templates trim it.
    """
    if not any(control in turn.content for control in controls):
        return turn
    words = turn.content.strip()
    before, _, after = turn.content.partition(words)
    return ChatTurn(turn.role, f"{before}{mark}{place}<{words}{mark}{place}>{after}")


class TextThread(threading.Thread):
    """Serves Submit and TextJob frames in order; a generation goes on to the owner."""

    def __init__(
        self,
        preparer: Preparer,
        *,
        post: Callable[[Frame], None],
        to_owner: Callable[[Sequence], None],
        limit_s: float = DEFAULT_LIMITS.max_text_job_s,
        mark: Callable[[int], None] = lambda job: None,
    ) -> None:
        """`limit_s` is how long a job may take before `interrupt_overdue` ends it.

        `mark` gets the id of each job when it begins, and 0 when it has ended.
        """
        super().__init__(name="text", daemon=True)
        self._limit_s = self._present_limit_s = limit_s
        self._preparer = preparer
        self._post = post
        self._to_owner = to_owner
        self._mark = mark
        self._changed = threading.Condition()
        self._jobs: collections.deque[Submit | TextJob] = collections.deque()
        self._pending: set[int] = set()
        self._cancelled: set[int] = set()
        # When the present job began. Who pops it decides: the job has ended, or is interrupted.
        self._began: list[float] = []
        self._interrupted_s: float | None = None
        self._closing = False

    def launch(self) -> None:
        """Starts the thread with a big stack."""
        before = threading.stack_size(STACK_BYTES)
        try:
            self.start()
        finally:
            threading.stack_size(before)

    def put(self, job: Submit | TextJob) -> None:
        """I/O thread: takes a job."""
        with self._changed:
            if isinstance(job, Submit):
                self._pending.update(range(job.id, job.id + job.n))
            self._jobs.append(job)
            self._changed.notify()

    def cancel(self, id: int) -> bool:
        """I/O thread: ends a generation that has not gone on to the owner; False if it has."""
        with self._changed:
            if id not in self._pending:
                return False
            self._cancelled.add(id)
            return True

    def interrupt_overdue(self) -> None:
        """I/O thread: raises _JobTimeout inside a job that has run for too long."""
        began = self._began
        if began and time.monotonic() - began[0] >= self._present_limit_s and _pop(began):
            self._interrupted_s = time.monotonic()
            thread = ctypes.c_ulong(self.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_JobTimeout))

    def is_stuck(self) -> bool:
        """I/O thread: an interrupted job goes on, inside native code that nothing can stop."""
        since = self._interrupted_s
        return since is not None and time.monotonic() - since >= STUCK_S

    def close(self) -> None:
        """Any thread: ends the thread after the job that it is at."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def run(self) -> None:
        try:
            self._serve()
        except BaseException:
            # Native code has panicked, or this one is wrong: nobody would be served any more.
            log.exception("the text thread failed")
            os._exit(EXIT_BROKEN)

    def _serve(self) -> None:
        if not self._wait_for_job(IDLE_S) and not self._closing:
            self._warm_up()
        while self._wait_for_job(None):
            with self._changed:
                job = self._jobs.popleft()
            self._mark(job.id)
            result = self._guarded(job)
            self._mark(0)
            if isinstance(job, Submit):
                self._hand_over(job, result)
            elif isinstance(result, TextResult):
                self._post(result)
            elif isinstance(result, ErrorRecord):
                self._post(TextResult(job.id, error=result))

    def _warm_up(self) -> None:
        """Neither the load nor the request that caused it has to wait for this."""
        try:
            self._preparer.warm_up_constraints()
        except Exception:
            log.exception("constraints cannot be used with this vocabulary")

    def _wait_for_job(self, timeout_s: float | None) -> bool:
        """Whether there is a job; False when the time has passed, or the thread is to end."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._jobs) or self._closing, timeout_s)
            return bool(self._jobs) and not self._closing

    def _guarded(self, job: Submit | TextJob) -> list[Sequence] | TextResult | ErrorRecord:
        """The job's result, or the error that it ended with."""
        # No lock in here: an interruption that arrives inside it would leave it taken.
        result: list[Sequence] | TextResult | ErrorRecord
        resume = job.resume if isinstance(job, Submit) else None
        replayed = 0 if resume is None else len(resume.tokens) // 4
        self._present_limit_s = self._limit_s + replayed * REPLAY_TOKEN_S
        self._began = began = [time.monotonic()]
        try:
            try:
                if isinstance(job, Submit):
                    result = self._preparer.sequences(job)
                else:
                    result = self._preparer.answer(job)
            except BearError as exc:
                result = exc.to_record()
            except Exception:
                log.exception("a text job failed")
                result = BackendError("the text of the request could not be processed").to_record()
            while not _pop(began):  # the interruption is on its way: let it arrive here
                time.sleep(0.001)
        except _JobTimeout:
            late = InvalidField("input", f"takes more than {self._present_limit_s:g} s to turn into tokens")
            result = late.to_record()
        self._interrupted_s = None
        return result

    def _hand_over(self, job: Submit, result: list[Sequence] | TextResult | ErrorRecord) -> None:
        ids = set(range(job.id, job.id + job.n))
        with self._changed:
            self._pending -= ids
            cancelled = ids & self._cancelled
            self._cancelled -= ids
            if isinstance(result, list):
                for sequence in result:
                    if sequence.id not in cancelled:
                        self._to_owner(sequence)
                ids = cancelled
        error = result if isinstance(result, ErrorRecord) else None
        if ids:
            self._post(Step([Ended(id, None if id in cancelled else error) for id in sorted(ids)]))


def _pop(began: list[float]) -> bool:
    """Takes the only item, at once for all threads; False if it has been taken."""
    try:
        began.pop()
    except IndexError:
        return False
    return True
